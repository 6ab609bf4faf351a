"""The recipe for logistic regression by Newton's method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hanse.errors import ConfigError
from hanse.jobs.describe import column_names
from hanse.jobs.recipe import Recipe, Workflow, counts, positive
from hanse.messages.task import DERIVATIVES
from hanse.workflows.newton import logistic_newton


@dataclass(frozen=True, kw_only=True)
class LogisticNewtonRecipe(Recipe):
    """Logistic regression on the rows of all sites: the fit on the pooled rows, in a few rounds, with an app made by `hanse.table_app`.

    features: which columns of the table, in this order. target: the column of labels, 0 and 1.
    ridge: the penalty ridge / 2 · ‖w‖² on all weights but the intercept, 1 / C of scikit-learn; 0: none.
    model: the first weights, {"coef_": shape (1, d), "intercept_": shape (1,)}; None: zeros.
    rounds: at most so many. tolerance: the rounds end once the loss a row is within about this of its least.
    min_updates: how many sites must answer (None: all). within_s: seconds for a round.
    """

    kind: ClassVar[str] = "logistic-newton"

    features: Sequence[str]
    target: str
    ridge: float = 0.0
    rounds: int = 25
    tolerance: float = 1e-9
    min_updates: int | None = None
    within_s: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must_handle(DERIVATIVES)
        counts(self, rounds=self.rounds, min_updates=self.min_updates)
        positive(self, tolerance=self.tolerance, within_s=self.within_s, ridge=self.ridge or None)
        column_names(self, features=self.features, target=[self.target])
        if self.target in self.features:
            raise ConfigError(f"recipe {self.name!r} has target {self.target!r} among its features: leave it out there")
        params = self.first_model()[0].params
        if params is not None and not (isinstance(params, dict) and {"coef_", "intercept_"} <= params.keys()):
            raise ConfigError(f"recipe {self.name!r} has a model without coef_ and intercept_: give both, or no model")

    def workflow(self) -> Workflow:
        return partial(
            logistic_newton,
            features=self.features,
            target=self.target,
            ridge=self.ridge,
            rounds=self.rounds,
            tolerance=self.tolerance,
            min_updates=self.min_updates,
            within_s=self.within_s,
        )
