"""Hanse: federated learning in which the model travels to the data, and only what a site allows travels back.

Imports go one way: errors, then messages, then pure kernels (aggregation, privacy, compression), then filters and transport, then the
cohort. On these stand the client, apps and workflows, then jobs, then server and site, then simulation and environments, and last the
command line. Adapters hang on the rim and are found by entry point; the names below are loaded when they are first used, so `import
hanse` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hanse.aggregation.aggregator import Aggregator as Aggregator
    from hanse.aggregation.fednova import FedNova as FedNova
    from hanse.aggregation.geometric_median import GeometricMedian as GeometricMedian
    from hanse.aggregation.krum import Bulyan as Bulyan
    from hanse.aggregation.krum import Krum as Krum
    from hanse.aggregation.krum import MultiKrum as MultiKrum
    from hanse.aggregation.mean import WeightedMean as WeightedMean
    from hanse.aggregation.norm_bound import NormBoundedMean as NormBoundedMean
    from hanse.aggregation.order_statistics import Median as Median
    from hanse.aggregation.order_statistics import TrimmedMean as TrimmedMean
    from hanse.aggregation.qffl import QFFL as QFFL
    from hanse.aggregation.server_optimizer import SGD as SGD
    from hanse.aggregation.server_optimizer import Adagrad as Adagrad
    from hanse.aggregation.server_optimizer import Adam as Adam
    from hanse.aggregation.server_optimizer import Yogi as Yogi
    from hanse.analytics import table_app as table_app
    from hanse.app import App as App
    from hanse.app import Site as Site
    from hanse.cohort import Cohort as Cohort
    from hanse.environments.poc import PocEnv as PocEnv
    from hanse.environments.production import ProdEnv as ProdEnv
    from hanse.environments.simulation import SimEnv as SimEnv
    from hanse.environments.simulation import resume as resume
    from hanse.errors import ConfigError as ConfigError
    from hanse.errors import HanseError as HanseError
    from hanse.errors import IdentityError as IdentityError
    from hanse.errors import JobFailed as JobFailed
    from hanse.errors import JobStopped as JobStopped
    from hanse.errors import PolicyRefused as PolicyRefused
    from hanse.errors import Refused as Refused
    from hanse.errors import TooFewUpdates as TooFewUpdates
    from hanse.filters import CastTo as CastTo
    from hanse.filters import ClipNorm as ClipNorm
    from hanse.filters import Exclude as Exclude
    from hanse.filters import Filters as Filters
    from hanse.filters import GaussianNoise as GaussianNoise
    from hanse.jobs.asynchronous import FedAsyncRecipe as FedAsyncRecipe
    from hanse.jobs.asynchronous import FedBuffRecipe as FedBuffRecipe
    from hanse.jobs.boosting import XGBoostBaggingRecipe as XGBoostBaggingRecipe
    from hanse.jobs.boosting import XGBoostCyclicRecipe as XGBoostCyclicRecipe
    from hanse.jobs.cyclic import CyclicRecipe as CyclicRecipe
    from hanse.jobs.describe import StatisticsRecipe as StatisticsRecipe
    from hanse.jobs.distillation import FedMDRecipe as FedMDRecipe
    from hanse.jobs.evaluate import FedEvalRecipe as FedEvalRecipe
    from hanse.jobs.fedavg import FedAvgRecipe as FedAvgRecipe
    from hanse.jobs.fedavg import FedOptRecipe as FedOptRecipe
    from hanse.jobs.fedavg import FedProxRecipe as FedProxRecipe
    from hanse.jobs.kmeans import KMeansRecipe as KMeansRecipe
    from hanse.jobs.loading import read_job as read_job
    from hanse.jobs.newton import LogisticNewtonRecipe as LogisticNewtonRecipe
    from hanse.jobs.personal import DittoRecipe as DittoRecipe
    from hanse.jobs.personal import PersonalRecipe as PersonalRecipe
    from hanse.jobs.recipe import WorkflowRecipe as WorkflowRecipe
    from hanse.jobs.scaffold import FedDynRecipe as FedDynRecipe
    from hanse.jobs.scaffold import ScaffoldRecipe as ScaffoldRecipe
    from hanse.jobs.svm import SVMRecipe as SVMRecipe
    from hanse.messages.flmodel import FLModel as FLModel
    from hanse.messages.flmodel import ParamsType as ParamsType
    from hanse.messages.task import Task as Task
    from hanse.messages.update import Update as Update
    from hanse.server.run import Run as Run
    from hanse.simulation.clock import Devices as Devices
    from hanse.statistics.disclosure import Disclosure as Disclosure
    from hanse.workflows.cyclic import cyclic as cyclic
    from hanse.workflows.distillation import fedmd as fedmd
    from hanse.workflows.evaluate import cross_site_evaluation as cross_site_evaluation
    from hanse.workflows.fedavg import fedavg as fedavg
    from hanse.workflows.selection import ByExamples as ByExamples
    from hanse.workflows.selection import PowerOfChoice as PowerOfChoice
    from hanse.workflows.selection import Selection as Selection
    from hanse.workflows.selection import Uniform as Uniform

_HOMES = {
    "aggregation.aggregator": ("Aggregator",),
    "aggregation.fednova": ("FedNova",),
    "aggregation.geometric_median": ("GeometricMedian",),
    "aggregation.krum": ("Bulyan", "Krum", "MultiKrum"),
    "aggregation.mean": ("WeightedMean",),
    "aggregation.norm_bound": ("NormBoundedMean",),
    "aggregation.order_statistics": ("Median", "TrimmedMean"),
    "aggregation.qffl": ("QFFL",),
    "aggregation.server_optimizer": ("SGD", "Adagrad", "Adam", "Yogi"),
    "analytics": ("table_app",),
    "app": ("App", "Site"),
    "cohort": ("Cohort",),
    "environments.poc": ("PocEnv",),
    "environments.production": ("ProdEnv",),
    "environments.simulation": ("SimEnv", "resume"),
    "errors": ("ConfigError", "HanseError", "IdentityError", "JobFailed", "JobStopped", "PolicyRefused", "Refused", "TooFewUpdates"),
    "filters": ("CastTo", "ClipNorm", "Exclude", "Filters", "GaussianNoise"),
    "jobs.asynchronous": ("FedAsyncRecipe", "FedBuffRecipe"),
    "jobs.boosting": ("XGBoostBaggingRecipe", "XGBoostCyclicRecipe"),
    "jobs.cyclic": ("CyclicRecipe",),
    "jobs.describe": ("StatisticsRecipe",),
    "jobs.distillation": ("FedMDRecipe",),
    "jobs.evaluate": ("FedEvalRecipe",),
    "jobs.fedavg": ("FedAvgRecipe", "FedOptRecipe", "FedProxRecipe"),
    "jobs.kmeans": ("KMeansRecipe",),
    "jobs.loading": ("read_job",),
    "jobs.newton": ("LogisticNewtonRecipe",),
    "jobs.personal": ("DittoRecipe", "PersonalRecipe"),
    "jobs.recipe": ("WorkflowRecipe",),
    "jobs.scaffold": ("FedDynRecipe", "ScaffoldRecipe"),
    "jobs.svm": ("SVMRecipe",),
    "messages.flmodel": ("FLModel", "ParamsType"),
    "messages.task": ("Task",),
    "messages.update": ("Update",),
    "server.run": ("Run",),
    "simulation.clock": ("Devices",),
    "statistics.disclosure": ("Disclosure",),
    "workflows.cyclic": ("cyclic",),
    "workflows.distillation": ("fedmd",),
    "workflows.evaluate": ("cross_site_evaluation",),
    "workflows.fedavg": ("fedavg",),
    "workflows.selection": ("ByExamples", "PowerOfChoice", "Selection", "Uniform"),
}
_EXTRA_OF = {"environments.poc": "server", "environments.production": "site"}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hanse' has no attribute {name!r}")
    home = _HOME_OF[name]
    try:
        return getattr(import_module(f"hanse.{home}"), name)
    except ModuleNotFoundError as error:
        if (extra := _EXTRA_OF.get(home)) is None:
            raise
        from hanse.errors import NotInstalled

        raise NotInstalled(f"{name} needs the package {error.name!r}.", hint=f"Install it with: pip install 'hanse[{extra}]'") from error


def __dir__() -> list[str]:
    return __all__
