"""A mean of updates none of which may be long (Sun et al., Can You Really Backdoor Federated Learning?, 2019, arXiv:1911.07963)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hanse.aggregation.form import LEAST, Array
from hanse.aggregation.gathered import Gathered, Stack, squared_norms, weighted
from hanse.aggregation.rescaled import rescale
from hanse.errors import ConfigError


class NormBoundedMean(Gathered):
    """The plain mean of the sites' changes, each scaled down to a norm of at most `bound` first (Sun et al., 2019, section 4).

    bound: of the L2 norm of a site's change over its floating-point tensors; None: the median of the round's norms.

    It bounds what one site can do: it moves the result by at most bound / sites. It does not find hostile sites, and many of them that
    agree are not withstood. Every site counts the same. All sites must send the same tensors. FULL needs the task's model, as the change is
    measured from there. Integers and booleans are averaged with the weights that scaling leaves the sites, which are in the result's meta:
    `weights`.
    """

    same_names: ClassVar[bool] = True

    def __init__(self, bound: float | None = None) -> None:
        if bound is not None and not 0 < bound < np.inf:
            raise ConfigError(f"bound is {bound!r}: it must be a finite number above 0, or None for the median norm")
        self.bound = bound
        super().__init__()

    def _combine(self, stack: Stack) -> tuple[dict[str, Array], dict[str, Any]]:
        origin = stack.origin("NormBoundedMean")
        norms = np.sqrt(squared_norms(stack, origin))
        bound = float(np.median(norms)) if self.bound is None else self.bound
        scales = np.minimum(1.0, bound / np.maximum(norms, np.finfo(float).tiny))
        weights = dict(zip(stack.sites, scales.tolist(), strict=True))
        counting = {site: weight for site, weight in weights.items() if weight >= LEAST}
        if not counting:  # all are far too long, or the median site did not move
            counting = dict.fromkeys(stack.sites, LEAST)
        arrays = weighted(stack, counting)
        rescale(arrays, sum(counting.values()) / len(stack.sites), origin)
        return arrays, {"weights": weights}
