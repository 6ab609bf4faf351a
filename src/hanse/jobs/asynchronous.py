"""Recipes for asynchronous rounds, in which no site waits for another."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import SGD, ServerOptimizer
from hanse.aggregation.staleness import Staleness
from hanse.errors import ConfigError
from hanse.jobs.recipe import Recipe, Workflow, counts, part, positive
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.fedasync import fedasync
from hanse.workflows.fedbuff import fedbuff


@dataclass(frozen=True, kw_only=True)
class _AsynchronousRecipe(Recipe):
    """What both have."""

    rounds: int
    concurrency: int | None = None
    staleness: str = "polynomial 0.5"
    within_s: float | None = None
    best: str = "max accuracy"
    stop_when: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must_handle("train")
        counts(self, rounds=self.rounds, concurrency=self.concurrency)
        positive(self, within_s=self.within_s)
        self._common()

    def _common(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "concurrency": self.concurrency,
            "staleness": Staleness(self.staleness),
            "within_s": self.within_s,
            "best": Goal(self.best),
            "stop_when": None if self.stop_when is None else Condition(self.stop_when),
        }

    def check_sites(self, count: int) -> None:
        super().check_sites(count)
        if self.concurrency is not None and self.concurrency > count:
            raise ConfigError(f"recipe {self.name!r} has concurrency={self.concurrency}, and the number of sites is {count}")


@dataclass(frozen=True, kw_only=True)
class FedBuffRecipe(_AsynchronousRecipe):
    """FedBuff (Nguyen et al., AISTATS 2022): sites train without waiting for each other, and the server steps after each `buffer` updates.

    rounds: how many steps of the server. buffer: updates for each. concurrency: how many sites train at a time; None: all.
    staleness: how much an update counts that is τ steps old: "constant", "polynomial a" for (τ + 1)^-a, or "hinge a b".
    aggregator: how the buffer is combined; `WeightedMean()` weighs by examples, and each of a fast site's updates counts.
    server_optimizer: how the server steps; `SGD(0.5)` is the paper's η_g = 0.5.
    within_s: seconds until a site that has not answered is given up; None: no end. It is asked again after the next step.
    best: which model is kept as the best; the metrics are those that came with the updates, of the models that the sites had got.
    stop_when: a condition that ends the job early, such as "accuracy >= 0.95".
    """

    kind: ClassVar[str] = "fedbuff"

    buffer: int = 10
    aggregator: Aggregator = field(default_factory=lambda: WeightedMean("equal"))
    server_optimizer: ServerOptimizer = field(default_factory=SGD)

    def __post_init__(self) -> None:
        super().__post_init__()
        counts(self, buffer=self.buffer)
        if (needs := getattr(self.aggregator, "needs", 1)) > self.buffer:
            raise ConfigError(f"{type(self.aggregator).__name__} needs at least {needs} updates a step, and buffer is {self.buffer}")
        part(self, "aggregator", "merge")
        part(self, "server_optimizer", "step")

    def workflow(self) -> Workflow:
        own: dict[str, Any] = {"buffer": self.buffer, "aggregator": self.aggregator, "server_optimizer": self.server_optimizer}
        return partial(fedbuff, **self._common(), **own)


@dataclass(frozen=True, kw_only=True)
class FedAsyncRecipe(_AsynchronousRecipe):
    """FedAsync (Xie, Koyejo and Gupta, 2019): the server mixes each update into its model as it comes.

    rounds: how many updates. alpha: how much a fresh one counts, from 0 to 1; one that is τ versions old counts alpha · s(τ), where
        `staleness` says s: "constant", "polynomial a" for (τ + 1)^-a, or "hinge a b".
    mu: rides to the sites as `proximal_mu` in their config, the ρ of the paper, as in FedProx; None: none.
    concurrency, within_s, best, stop_when: as in `FedBuffRecipe`; metrics are those of single updates.
    """

    kind: ClassVar[str] = "fedasync"

    alpha: float = 0.6
    mu: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, alpha=self.alpha, mu=self.mu)
        if self.alpha > 1:
            raise ConfigError(f"recipe {self.name!r} has alpha={self.alpha!r}: it must be above 0 and at most 1")

    def workflow(self) -> Workflow:
        config = None if self.mu is None else {"proximal_mu": self.mu}
        return partial(fedasync, alpha=self.alpha, config=config, **self._common())
