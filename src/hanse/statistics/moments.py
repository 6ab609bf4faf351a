"""Count, sum, mean and variance of a column that lies in parts at many sites: each part says five numbers, and any two parts merge.

n = values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of some values.

    count: how many are finite. missing: how many are NaN or infinite. total: the sum of the finite ones.
    m2: the sum of their squared distances to their mean, S in the paper.
    """

    count: int = 0
    missing: int = 0
    total: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, values_n: Array) -> Moments:
        """Of numbers or booleans of shape (n,): the corrected two-pass algorithm, (1.7) in Chan, Golub and LeVeque, 1983."""
        wide = np.asarray(values_n, np.float64)
        x = wide[np.isfinite(wide)]
        if not x.size:
            return cls(missing=wide.size)
        total = float(x.sum())
        rest = x - total / x.size
        return cls(x.size, wide.size - x.size, total, max(0.0, float(rest @ rest) - float(rest.sum()) ** 2 / x.size))

    @property
    def mean(self) -> float:
        """NaN of no values."""
        return self.total / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """The sample's, with n − 1 below the line; NaN of fewer than two values."""
        return self.m2 / (self.count - 1) if self.count > 1 else math.nan

    def merge(self, other: Moments) -> Moments:
        """Of both parts together: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm, Stanford CS-79-773, 1979, (2.1).

        The sums of squares are taken about each part's own mean, so nothing is lost where the mean is large and the variance small.
        """
        count, missing = self.count + other.count, self.missing + other.missing
        if not self.count or not other.count:
            own = self if self.count else other
            return Moments(count, missing, own.total, own.m2)
        apart = other.mean - self.mean
        m2 = self.m2 + other.m2 + apart * apart * (self.count * other.count / count)
        return Moments(count, missing, self.total + other.total, m2)


def merged(parts: Iterable[Moments]) -> Moments:
    """All parts as one, in pairs of neighbours, so that rounding grows with the logarithm of their number."""
    level = list(parts)
    while len(level) > 1:
        pairs = [first.merge(second) for first, second in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0] if level else Moments()
