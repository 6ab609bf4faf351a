"""MLflow: one run of its own for a run folder, in an experiment of the job's name."""

from __future__ import annotations

import re

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from hanse.errors import ConfigError
from hanse.server.run import Run
from hanse.tracking.values import params, values

_BATCH = 1_000  # metrics that MLflow takes at once
_PARAM_CHARACTERS, _TAG_CHARACTERS = 500, 5_000
_ENDS = {"completed": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def write(run: Run, at: str | None = None, *, sites: bool = True) -> str:
    """Write a run to MLflow. A metric of a site is called "SITE/TASK/METRIC"; what is no letter, digit or one of `_-./ ` becomes `_`.

    at: the tracking server's URI; None: MLflow's own settings, such as MLFLOW_TRACKING_URI. Returns MLflow's id of the run.
    Raises ConfigError, with what MLflow says, if it does not take it.
    """
    facts = run.facts
    try:
        client = MlflowClient(at)
        found = client.get_experiment_by_name(facts["job"]["name"])
        experiment = client.create_experiment(facts["job"]["name"]) if found is None else found.experiment_id
        created = client.create_run(experiment, start_time=round(facts["started"] * 1000), run_name=run.folder.name)
        key, (metrics, texts, settings) = created.info.run_id, _sorted(run, sites)
        for first in range(0, len(metrics), _BATCH):
            client.log_batch(key, metrics=metrics[first : first + _BATCH])
        for param in settings:
            client.log_param(key, param.key, param.value)
        for tag in [*texts, RunTag("hanse.folder", str(run.folder)), RunTag("hanse.status", facts["status"])]:
            client.set_tag(key, tag.key, tag.value)
        ended = facts.get("ended")
        if facts["status"] in _ENDS:
            client.set_terminated(key, _ENDS[facts["status"]], end_time=None if ended is None else round(ended * 1000))
    except MlflowException as error:
        raise ConfigError(f"MLflow does not take the run: {error}") from error
    return str(key)


def _sorted(run: Run, sites: bool) -> tuple[list[Metric], list[RunTag], list[Param]]:
    at_ms = round(run.facts["started"] * 1000)
    metrics, tags = [], []
    settings = {key: value[:_PARAM_CHARACTERS] for key, value in params(run).items()}
    for value in values(run, sites=sites):
        name = re.sub(r"[^\w\-./ ]", "_", value.name)
        if value.kind == "scalar":
            metrics.append(Metric(name, value.value, at_ms, value.step))
        elif value.kind == "param":
            settings.setdefault(name, value.value[:_PARAM_CHARACTERS])  # a parameter cannot change: the first one counts
        else:
            tags.append(RunTag(name, value.value[:_TAG_CHARACTERS]))
    return metrics, tags, [Param(key, value) for key, value in settings.items()]
