"""Recipes for boosted trees: XGBoost by bagging, and in turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, get_args

from hanse.aggregation.collect import Collect
from hanse.errors import ConfigError
from hanse.jobs.recipe import Recipe, Workflow, counts, json_values, positive
from hanse.trees.ensemble import check_part, join
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.cyclic import Order, cyclic
from hanse.workflows.fedavg import fedavg

BOOSTER = "booster"
"""The name, in a model's params, of XGBoost's own bytes: `save_raw("json")`."""


@dataclass(frozen=True, kw_only=True)
class _BoostingRecipe(Recipe):
    rounds: int
    params: Mapping[str, Any] = field(default_factory=dict)
    local_trees: int = 1
    min_updates: int | None = None
    within_s: float | None = None
    evaluate: bool | None = None
    best: str = "max auc"
    stop_when: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must_handle("train")
        counts(self, rounds=self.rounds, local_trees=self.local_trees, min_updates=self.min_updates)
        positive(self, within_s=self.within_s)
        json_values("params", self.params)
        if not isinstance(self.params.get("objective"), str):
            raise ConfigError(f"recipe {self.name!r} needs params with an objective, such as params={{'objective': 'binary:logistic'}}")
        wanted = {"booster": "gbtree", "process_type": "default", "multi_strategy": "one_output_per_tree"}
        for name, value in wanted.items():
            if self.params.get(name, value) != value:
                raise ConfigError(f"recipe {self.name!r} has {name} {self.params[name]!r} among its params: only {value!r} can be joined")
        for name in ("num_class", "num_parallel_tree"):
            if type(self.params.get(name, 1)) is not int or self.params.get(name, 1) < 1:
                raise ConfigError(
                    f"recipe {self.name!r} has {name} {self.params[name]!r} among its params: it must be a whole number above 0"
                )
        first = self.first_model()[0].params
        if first is not None and not (isinstance(first, Mapping) and isinstance(first.get(BOOSTER), bytes) and len(first) == 1):
            raise ConfigError(f"recipe {self.name!r} takes an XGBoost model, or its bytes as {{{BOOSTER!r}: …}}, or no model")

    def _arguments(self) -> dict[str, Any]:
        wanted = {
            "objective": self.params["objective"],
            "layers": self.local_trees,
            "classes": self.params.get("num_class", 1),
            "parallel": self.params.get("num_parallel_tree", 1),
        }
        settings = {"params": {"base_score": 0.5, **self.params}, "local_trees": self.local_trees}
        return {
            "rounds": self.rounds,
            "min_updates": self.min_updates,
            "within_s": self.within_s,
            "evaluate": self.evaluates(self.evaluate),
            "best": Goal(self.best),
            "stop_when": None if self.stop_when is None else Condition(self.stop_when),
            "config": {"xgboost": settings},
            "aggregator": Collect(partial(_check, **wanted), _join),
        }


@dataclass(frozen=True, kw_only=True)
class XGBoostBaggingRecipe(_BoostingRecipe):
    """Federated bagging: in each round every site boosts the common ensemble by a few trees on its own data, and all of them join it.

    A leaf's value is divided by the number of sites that took part, so that a round takes as large a step as one of XGBoost alone.

    rounds: how many. params: XGBoost's, `objective` among them; they ride to the sites, with a `base_score` of 0.5 unless they name one.
    local_trees: how many iterations of boosting a site does in a round.
    sites_per_round, min_updates, within_s, grace_s, evaluate, best, stop_when: as in FedAvgRecipe.
    """

    kind: ClassVar[str] = "xgboost-bagging"

    sites_per_round: int | None = None
    grace_s: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        counts(self, rounds=self.rounds, sites_per_round=self.sites_per_round)
        positive(self, grace_s=self.grace_s)
        self.workflow()

    def workflow(self) -> Workflow:
        return partial(fedavg, sites_per_round=self.sites_per_round, grace_s=self.grace_s, **self._arguments())


@dataclass(frozen=True, kw_only=True)
class XGBoostCyclicRecipe(_BoostingRecipe):
    """Boosting in turns: in each round one site after the other adds a few trees, fitted to its own data, to the common ensemble.

    rounds: how often it goes round. order: "fixed", by name, or "random", shuffled anew each round. within_s: seconds for one site.
    params, local_trees: as in XGBoostBaggingRecipe. min_updates, evaluate, best, stop_when: as in CyclicRecipe.
    """

    kind: ClassVar[str] = "xgboost-cyclic"

    order: Order = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in get_args(Order):
            raise ConfigError(f"recipe {self.name!r} has order={self.order!r}: it must be one of {', '.join(get_args(Order))}")
        self.workflow()

    def workflow(self) -> Workflow:
        return partial(cyclic, order=self.order, **self._arguments())


def _check(params: Any, like: Any, **wanted: Any) -> None:
    if not isinstance(params, Mapping) or params.keys() != {BOOSTER} or not isinstance(params[BOOSTER], bytes):
        raise ConfigError(f"its params are not XGBoost's bytes as {BOOSTER!r}.", hint="Send what hanse.adapters.xgboost.boost returns.")
    check_part(params[BOOSTER], None if like is None else like[BOOSTER], **wanted)


def _join(ensemble: Any, parts: Mapping[str, Any]) -> dict[str, bytes]:
    return {BOOSTER: join(None if ensemble is None else ensemble[BOOSTER], [part[BOOSTER] for part in parts.values()])}
