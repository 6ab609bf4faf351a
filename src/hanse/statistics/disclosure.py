"""Disclosure control: what a site takes out of its statistics before they leave.

b = bins; counts have b + 2 cells, see `hanse.statistics.histogram`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hanse.errors import ConfigError
from hanse.statistics.moments import Moments

Array = np.ndarray[Any, np.dtype[Any]]


SITE_RULES = "statistics_rules"
"""The key in a site's config under which its policy tells code that obeys, such as `hanse.table_app`, the rules that it has to keep."""


@dataclass(frozen=True, kw_only=True)
class Disclosure:
    """The rules of one site. None of them is differential privacy: they keep small groups and single values out, and prove nothing.

    min_count: nothing is said of fewer values or rows than this, and no cell of a histogram below it is sent.
    max_bins_share: a histogram has at most so many bins for each value; of a column with fewer, none is sent.
    extremes: whether the smallest and the largest value are sent. Without it, a range that is asked for is rounded outwards.
    count_noise: standard deviation of the noise added to each count, rounded to whole numbers; mean and variance get about as much.
    range_noise: extremes and ranges are moved outwards by a random share of their span, up to this.
    Raises ConfigError for a value out of range.
    """

    min_count: int = 10
    max_bins_share: float = 0.1
    extremes: bool = False
    count_noise: float = 0.0
    range_noise: float = 0.0

    def __post_init__(self) -> None:
        if type(self.min_count) is not int or self.min_count < 1:
            raise ConfigError(f"min_count is {self.min_count!r}: it must be a whole number from 1")
        if not 0 < self.max_bins_share < math.inf:
            raise ConfigError(f"max_bins_share is {self.max_bins_share!r}: it must be a number above 0, such as 0.1")
        for name in ("count_noise", "range_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be a number from 0")

    def stricter(self, other: Disclosure) -> Disclosure:
        """Of each rule the one that lets less out."""
        return Disclosure(
            min_count=max(self.min_count, other.min_count),
            max_bins_share=min(self.max_bins_share, other.max_bins_share),
            extremes=self.extremes and other.extremes,
            count_noise=max(self.count_noise, other.count_noise),
            range_noise=max(self.range_noise, other.range_noise),
        )

    def noisy(self, moments: Moments, rng: np.random.Generator) -> Moments:
        """The moments with noise: on their counts, and on mean and variance about as much as if that many rows had come or gone.

        Mean and variance need it too: of a column of whole numbers, the exact mean is a fraction whose denominator tells the count.
        With s the standard deviation of n values, one row more moves the mean by s / n and the variance by √2 s² / n, as root mean squares
        over rows of a normal distribution.
        """
        if not self.count_noise:
            return moments
        count, missing = (max(0, n + round(rng.normal(0.0, self.count_noise))) for n in (moments.count, moments.missing))
        count = max(count, self.min_count)
        if not moments.count:
            return replace(moments, count=count, missing=missing)
        mean, variance, share = moments.mean, moments.variance if moments.count > 1 else 0.0, self.count_noise / moments.count
        mean += share * math.sqrt(variance) * rng.normal()
        variance *= max(0.0, 1 + share * math.sqrt(2) * rng.normal())
        return replace(moments, count=count, missing=missing, total=mean * count, m2=variance * (count - 1))

    def widened(self, low: float, high: float, rng: np.random.Generator) -> tuple[float, float]:
        """The range with each end moved outwards."""
        if not self.range_noise:
            return low, high
        span = (high - low) or abs(high) or 1.0
        down, up = rng.uniform(0.0, self.range_noise, 2)
        return low - span * float(down), high + span * float(up)

    def shown(self, counts: Array, rng: np.random.Generator) -> Array:
        """int64, shape (b + 2,): the counts that may leave, 0 in place of the others; noise first, then `hide_small`."""
        if self.count_noise:
            drawn = np.rint(rng.normal(0.0, self.count_noise, counts.shape)).astype(np.int64)
            counts = np.maximum(counts + drawn, 0)
        return hide_small(counts, self.min_count)


def hide_small(counts: Array, min_count: int) -> Array:
    """int64, the same shape: 0 in place of every cell below `min_count`, and of as many more as needed.

    Their sum is known wherever the total is. So if it is below `min_count` too, or a single cell's, the smallest of the other cells goes
    with them (complementary suppression), again and again until it is not.
    """
    kept = np.where(counts < min_count, 0, counts).astype(np.int64)
    hidden = (counts > 0) & (kept == 0)
    while hidden.any() and kept.any() and (hidden.sum() < 2 or counts[hidden].sum() < min_count):
        smallest = int(np.argmin(np.where(kept > 0, kept, np.iinfo(np.int64).max)))
        hidden[smallest], kept[smallest] = True, 0
    return kept
