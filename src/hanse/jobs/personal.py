"""Recipes for personal models: a part of the model, or a whole second one, stays at each site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import ClassVar

from hanse.errors import ConfigError
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.recipe import Workflow, positive
from hanse.messages.params import flatten
from hanse.workflows.fedavg import fedavg


@dataclass(frozen=True, kw_only=True)
class PersonalRecipe(FedAvgRecipe):
    """FedAvg of a model a part of which is each site's own: FedPer (Arivazhagan et al., 2019, arXiv:1912.00818) with the head kept
    local, FedRep (Collins et al., ICML 2021) if the sites train the head first and then the body, FedBN (Li et al., ICLR 2021) with the
    names of batch normalization (`hanse.adapters.torch_personal.norm_names`).

    local: patterns of flat tensor names (`fnmatch`). These tensors go down once, as the first model has them; from then on each site
        goes on from its own, in training and in evaluation, and they never leave it. The patterns reach the sites as `local_params` in
        their config.
    """

    kind: ClassVar[str] = "personal"

    local: Sequence[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.local, str) or not self.local or not all(isinstance(each, str) and each for each in self.local):
            raise ConfigError(f'recipe {self.name!r} has local={self.local!r}: it must be a list of patterns of names, such as ["head.*"]')
        object.__setattr__(self, "local", tuple(self.local))
        object.__setattr__(self, "config", {**self.config, "local_params": list(self.local)})
        params = self.first_model()[0].params
        names = list(flatten(params)[0]) if params is not None else []
        kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.local)]
        if params is None or not kept or len(kept) == len(names):
            raise ConfigError(
                f"recipe {self.name!r} keeps {len(kept)} of the first model's {len(names)} tensors local: some must be, and not all.",
                hint=f"Name them as the model does: {', '.join(names[:5])} …" if names else "Give the recipe a first model.",
            )


@dataclass(frozen=True, kw_only=True)
class DittoRecipe(FedAvgRecipe):
    """Ditto (Li et al., ICML 2021, Algorithm 1): FedAvg, and beside it each site trains a model of its own, held near the shared one.

    strength: λ; rides to the sites as `ditto_lambda` in their config. The training code keeps the personal model in `site.state` and adds
        λ/2 · ‖v − w‖² to its loss, with `hanse.adapters.torch.proximal_term` for PyTorch; only w leaves the site.
    """

    kind: ClassVar[str] = "ditto"

    strength: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, strength=self.strength)

    def workflow(self) -> Workflow:
        return partial(fedavg, config={"ditto_lambda": self.strength}, **self._arguments())
