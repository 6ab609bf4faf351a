"""The recipe for cyclic weight transfer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, get_args

from hanse.errors import ConfigError
from hanse.jobs.recipe import Recipe, Workflow, counts, positive
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.cyclic import Order, cyclic


@dataclass(frozen=True, kw_only=True)
class CyclicRecipe(Recipe):
    """Cyclic weight transfer (Chang et al., JAMIA 2018): the model goes from site to site and is trained at each.

    rounds: how often it goes round. order: "fixed", by name, or "random", shuffled anew each round. min_updates: how many sites must
        train in a round
    (None: all). within_s: seconds for one site. evaluate, best, stop_when: as in FedAvgRecipe; the best is kept only with `evaluate`.
    """

    kind: ClassVar[str] = "cyclic"

    rounds: int
    order: Order = "fixed"
    min_updates: int | None = None
    within_s: float | None = None
    evaluate: bool | None = None
    best: str = "max accuracy"
    stop_when: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must_handle("train")
        counts(self, rounds=self.rounds, min_updates=self.min_updates)
        positive(self, within_s=self.within_s)
        if self.order not in get_args(Order):
            raise ConfigError(f"recipe {self.name!r} has order={self.order!r}: it must be one of {', '.join(get_args(Order))}")
        self.workflow()

    def workflow(self) -> Workflow:
        return partial(
            cyclic,
            rounds=self.rounds,
            order=self.order,
            min_updates=self.min_updates,
            within_s=self.within_s,
            evaluate=self.evaluates(self.evaluate),
            best=Goal(self.best),
            stop_when=None if self.stop_when is None else Condition(self.stop_when),
        )
