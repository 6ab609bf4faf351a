"""Which rows of a data set each simulated site has: splits of one data set that look like the data of many sites.

Each function gives a `Partition`: `partition[rank]` is the rows of one site, as int64 indices into whatever the rows are kept in. What it
costs to make and to ask is said with each. Nothing here reads the data: labels or a number of rows are enough.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hanse.errors import ConfigError
from hanse.seeds import generator, seed_for

Rows = npt.NDArray[np.int64]
DRAWS = 100
"""So often `dirichlet` draws anew before it gives up."""
_ROUNDS = 8  # of the Feistel network; four are a pseudorandom permutation for large halves, and small halves need more
_KEPT = 1 << 20  # rows whose order is kept, 8 MiB at most, so that it is computed once
_SHOWN = 20  # sites, and labels, in a summary


class Partition(ABC):
    """The rows of each site. A sequence: `len(partition)` sites, `partition[rank]` the rows of one, a read-only int64 array.

    rows: of the whole data set. names: the values that sites stand for, where they stand for any (`by_column`).
    """

    rows: int
    names: tuple[Any, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _of(self, rank: int) -> Rows: ...

    @property
    @abstractmethod
    def sizes(self) -> Rows:
        """How many rows each site has, shape (sites,)."""

    def __getitem__(self, rank: int) -> Rows:
        if not isinstance(rank, int | np.integer):
            raise ConfigError(f"a partition is asked for the rows of {rank!r}: give a site's rank, partition[site.rank]")
        if not 0 <= rank < len(self):
            raise IndexError(f"rank {rank}: there are {len(self)} sites, from 0")
        found = self._of(int(rank))
        found.flags.writeable = False
        return found

    def __iter__(self) -> Iterator[Rows]:
        return (self[rank] for rank in range(len(self)))

    def counts(self, labels: npt.ArrayLike, ranks: Iterable[int] | None = None) -> tuple[npt.NDArray[Any], Rows]:
        """The labels there are, shape (labels,), and how many rows of each the sites `ranks` (default: all) have, shape (ranks, labels)."""
        names, codes = _codes(labels)
        if len(codes) != self.rows:
            raise ConfigError(f"there are {len(codes):,} labels, and the partition is of {self.rows:,} rows: give one label a row")
        chosen = range(len(self)) if ranks is None else ranks
        return names, np.array([np.bincount(codes[self[rank]], minlength=len(names)) for rank in chosen], np.int64).reshape(-1, len(names))

    def summary(self, labels: npt.ArrayLike | None = None) -> str:
        """A table for people: how large the sites are and, given the labels, what the first 20 hold of the first 20 labels."""
        sizes = self.sizes
        low, middle, high = sizes.min(), np.median(sizes), sizes.max()
        lines = [f"{len(self):,} sites, {self.rows:,} rows; a site has {low:,} to {high:,}, in the median {middle:,.0f}"]
        first = range(min(len(self), _SHOWN))
        header, cells = ["site", "rows"], [[str(self.names[rank] if self.names else rank), f"{sizes[rank]:,}"] for rank in first]
        if labels is not None:
            values, counts = self.counts(labels, first)
            header += [str(value) for value in values[:_SHOWN]]
            cells = [cell + [f"{count:,}" for count in row[:_SHOWN]] for cell, row in zip(cells, counts, strict=True)]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *cells)]
        if len(self) > _SHOWN:
            lines.append(f"and {len(self) - _SHOWN:,} more sites")
        return "\n".join(lines)


def iid(rows: int, sites: int, *, seed: int = 0) -> Partition:
    """Rows dealt at random, as evenly as goes: disjoint and complete, sizes differ by one row at most.

    Costs nothing to make, and as much as its rows to ask for a site, for any number of sites and rows: the order is a permutation that is
    computed for the rows asked for (a Feistel network that walks its cycles, after Black & Rogaway, CT-RSA 2002). Up to a million rows it
    is computed at once, with the first site, and kept.
    Raises ConfigError if there are fewer rows than sites.
    """
    _check_enough(rows, sites)
    return _Blocks(rows, sites, None, seed_for(seed, "partition", "iid"))


def quantity(
    rows: int, sites: int, *, law: Literal["lognormal", "power"] = "lognormal", skew: float = 1.0, min_rows: int = 1, seed: int = 0
) -> Partition:
    """Sites of very different size, whose rows are dealt at random: disjoint and complete.

    law: what the sizes are proportional to, beyond `min_rows` for each. "lognormal": exp(skew · z) with z from N(0, 1). "power": k to the
        power of −skew, where k counts the sites from 1, in random order. A skew of 0 makes all the same.
    Takes memory for a number a site; a site's rows are computed as in `iid`.
    Raises ConfigError if there are fewer than `min_rows` rows a site.
    """
    _check_enough(rows, sites, min_rows)
    if law not in ("lognormal", "power"):
        raise ConfigError(f'law is {law!r}: it must be "lognormal" or "power"')
    if not 0 <= skew < np.inf:
        raise ConfigError(f"skew is {skew!r}: it must be a number from 0")
    rng = generator(seed, "partition", "quantity")
    logs = skew * rng.standard_normal(sites) if law == "lognormal" else -skew * np.log(1 + rng.permutation(sites))
    weights = np.exp(logs - logs.max())
    sizes = min_rows + _apportioned(rows - sites * min_rows, weights / weights.sum())
    return _Blocks(rows, sites, np.concatenate([[0], np.cumsum(sizes)]), seed_for(seed, "partition", "quantity order"))


def dirichlet(labels: npt.ArrayLike, sites: int, *, alpha: float, min_rows: int = 1, seed: int = 0) -> Partition:
    """Label skew (Yurochkin et al., ICML 2019, section 4): each label's rows are split by shares drawn from Dir_sites(alpha).

    Disjoint and complete. The smaller `alpha`, the fewer labels a site has, and the more sites differ in size; a large one is nearly IID.
    min_rows: all is drawn anew until each site has so many (as Li et al., ICDE 2022, do), up to 100 times.
    Computed once, when it is made: memory for a number a row, and for one a site and label meanwhile. For many sites see `virtual`.
    Raises ConfigError if no draw gives every site `min_rows`, or if there are fewer rows than that anyhow.
    """
    names, codes = _codes(labels)
    _check_enough(len(codes), sites, min_rows)
    _check_alpha(alpha)
    rng = generator(seed, "partition", "dirichlet")
    by_label = [np.flatnonzero(codes == code) for code in range(len(names))]
    for _ in range(DRAWS):
        sizes = np.array([_cut(rng.dirichlet(np.full(sites, alpha)), len(rows)) for rows in by_label])
        if sizes.sum(axis=0).min() >= min_rows:
            break
    else:
        raise ConfigError(
            f"{DRAWS} draws of alpha={alpha:g} have each left one of {sites:,} sites with fewer than {min_rows:,} of {len(codes):,} rows.",
            hint="Take a larger alpha or fewer sites; min_rows=0, and leave the empty sites out; or `virtual`, whose sites may share rows.",
        )
    owner = np.empty(len(codes), np.int64)
    for rows, shares in zip(by_label, sizes, strict=True):
        owner[rng.permutation(rows)] = np.repeat(np.arange(sites), shares)
    return _Listed(owner, sites)


def shards(labels: npt.ArrayLike, sites: int, *, per_site: int = 2, seed: int = 0) -> Partition:
    """Label skew by shards (McMahan et al., AISTATS 2017, section 3): rows sorted by label are cut into sites × `per_site` pieces of one
    size, and each site gets so many of them at random. With 2, most sites have two labels.

    Disjoint and complete; where the pieces do not come out even, they differ by one row. Rows of one label are in their own order.
    Computed once, when it is made: memory for a number a row. Raises ConfigError if there are fewer rows than pieces.
    """
    _, codes = _codes(labels)
    _check_count("per_site", per_site, 1)
    _check_enough(len(codes), sites, per_site)
    pieces = sites * per_site
    dealt = generator(seed, "partition", "shards").permutation(pieces) // per_site  # piece to site
    edges = np.arange(pieces + 1) * len(codes) // pieces
    owner = np.empty(len(codes), np.int64)
    owner[np.argsort(codes, kind="stable")] = np.repeat(dealt, np.diff(edges))
    return _Listed(owner, sites)


def by_column(values: npt.ArrayLike) -> Partition:
    """The natural partition: one site for each different value, such as a writer, a device, or a hospital, in the order of the values.

    Disjoint and complete. `names` are the values by rank. Computed once, when it is made: memory for a number a row.
    Raises ConfigError if there are no rows.
    """
    names, codes = _codes(values)
    _check_enough(len(codes), 1)
    made = _Listed(codes, len(names))
    made.names = tuple(names.tolist())
    return made


def virtual(labels: npt.ArrayLike, sites: int, *, rows_per_site: int, alpha: float | None = None, seed: int = 0) -> Partition:
    """Any number of sites over one data set, a million over 60,000 rows: each draws rows of its own, so sites share rows. Neither disjoint
    nor complete.

    alpha: label skew (Hsu et al., 2019, arXiv:1909.06335, section 3): a site's mix of labels is drawn from Dir(alpha · p), p being the mix
        of the whole data set. (The paper draws without replacement from what other sites have left over, which cannot be done for one site
        by itself.) None: IID.
    A site has a row once, save where it draws more rows of a label than there are: then rows of that label come again.
    Costs an index of the rows by label to make, and as much as its rows and labels to ask for a site.
    """
    names, codes = _codes(labels)
    _check_enough(len(codes), 1)
    _check_count("sites", sites, 1)
    _check_count("rows_per_site", rows_per_site, 1)
    if alpha is not None:
        _check_alpha(alpha)
    elif rows_per_site > len(codes):
        raise ConfigError(f"rows_per_site is {rows_per_site:,}, and there are {len(codes):,} rows: a site has a row once")
    return _Drawn(codes, len(names), sites, rows_per_site, alpha, seed)


class _Listed(Partition):
    """All rows, sorted by their site: O(rows + sites) of memory."""

    def __init__(self, owner: Rows, sites: int) -> None:
        self.rows = len(owner)
        self._order = np.argsort(owner, kind="stable")
        self._edges = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=sites))])

    def __len__(self) -> int:
        return len(self._edges) - 1

    def _of(self, rank: int) -> Rows:
        return self._order[self._edges[rank] : self._edges[rank + 1]]

    @property
    def sizes(self) -> Rows:
        return np.diff(self._edges)


class _Blocks(Partition):
    """Consecutive blocks of a permutation, each computed when it is asked for. edges: shape (sites + 1,); None: all blocks the same."""

    def __init__(self, rows: int, sites: int, edges: Rows | None, key: int) -> None:
        self.rows, self._sites, self._edges = int(rows), int(sites), edges
        self._bits = max(1, ((self.rows - 1).bit_length() + 1) // 2)  # of each half
        self._keys = [np.uint64(seed_for(key, step)) for step in range(_ROUNDS)]

    def __len__(self) -> int:
        return self._sites

    def _of(self, rank: int) -> Rows:
        begin, end = (rank * self.rows // self._sites, (rank + 1) * self.rows // self._sites)
        if self._edges is not None:
            begin, end = self._edges[rank], self._edges[rank + 1]
        return np.sort(self._order[begin:end] if self.rows <= _KEPT else self._permuted(begin, end))

    @cached_property
    def _order(self) -> Rows:
        return self._permuted(0, self.rows)

    def _permuted(self, begin: int, end: int) -> Rows:
        """What stands at these places of the permutation."""
        found = self._mixed(np.arange(begin, end, dtype=np.uint64))
        while (outside := np.flatnonzero(found >= self.rows)).size:  # walk the cycle until it is back among the rows
            found[outside] = self._mixed(found[outside])
        return found.astype(np.int64)

    def _mixed(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """A permutation of the numbers below 4**bits."""
        bits, mask = np.uint64(self._bits), np.uint64((1 << self._bits) - 1)
        left, right = numbers >> bits, numbers & mask
        for key in self._keys:
            left, right = right, left ^ (_hash(right + key) & mask)
        return left << bits | right

    @property
    def sizes(self) -> Rows:
        edges = np.arange(self._sites + 1) * self.rows // self._sites if self._edges is None else self._edges
        return np.diff(edges)


class _Drawn(Partition):
    """Each site draws for itself: memory for the rows by label, none for sites."""

    def __init__(self, codes: Rows, labels: int, sites: int, rows_per_site: int, alpha: float | None, seed: int) -> None:
        self.rows, self._sites, self._rows_per_site, self._alpha, self._seed = len(codes), sites, rows_per_site, alpha, seed
        self._order = np.argsort(codes, kind="stable")
        self._sizes = np.bincount(codes, minlength=labels)
        self._edges = np.concatenate([[0], np.cumsum(self._sizes)])

    def __len__(self) -> int:
        return self._sites

    def _of(self, rank: int) -> Rows:
        rng = generator(self._seed, "partition", "virtual", rank)
        if self._alpha is None:
            return np.sort(rng.choice(self.rows, self._rows_per_site, replace=False))
        wanted = rng.multinomial(self._rows_per_site, rng.dirichlet(self._alpha * self._sizes / self.rows))
        drawn = [
            self._edges[label] + rng.choice(self._sizes[label], wanted[label], replace=bool(wanted[label] > self._sizes[label]))
            for label in np.flatnonzero(wanted)
        ]
        return np.sort(self._order[np.concatenate(drawn)])

    @property
    def sizes(self) -> Rows:
        return np.full(self._sites, self._rows_per_site)


def _hash(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Numbers with all their bits mixed: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)


def _cut(shares: npt.NDArray[np.float64], total: int) -> Rows:
    """`total` rows cut where the running sum of the shares says, rounded down: as Yurochkin et al.'s code does."""
    edges = np.concatenate([[0], (np.cumsum(shares)[:-1] * total).astype(np.int64).clip(0, total), [total]])
    return np.diff(edges)


