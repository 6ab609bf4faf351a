"""Krum and Multi-Krum (Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017) and Bulyan (El Mhamdi et al., The Hidden
Vulnerability of Distributed Learning in Byzantium, ICML 2018): trust the updates that lie close to many others.

Distances are L2 over the floating-point tensors of an update. What the result's meta holds of a rule: `chosen`, the sites it took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from hanse.aggregation.form import Array
from hanse.aggregation.gathered import Gathered, Stack, squared_distances, weighted
from hanse.aggregation.order_statistics import coordinatewise, mean_of, median_of
from hanse.errors import ConfigError


class MultiKrum(Gathered):
    """The mean of the `m` updates with the lowest scores (Blanchard et al., NeurIPS 2017, section 4, Multi-Krum).

    f: how many sites may be hostile; there must be at least 2 f + 3.
    m: of how many updates the mean is taken, at most sites - f - 2; None: as many.

    An update's score is the sum of its squared distances to the sites - f - 2 others closest to it; of equal scores the one wins that is
    closer to all others, then the site's name that comes first. All sites must send the same tensors. Every site counts the same.
    """

    same_names: ClassVar[bool] = True

    def __init__(self, f: int, m: int | None = None) -> None:
        _check_count(f=f)
        if m is not None:
            _check_count(at_least=1, m=m)
        self.f = f
        self.m = m
        super().__init__()

    @property
    def needs(self) -> int:
        return max(2 * self.f + 3, self.f + 2 + (self.m or 1))

    def _combine(self, stack: Stack) -> tuple[dict[str, Array], dict[str, Any]]:
        count = len(stack.sites)
        best = by_score(_distances(stack), self.f)[: self.m or count - self.f - 2]
        chosen = [stack.sites[index] for index in sorted(best.tolist())]
        return weighted(stack, dict.fromkeys(chosen, 1.0)), {"chosen": chosen}


class Krum(MultiKrum):
    """The update that lies closest to its neighbours (Blanchard et al., NeurIPS 2017, section 4): `MultiKrum` with m = 1.

    f: how many sites may be hostile; there must be at least 2 f + 3. The result is one site's update, in the model's
        dtypes; bit for bit, save integers above 2**53.
    """

    def __init__(self, f: int) -> None:
        super().__init__(f, 1)


class Bulyan(Gathered):
    """Bulyan over Krum (El Mhamdi et al., ICML 2018, section 4): choose by Krum, then take the mean about the median.

    f: how many sites may be hostile; there must be at least 4 f + 3.

    Krum's winner is chosen and set aside, again and again, until sites - 2 f are chosen; then for each number by itself the mean of the
    sites - 4 f chosen values closest to their median. When few are left to choose from, a score is the distance to at least one neighbour.
    All sites must send the same tensors. Every site counts the same.
    """

    same_names: ClassVar[bool] = True

    def __init__(self, f: int) -> None:
        _check_count(f=f)
        self.f = f
        super().__init__()

    @property
    def needs(self) -> int:
        return 4 * self.f + 3

    def _combine(self, stack: Stack) -> tuple[dict[str, Array], dict[str, Any]]:
        distances = _distances(stack)
        left = list(range(len(stack.sites)))
        chosen: list[int] = []
        while len(chosen) < len(stack.sites) - 2 * self.f:  # θ in the paper
            chosen.append(left.pop(int(by_score(distances[np.ix_(left, left)], self.f)[0])))
        sites = [stack.sites[index] for index in sorted(chosen)]
        rows = {name: {site: by_site[site] for site in sites} for name, by_site in stack.rows.items()}
        closest = len(sites) - 2 * self.f  # β in the paper
        arrays = coordinatewise(replace(stack, rows=rows), range, lambda ordered: mean_about_median(ordered, closest))
        return arrays, {"chosen": sites}


def by_score(distances: Array, f: int) -> Array:
    """The rows from the lowest score to the highest, shape (S,). Of equal scores, the lower sum of all distances; then the lower row.

    distances: squared, between each two sites, float64, shape (S, S). A row's score is the sum of the sites - f - 2 smallest of its
    distances to others, at least one. With one, the two sites closest to each other have the same score.
    """
    sites = len(distances)
    others = np.sort(distances[~np.eye(sites, dtype=bool)].reshape(sites, sites - 1), axis=1)
    return np.lexsort((others.sum(axis=1), others[:, : max(1, sites - f - 2)].sum(axis=1)))


def mean_about_median(ordered: Sequence[Array], closest: int) -> Array:
    """At each place the mean of the `closest` values next to the median. Of equally close ones, the lower."""
    median = median_of(ordered)
    best = spread = None
    for low in range(len(ordered) - closest + 1):  # the values next to the median follow each other in order
        window = ordered[low : low + closest]
        farthest = np.maximum(median - window[0], window[-1] - median)
        mean = mean_of(window)
        if best is None or spread is None:
            best, spread = mean, farthest
        else:
            np.copyto(best, mean, where=farthest < spread)
            np.minimum(spread, farthest, out=spread)
    assert best is not None
    return best


def _distances(stack: Stack) -> Array:
    return squared_distances(stack, stack.known_origin())


def _check_count(*, at_least: int = 0, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ConfigError(f"{name} is {value!r}: it must be a whole number of at least {at_least}")
