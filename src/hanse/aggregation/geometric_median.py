"""The geometric median of updates: RFA (Pillutla et al., Robust Aggregation for Federated Learning, IEEE Trans. Signal Processing 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from hanse.aggregation.form import LEAST, Array
from hanse.aggregation.gathered import Gathered, Stack, squared_distances, weighted
from hanse.errors import ConfigError


class GeometricMedian(Gathered):
    """The point whose distances to all updates, not squared, have the smallest sum, by the smoothed Weiszfeld algorithm (Algorithm 2).

    smoothing: distances below it count as it, ν in the paper. iterations: at most so many, R in the paper; it ends when nothing changes.

    Withstands fewer than half of the sites: then its distance from the honest updates is bounded by how far they lie apart. Every site
    counts the same: α = 1 / sites. All sites must send the same tensors; distances are L2 over the floating-point ones.

    Departure from the paper: the median is a weighted mean of the updates, and the iterations run on the weights alone, from the distances
    between updates. So any number of them reads the updates twice. The weights are in the result's meta: `weights`.
    """

    same_names: ClassVar[bool] = True

    def __init__(self, smoothing: float = 1e-6, iterations: int = 100) -> None:
        if not 0 < smoothing < np.inf:
            raise ConfigError(f"smoothing is {smoothing!r}: it must be a finite number above 0")
        if iterations < 1:
            raise ConfigError(f"iterations is {iterations!r}: it must be at least 1")
        self.smoothing = smoothing
        self.iterations = iterations
        super().__init__()

    def _combine(self, stack: Stack) -> tuple[dict[str, Array], dict[str, Any]]:
        distances = squared_distances(stack, stack.known_origin())
        found = weiszfeld(distances, smoothing=self.smoothing, iterations=self.iterations)
        weights = dict(zip(stack.sites, found.tolist(), strict=True))
        counting = {site: weight for site, weight in weights.items() if weight >= LEAST}
        return weighted(stack, counting), {"weights": weights}


def weiszfeld(distances: Array, *, smoothing: float, iterations: int) -> Array:
    """The weights of the points in their geometric median; they sum to 1. Float64, shape (S,).

    distances: squared, between each two points, shape (S, S).
    """
    weights = np.full(len(distances), 1 / len(distances))
    for _ in range(iterations):
        # ‖v - w_k‖² for v = Σ λ_i w_i with Σ λ_i = 1
        squares = weights @ distances
        squares = squares - weights @ squares / 2
        pulls = 1 / np.maximum(smoothing, np.sqrt(np.maximum(squares, 0)))  # β in the paper, times the number of sites
        before, weights = weights, pulls / pulls.sum()
        if np.abs(weights - before).max() < 1e-12:
            break
    return weights