def _apportioned(total: int, shares: npt.NDArray[np.float64]) -> Rows:
    """`total` in whole parts as near to the shares as goes: those with the largest remainders get what rounding down leaves."""
    parts = np.floor(shares * total).astype(np.int64)
    remainders = shares * total - parts
    parts[np.argsort(-remainders, kind="stable")[: total - parts.sum()]] += 1
    return parts


def _codes(labels: npt.ArrayLike) -> tuple[npt.NDArray[Any], Rows]:
    """The different labels, sorted, and each row's as a number."""
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ConfigError(f"labels have shape {array.shape}: give one label a row, shape (rows,)")
    names, codes = np.unique(array, return_inverse=True)
    return names, codes.astype(np.int64)


def _check_enough(rows: int, sites: int, each: int = 1) -> None:
    _check_count("rows", rows, 0)
    _check_count("sites", sites, 1)
    _check_count("min_rows", each, 0)
    if rows < max(1, sites * each):
        raise ConfigError(
            f"{rows:,} rows cannot be split among {sites:,} sites, {max(1, each):,} for each at least.",
            hint="Take fewer sites, or `virtual`, whose sites may share rows.",
        )


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ConfigError(f"{name} is {value!r:.80}: it must be a whole number from {least}")


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not 0 < alpha < np.inf:
        raise ConfigError(f"alpha is {alpha!r}: it must be a number above 0; 0.1 is strong skew, 100 nearly none")
