"""Recipes for federated averaging and its kin."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from hanse.aggregation.aggregator import Aggregator, check_enough
from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import Adam, ServerOptimizer
from hanse.errors import ConfigError
from hanse.jobs.recipe import Recipe, Workflow, counts, part, positive
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.fedavg import fedavg
from hanse.workflows.selection import Selection


@dataclass(frozen=True, kw_only=True)
class FedAvgRecipe(Recipe):
    """Federated averaging (McMahan et al., AISTATS 2017): sites train, the server averages, round after round.

    rounds: how many. sites_per_round: chosen anew each round; None asks all.
    selection: how they are chosen: `ByExamples()`, `PowerOfChoice(candidates=…)`; None: all alike.
    min_updates: how many sites must train in a round; None: all that were asked. A site that fails is reported, and the round goes on
        while enough are left.
    within_s, grace_s: seconds for a round, and for stragglers once there are enough updates; None: no end.
    aggregator: how updates are combined; `WeightedMean("steps")` weighs by steps, `WeightedMean({"site-1": 2.0, …})` as given.
    evaluate: whether sites score each new model, as many as train; None: if the app has `@app.evaluate`. Without it, the metrics sent
        with the updates count, as those of the model the sites received.
    best: which model is kept as the best, such as "max accuracy" or "min loss". stop_when: a condition that ends the job early, such as
        "accuracy >= 0.95".
    """

    kind: ClassVar[str] = "fedavg"

    rounds: int
    sites_per_round: int | None = None
    selection: Selection | None = None
    min_updates: int | None = None
    within_s: float | None = None
    grace_s: float | None = None
    aggregator: Aggregator = field(default_factory=WeightedMean)
    evaluate: bool | None = None
    best: str = "max accuracy"
    stop_when: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must_handle("train")
        counts(self, rounds=self.rounds, sites_per_round=self.sites_per_round, min_updates=self.min_updates)
        positive(self, within_s=self.within_s, grace_s=self.grace_s)
        part(self, "aggregator", "merge")
        if self.selection is not None:
            part(self, "selection", "select")
            self.must_handle(*self.selection.needs(self.sites_per_round))
        self._arguments()

    def check_sites(self, count: int) -> None:
        super().check_sites(count)
        check_enough(self.aggregator, self.sites_per_round or count)
        candidates = getattr(self.selection, "candidates", 0)
        if candidates > count:
            raise ConfigError(f"recipe {self.name!r} selects from candidates={candidates}, and the number of sites is {count}")

    def _arguments(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "sites_per_round": self.sites_per_round,
            "selection": self.selection,
            "min_updates": self.min_updates,
            "within_s": self.within_s,
            "grace_s": self.grace_s,
            "aggregator": self.aggregator,
            "evaluate": self.evaluates(self.evaluate),
            "best": Goal(self.best),
            "stop_when": None if self.stop_when is None else Condition(self.stop_when),
        }

    def workflow(self) -> Workflow:
        return partial(fedavg, **self._arguments())


@dataclass(frozen=True, kw_only=True)
class FedProxRecipe(FedAvgRecipe):
    """FedProx (Li et al., MLSys 2020): FedAvg whose sites add mu/2 · ‖w − w_t‖² to their loss.

    mu: rides to the sites as `proximal_mu` in their config; the training code adds the term, with `hanse.adapters.torch.proximal_term`
        for PyTorch.
    """

    kind: ClassVar[str] = "fedprox"

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, mu=self.mu)

    def workflow(self) -> Workflow:
        return partial(fedavg, config={"proximal_mu": self.mu}, **self._arguments())


@dataclass(frozen=True, kw_only=True)
class FedOptRecipe(FedAvgRecipe):
    """Federated averaging with an optimizer at the server (Reddi et al., ICLR 2021): FedAdam, FedYogi, FedAdagrad, or FedAvgM with
    `SGD(momentum=0.9)`.
    """

    kind: ClassVar[str] = "fedopt"

    server_optimizer: ServerOptimizer = field(default_factory=Adam)

    def __post_init__(self) -> None:
        super().__post_init__()
        part(self, "server_optimizer", "step")

    def workflow(self) -> Workflow:
        return partial(fedavg, server_optimizer=self.server_optimizer, **self._arguments())
