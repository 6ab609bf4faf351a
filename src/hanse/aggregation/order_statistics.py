"""The coordinate-wise median and trimmed mean (Yin et al., Byzantine-Robust Distributed Learning, ICML 2018).

Each number of the model is looked at by itself: the sites' values of it are put in order, and what lies at the ends has no say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from hanse.aggregation.form import Array, Kind, as_kind, as_real, is_finite, pieces, real_dtype
from hanse.aggregation.gathered import Gathered, Stack, block_elements, shared
from hanse.aggregation.mean import PIECE, untouched
from hanse.errors import ConfigError, UpdateRejected

# S = sites, B = elements of a block

NETWORK_UP_TO = 32  # sites; of more, sorting whole columns is quicker


class Median(Gathered):
    """The coordinate-wise median (Yin et al., ICML 2018, Definition 1, option I). Of an even number, the mean of the middle two.

    Withstands fewer than half of the sites: each number of the result lies between two honest sites' numbers. Every site counts the same.
    A tensor that some sites left out is the median of those that sent it. Complex numbers: real and imaginary parts by themselves.
    """

    def _combine(self, stack: Stack) -> tuple[dict[str, Array], dict[str, Any]]:
        return coordinatewise(stack, middle, median_of), {}


class TrimmedMean(Gathered):
    """The coordinate-wise trimmed mean (Yin et al., ICML 2018, Definition 2): without the largest and the smallest values, the mean.

    trim: the part of the sites left out at each end, β in the paper, rounded up to whole sites: from 0 to below 0.5. If nothing would be
        left, the middle one or two are.

    Withstands as many hostile sites as are left out at one end; more of them move the result as far as they like. Else as `Median`.
    """

    def __init__(self, trim: float = 0.1) -> None:
        if not 0 <= trim < 0.5:
            raise ConfigError(f"trim is {trim!r}: it must be at least 0 and below 0.5")
        self.trim = trim
        super().__init__()

    def _combine(self, stack: Stack) -> tuple[dict[str, Array], dict[str, Any]]:
        def kept(sites: int) -> range:
            left_out = min(math.ceil(self.trim * sites - 1e-9), (sites - 1) // 2)
            return range(left_out, sites - left_out)

        return coordinatewise(stack, kept, lambda ordered: mean_of([ordered[rank] for rank in kept(len(ordered))])), {}


def middle(sites: int) -> range:
    """The ranks of the median: one, or two for an even number."""
    return range((sites - 1) // 2, sites // 2 + 1)


def median_of(ordered: Sequence[Array]) -> Array:
    """The median of values in order, each of shape (B,)."""
    low, high = middle(len(ordered))[0], middle(len(ordered))[-1]
    return ordered[low] if low == high else ordered[low] * 0.5 + ordered[high] * 0.5


def mean_of(arrays: Sequence[Array]) -> Array:
    """The plain mean, added in the order given."""
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    total /= total.dtype.type(len(arrays))
    return total


def coordinatewise(stack: Stack, wanted: Callable[[int], range], rule: Callable[[Sequence[Array]], Array]) -> dict[str, Array]:
    """Each tensor by a rule for each number by itself.

    wanted: of so many sites, the ranks the rule looks at.
    rule: from the sites' values in order (S arrays, shape (B,), of which only those wanted are in place) the result, shape (B,).
    Raises UpdateRejected if a result is not finite.
    """
    return {name: _tensor(name, by_site, stack.kinds[name], wanted, rule) for name, by_site in stack.rows.items()}


def _tensor(
    name: str, by_site: Mapping[str, Array], kind: Kind, wanted: Callable[[int], range], rule: Callable[[Sequence[Array]], Array]
) -> Array:
    rows = [as_real(row) for row in by_site.values()]
    dtype = real_dtype(kind.dtype)
    plain = kind.dtype in (np.float32, np.float64)
    whole = untouched(math.prod(kind.shape), kind.dtype) if plain else np.empty(math.prod(kind.shape), kind.dtype)
    result = as_real(whole)
    ranks = wanted(len(rows))

    def of_piece(piece: slice) -> bool:
        finite = True
        end = min(piece.stop, result.size)
        size = min(block_elements(len(rows)), end - piece.start)
        scratch = np.empty((len(rows) + 1) * size, dtype)
        with np.errstate(all="ignore"):
            for low in range(piece.start, end, size):
                block = slice(low, min(low + size, end))
                values = rule(_ordered([row[block] for row in rows], scratch, ranks))
                finite = is_finite(values) and finite
                result[block] = as_kind(values, Kind(values.shape, result.dtype))
        return finite

    if not all(list(shared(of_piece, [(piece,) for piece in pieces(result, PIECE)]))):
        raise UpdateRejected(
            f"the combination of tensor {name!r} over {len(rows)} sites overflows {dtype}.",
            hint="Each update is finite, but its numbers are too large: clip.",
        )
    return whole.reshape(kind.shape)


def _ordered(rows: Sequence[Array], scratch: Array, wanted: range) -> Sequence[Array]:
    """The rows' values in order at each place: S arrays, shape (B,), in `scratch`; those of the ranks `wanted` are in place."""
    sites, size = len(rows), rows[0].size
    if sites > NETWORK_UP_TO:
        columns = scratch[: sites * size].reshape(size, sites)
        for site, row in enumerate(rows):
            columns[:, site] = row
        columns.sort(axis=1)
        return list(columns.T)
    ordered = list(scratch[: sites * size].reshape(sites, size))
    for into, row in zip(ordered, rows, strict=True):
        into[:] = row
    spare = scratch[sites * size : (sites + 1) * size]
    for low, high, wants_low, wants_high in network(sites, wanted):
        one, other = ordered[low], ordered[high]
        if wants_low and wants_high:
            np.minimum(one, other, out=spare)
            np.maximum(one, other, out=other)
            ordered[low], spare = spare, one
        elif wants_low:
            np.minimum(one, other, out=one)
        else:
            np.maximum(one, other, out=other)
    return ordered


@lru_cache(64)
def network(sites: int, wanted: range) -> tuple[tuple[int, int, bool, bool], ...]:
    """Which two values to put in order, one after the other, so that those of the ranks wanted are in their places in the end.

    Batcher's odd-even merge sort (1968), without the steps that nothing wanted hangs on. Each step says which of its two results is used.
    """
    steps = []
    used = set(wanted)
    for low, high in reversed(_odd_even_merge_sort(sites)):
        if low in used or high in used:
            steps.append((low, high, low in used, high in used))
            used |= {low, high}
    return tuple(reversed(steps))


def _odd_even_merge_sort(count: int) -> list[tuple[int, int]]:
    steps = []
    run = 1  # length of the sorted runs that are merged
    while run < count:
        apart = run
        while apart:
            for start in range(apart % run, count - apart, 2 * apart):
                for low in range(start, min(start + apart, count - apart)):
                    if low // (2 * run) == (low + apart) // (2 * run):
                        steps.append((low, low + apart))
            apart //= 2
        run *= 2
    return steps
