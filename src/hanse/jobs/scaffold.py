"""Recipes for the algorithms that correct client drift: SCAFFOLD and FedDyn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hanse.errors import ConfigError
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.recipe import Workflow, positive
from hanse.workflows.feddyn import RUNNING, feddyn
from hanse.workflows.scaffold import CONTROL, scaffold


@dataclass(frozen=True, kw_only=True)
class ScaffoldRecipe(FedAvgRecipe):
    """SCAFFOLD (Karimireddy et al., ICML 2020): FedAvg whose sites correct their steps by control variates.

    server_learning_rate: η_g. A training task's params have one name more, "control"; `hanse.adapters.torch_correction.Scaffold` does
        the site's part for PyTorch, `hanse.aggregation.control_variates.next_control` has the formula.
    """

    kind: ClassVar[str] = "scaffold"

    server_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, server_learning_rate=self.server_learning_rate)
        params = self.first_model()[0].params
        if not isinstance(params, Mapping) or CONTROL in params:
            raise ConfigError(f"recipe {self.name!r} needs a first model of named params, none of them called {CONTROL!r}")

    def workflow(self) -> Workflow:
        return partial(scaffold, server_learning_rate=self.server_learning_rate, **self._arguments())


@dataclass(frozen=True, kw_only=True)
class FedDynRecipe(FedAvgRecipe):
    """FedDyn (Acar et al., ICLR 2021): FedAvg with a regularizer that changes with the rounds.

    alpha: α; rides to the sites as `feddyn_alpha` in their config. `hanse.adapters.torch_correction.FedDyn` does the site's part for
        PyTorch. averaged: patterns of names that have no gradient, and are averaged only.
    """

    kind: ClassVar[str] = "feddyn"

    alpha: float = 0.1
    averaged: Sequence[str] = RUNNING

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, alpha=self.alpha)
        if isinstance(self.averaged, str) or not all(isinstance(pattern, str) for pattern in self.averaged):
            raise ConfigError(f"recipe {self.name!r} has averaged={self.averaged!r}: it must be a list of patterns of names")
        object.__setattr__(self, "averaged", tuple(self.averaged))
        if self.first_model()[0].params is None:
            raise ConfigError(f"recipe {self.name!r} needs a first model")

    def workflow(self) -> Workflow:
        return partial(feddyn, alpha=self.alpha, averaged=self.averaged, **self._arguments())
