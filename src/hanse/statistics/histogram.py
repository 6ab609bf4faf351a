"""Histograms with edges that all sites share, and quantiles from them.

n = values, b = bins; counts have b + 2 cells: below the first edge, the bins, above the last edge.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from hanse.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]


def bin_edges(low: float, high: float, bins: int) -> Array:
    """float64, shape (b + 1,): the ends of bins of one width. Raises ConfigError unless low < high, both finite and apart enough."""
    if math.isfinite(low) and math.isfinite(high) and low < high and bins >= 1:
        edges = np.linspace(low, high, bins + 1)
        if np.isfinite(edges).all() and (np.diff(edges) > 0).all():
            return edges
    raise ConfigError(f"no {bins} bins fit between {low} and {high}: give a lower and a higher finite end")


def cell_counts(values_n: Array, edges: Array) -> Array:
    """int64, shape (b + 2,): how many finite values lie in each cell. A bin holds its left end, the last one both, as in NumPy."""
    wide = np.asarray(values_n, np.float64)
    x = wide[np.isfinite(wide)]
    cell = np.searchsorted(edges, x, "right")
    cell[x == edges[-1]] = len(edges) - 1
    return np.bincount(cell, minlength=len(edges) + 1).astype(np.int64)


def coarse_range(values_n: Array) -> tuple[float, float]:
    """A range that holds all finite values (there must be one), its ends rounded outwards to a power of two of at least 1/8 of their span.

    The ends say where the smallest and the largest value lie only to that step; of values that are all the same, to 1/8 of their size.
    """
    wide = np.asarray(values_n, np.float64)
    x = wide[np.isfinite(wide)]
    low, high = float(x.min()), float(x.max())
    span = high / 8 - low / 8 or abs(high) / 8 or 1.0
    step = 2.0 ** math.ceil(math.log2(span))
    first, last = math.floor(low / step), math.floor(high / step) + 1
    return first * step, last * step


class Quantile(NamedTuple):
    """A quantile read off a histogram: an estimate, and the ends of a range that holds the true one; infinite where no edge does."""

    value: float
    low: float
    high: float


def quantile(edges: Array, counts: Array, q: float, *, total: int) -> Quantile:
    """The smallest value with a share of at least `q` of all values not above it (NumPy's `inverted_cdf`), to the width of its bin.

    counts: shape (b + 2,), cells that are not known as 0. total: how many values there are; those in no cell may lie in any.
    The estimate takes the values of a bin as evenly spread. Raises ConfigError if q is not from 0 to 1 or there are no values.
    """
    if not 0 <= q <= 1 or total < 1:
        raise ConfigError(f"no quantile {q} of {total} values: q must be from 0 to 1, and there must be a value")
    ends = np.concatenate([[-np.inf], edges, [np.inf]])
    upto = np.cumsum(counts)
    known = int(upto[-1])
    hidden = max(0, total - known)
    rank = max(1, math.ceil(q * total - 1e-9))
    first = int(np.searchsorted(upto + hidden, rank))
    last = int(np.searchsorted(upto, rank))
    low, high = float(ends[min(first, len(counts) - 1)]), float(ends[min(last, len(counts) - 1) + 1])
    if not known:
        return Quantile(math.nan, low, high)
    scaled = min(max(rank * known / total, 1e-9), known)
    cell = int(np.searchsorted(upto, scaled))
    left, right = float(ends[cell]), float(ends[cell + 1])
    if math.isinf(left) or math.isinf(right):
        value = right if math.isinf(left) else left
    else:
        value = left + (right - left) * (scaled - float(upto[cell] - counts[cell])) / float(counts[cell])
    return Quantile(min(max(value, low), high), low, high)
