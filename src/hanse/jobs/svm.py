"""The recipe for a support vector machine: sites hand over the records that hold the border, and all of them together make the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from hanse.aggregation.collect import Collect
from hanse.errors import ConfigError
from hanse.jobs.recipe import Recipe, Workflow, counts, positive
from hanse.workflows.condition import Goal
from hanse.workflows.fedavg import fedavg


@dataclass(frozen=True, kw_only=True)
class SVMRecipe(Recipe):
    """A support vector machine by its support vectors: in one round, each site fits its own and sends its support vectors, with labels.

    Support vectors are records of the site, as they are. The server keeps them, and every site gets those of all others.

    share_support_vectors: must be True, to say that this is meant.
    min_updates, within_s, evaluate, best: as in FedAvgRecipe.
    """

    kind: ClassVar[str] = "svm"

    share_support_vectors: bool = False
    min_updates: int | None = None
    within_s: float | None = None
    evaluate: bool | None = None
    best: str = "max accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must_handle("train")
        if self.share_support_vectors is not True:
            raise ConfigError(
                f"recipe {self.name!r}: an SVM's support vectors are records of the sites, and every site would get those of all others.",
                hint="Say share_support_vectors=True if that is allowed; a linear model by FedAvgRecipe sends no records.",
            )
        if self.first_model()[0].params is not None:
            raise ConfigError(f"recipe {self.name!r} takes no first model: the sites bring the support vectors")
        counts(self, rounds=1, min_updates=self.min_updates)
        positive(self, within_s=self.within_s)
        self.workflow()

    def workflow(self) -> Workflow:
        return partial(
            fedavg,
            rounds=1,
            aggregator=Collect(_check, _join),
            min_updates=self.min_updates,
            within_s=self.within_s,
            evaluate=self.evaluates(self.evaluate),
            best=Goal(self.best),
        )


def _check(params: Any, like: Any) -> None:
    """x must be records, shape (rows, features), as many features as in `like`, and y a numeric label for each."""
    if not isinstance(params, Mapping) or params.keys() != {"x", "y"} or not all(isinstance(part, np.ndarray) for part in params.values()):
        raise ConfigError("its params are no support vectors, x and y.", hint="Send what hanse.adapters.sklearn.support_of returns.")
    x, y = params["x"], params["y"]
    if x.ndim != 2 or y.shape != x.shape[:1] or x.dtype.kind != "f" or y.dtype.kind not in "iubf":
        wanted = "floats (n, features) and numbers (n,) are wanted"
        raise ConfigError(f"x has shape {x.shape} and dtype {x.dtype}, y {y.shape} and {y.dtype}: {wanted}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ConfigError("its support vectors hold NaN or inf")
    if like is not None and (x.shape[1] != like["x"].shape[1] or x.dtype != like["x"].dtype or y.dtype != like["y"].dtype):
        raise ConfigError(
            f"its support vectors have {x.shape[1]} features of {x.dtype} and labels of {y.dtype}, those of another site"
            f" {like['x'].shape[1]} of {like['x'].dtype} and {like['y'].dtype}"
        )


def _join(_: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts.values()]) for name in ("x", "y")}
