"""The recipe for scoring models where the data are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hanse.errors import ConfigError
from hanse.jobs.recipe import Recipe, Workflow, counts, positive
from hanse.workflows.evaluate import cross_site_evaluation, federated_evaluation


@dataclass(frozen=True, kw_only=True)
class FedEvalRecipe(Recipe):
    """Every site scores the model on its own data; nothing is trained.

    cross_site: also ask each site for a model of its own (task `submit_model`) and have every site score every one: a table of models by
        sites.
    min_updates: how many sites must score a model (None: all). within_s: seconds for one round of scoring.
    """

    kind: ClassVar[str] = "fedeval"

    cross_site: bool = False
    min_updates: int | None = None
    within_s: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        counts(self, min_updates=self.min_updates)
        positive(self, within_s=self.within_s)
        if not isinstance(self.cross_site, bool):
            raise ConfigError(f"recipe {self.name!r} has cross_site={self.cross_site!r}: it must be True or False")
        self.must_handle("evaluate", *(["submit_model"] if self.cross_site else []))
        if self.model is None and not self.cross_site:
            raise ConfigError(f"recipe {self.name!r} has no model to evaluate: give model=")

    def workflow(self) -> Workflow:
        return partial(
            cross_site_evaluation if self.cross_site else federated_evaluation, min_updates=self.min_updates, within_s=self.within_s
        )
