"""The recipe for knowledge distillation among sites with different models."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.errors import ConfigError
from hanse.jobs.recipe import Recipe, Workflow, counts, part, positive
from hanse.workflows.condition import Condition
from hanse.workflows.distillation import DIGEST, SCORE, fedmd


@dataclass(frozen=True, kw_only=True)
class FedMDRecipe(Recipe):
    """FedMD (Li & Wang, 2019, arXiv:1910.03581): sites with models of different kinds learn from each other's scores on public examples.

    The app handles the tasks "score" and "digest". There is no `model`: each site has one of its own, in `site.state`.

    rounds: how many. public_examples: how many there are, the same at every site. examples_per_round: drawn anew each round; None: all.
    sites_per_round: drawn anew each round; None asks all.
    min_updates: how many sites must score, and digest, in a round; None: all that were asked. within_s, grace_s: seconds for each of the
        two, and for stragglers once there are enough; None: no end.
    aggregator: how scores are combined. evaluate: whether sites score their own models on their own data, after each round; None: if the
        app has `@app.evaluate`. stop_when: a condition that ends the job early, such as "accuracy >= 0.95".
    """

    kind: ClassVar[str] = "fedmd"

    rounds: int
    public_examples: int
    examples_per_round: int | None = None
    sites_per_round: int | None = None
    min_updates: int | None = None
    within_s: float | None = None
    grace_s: float | None = None
    aggregator: Aggregator = field(default_factory=lambda: WeightedMean("equal"))
    evaluate: bool | None = None
    stop_when: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must_handle(SCORE, DIGEST)
        if self.model is not None:
            raise ConfigError(f"recipe {self.name!r} has a model, and in FedMD each site has its own: leave model= out")
        counts(self, rounds=self.rounds, sites_per_round=self.sites_per_round, min_updates=self.min_updates)
        counts(self, public_examples=self.public_examples, examples_per_round=self.examples_per_round)
        if (self.public_examples or 0) < (self.examples_per_round or 1):
            raise ConfigError(
                f"recipe {self.name!r} has examples_per_round={self.examples_per_round}, and public_examples={self.public_examples}"
            )
        positive(self, within_s=self.within_s, grace_s=self.grace_s)
        part(self, "aggregator", "merge")
        self.workflow()

    def workflow(self) -> Workflow:
        return partial(
            fedmd,
            rounds=self.rounds,
            public_examples=self.public_examples,
            examples_per_round=self.examples_per_round,
            sites_per_round=self.sites_per_round,
            min_updates=self.min_updates,
            within_s=self.within_s,
            grace_s=self.grace_s,
            aggregator=self.aggregator,
            evaluate=self.evaluates(self.evaluate),
            stop_when=None if self.stop_when is None else Condition(self.stop_when),
        )
