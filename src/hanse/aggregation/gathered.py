"""Updates of a round side by side: for rules that look at all of them at once, such as a median.

Nothing is summed as it comes, so a partial is the updates themselves. Their tensors stay where they are: in the sites' mapped files, or in
an unnamed file of this process once their own memory is needed again. A rule reads them block by block, so beside the result a few blocks
are in memory, whatever the number of sites.
"""

from __future__ import annotations

import copy
import errno
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Self, TypeVar

import numpy as np
import threadpoolctl  # type: ignore[import-untyped]

from hanse.aggregation.form import (
    Array,
    Form,
    Kind,
    Round,
    Term,
    as_real,
    is_float,
    kinds_of,
    pieces,
    spoilt,
    term_of,
    weight_of,
    where_of,
)
from hanse.aggregation.mean import PIECE, WeightedMean, default_threads
from hanse.errors import ConfigError, StorageFull, TooFewUpdates, UpdateRejected
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.lasting import LastingMap, lasting_map
from hanse.messages.params import flatten, unflatten
from hanse.messages.task import TaskId
from hanse.messages.update import Update

T = TypeVar("T")

SCRATCH = 1 << 18
"""Elements of all sites together that a rule looks at at a time: 1 MiB of float32, so that they stay in the cache."""
IN_MEMORY_BYTES = 16 << 20
"""So much of the updates is kept in memory; what comes after that goes to a file."""
MAPS = 256
"""So many files stay mapped where they are, as each holds a descriptor; what comes after that is copied."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class Stack:
    """The updates of a round. Sites are in the order of their names.

    rows: for each tensor its values by site, flat; a site that left the tensor out is not there.
    kinds: what each tensor is in the result. reference: the task's model, flat; empty if it has no params.
    """

    params_type: ParamsType
    sites: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Array]]
    kinds: Mapping[str, Kind]
    reference: Mapping[str, Array]

    def known_origin(self) -> Mapping[str, Array]:
        """What may be subtracted from the rows to have smaller numbers, the same distances: the task's model, if it is known."""
        known = self.params_type is ParamsType.FULL and self.rows.keys() <= self.reference.keys()
        return self.reference if known else {}

    def origin(self, rule: str) -> Mapping[str, Array]:
        """What to subtract from the rows to have the changes the sites made; empty for DIFF. Raises ConfigError if it is not known."""
        if self.params_type is ParamsType.DIFF:
            return {}
        if missing := self.rows.keys() - self.reference.keys():
            raise ConfigError(
                f"{rule}: the sites sent FULL, and tensor {min(missing)!r} of the model they started from is not known.",
                hint="Give the recipe a first model, or send DIFF.",
            )
        return self.reference


class Gathered:
    """Implements all of `Aggregator` but the rule: `_combine`.

    Every site counts the same, whatever it says of its examples; only metrics are weighed, by `examples`, else `steps`, and all the same
    if sites tell different ones. What an update must be is as `WeightedMean` says. Where sites disagree on FULL or DIFF, what most of
    them sent counts; the others are left out and named in the result's `meta["left_out"]`.

    Raises TooFewUpdates, from `result`, for fewer updates than `needs`.
    """

    same_names: ClassVar[bool] = False
    """Whether the rule needs the same tensors from every site: then what most sites sent counts, and the others are left out."""

    def __init__(self) -> None:
        self._begin(None)

    @property
    def needs(self) -> int:
        """How many updates it needs at least."""
        return 1

    def _combine(self, stack: Stack) -> tuple[dict[str, Array], dict[str, Any]]:
        """The tensors of the result, in the shapes and dtypes of `stack.kinds`, and what to say about them in its meta."""
        raise NotImplementedError

    def fresh(self, reference: FLModel | None = None) -> Self:
        new = copy.copy(self)
        new._begin(reference)
        return new

    def _begin(self, reference: FLModel | None) -> None:
        self._held: dict[str, Term] = {}
        self._kept: dict[str, _Kept] = {}
        self._shelf = _Shelf()
        self._round = Round()
        self._reference: dict[str, Array] = {}
        self._result: FLModel | None = None
        if reference is not None and reference.params is not None:
            self._round.form = Form.of(reference)
            self._reference = flatten(reference.params)[0]

    def add(self, update: Update) -> None:
        self._must_be_open()
        where = where_of(update)
        if update.site in self._held or update.site in self._kept:
            raise UpdateRejected(f"{where}: an update of this site is counted already.", hint="Add one update a site and round.")
        unit, weight = weight_of(update, None, where)
        term = term_of(update, where, unit, weight)
        if update.model.params is not None and self._round.form is not None:
            self._round.form.check(term)
        self._held[update.site] = term

    def fold(self) -> dict[str, UpdateRejected]:
        return self._take(self._shelf.keep)

    def _take(self, keep: Callable[[Array], _Place]) -> dict[str, UpdateRejected]:
        """Move the updates added so far to those kept, tensor by tensor with `keep`. Returns those left out."""
        self._must_be_open()
        rejected: dict[str, UpdateRejected] = {}
        for site, term in sorted(self._held.items()):
            try:
                if (error := spoilt(term)) is not None:
                    raise error
                if term.arrays:
                    self._round.fit(term)
            except UpdateRejected as refusal:
                rejected[site] = refusal
                continue
            self._kept[site] = _Kept.of(term, keep)
        self._held = {}
        return rejected

    def partial(self) -> FLModel:
        """The updates folded so far, each site's tensors by flat name."""
        form, kinds = self._round.form, self._round.kinds
        known = [*kinds, *(form.later if form else ())]
        return FLModel(
            params={site: {name: self._shelf.read(place) for name, place in kept.places.items()} for site, kept in self._kept.items()},
            meta={
                "structure": form.structure if form else None,
                "sites": {
                    site: {
                        "params_type": kept.params_type.value,
                        "unit": kept.unit,
                        "weight": kept.weight,
                        "metrics": dict(kept.metrics),
                        "excluded": [name for name in known if name not in kept.places] if kept.places else [],
                    }
                    for site, kept in self._kept.items()
                },
            },
        )

    def merge(self, partial: FLModel) -> None:
        self._must_be_open()
        terms = []
        for site, about in partial.meta["sites"].items():
            term = Term(site, f"site {site!r}", about["unit"], ParamsType(about["params_type"]), about["weight"], about["metrics"])
            term.arrays = partial.params[site]
            if term.arrays:
                term.structure, term.excluded = partial.meta["structure"], frozenset(about["excluded"])
                term.kinds = kinds_of(term.arrays, None)
                self._round.fit(term)
            terms.append(term)
        for term in terms:
            self._kept[term.site] = _Kept.of(term, self._shelf.keep)

    def result(self) -> FLModel:
        """The combined update; its `params` are in the reference's form, or by flat names where no site sent some of them."""
        if self._result is not None:
            return self._result
        for rejected in self._take(lambda array: array).values():
            raise rejected
        self._result = FLModel(metrics=self._metrics())
        form, stack = self._round.form, self._stack()
        if stack is not None and form is not None:
            if len(stack.sites) < self.needs:
                raise TooFewUpdates(
                    f"{type(self).__name__} needs at least {self.needs} updates of one kind; there are {len(stack.sites)}.",
                    reasons={},
                    hint="Ask more sites, or let it withstand fewer hostile ones.",
                )
            arrays, meta = self._combine(stack)
            if left_out := [site for site, kept in sorted(self._kept.items()) if kept.places and site not in stack.sites]:
                meta["left_out"] = left_out
            whole = len(arrays) == len(form.kinds)
            params = unflatten({name: arrays[name] for name in form.kinds}, form.structure) if whole else arrays
            self._result = FLModel(params, stack.params_type, metrics=self._result.metrics, meta=meta)
        self._kept, self._shelf = {}, _Shelf()
        return self._result

    def _must_be_open(self) -> None:
        if self._result is not None:
            raise ConfigError(f"this {type(self).__name__} has given its result: nothing can be added to it.", hint="Take a fresh() one.")

    def _stack(self) -> Stack | None:
        """What is combined; None if no update brought params."""
        with_params = {site: kept for site, kept in sorted(self._kept.items()) if kept.places}
        if not with_params:
            return None
        sorts = {site: (kept.params_type, frozenset(kept.places) if self.same_names else None) for site, kept in with_params.items()}
        [(most, _)] = Counter(sorts.values()).most_common(1)
        used = {site: kept for site, kept in with_params.items() if sorts[site] == most}
        rows = {
            name: {site: self._shelf.read(kept.places[name]).reshape(-1) for site, kept in used.items() if name in kept.places}
            for name in self._round.kinds
        }
        rows = {name: by_site for name, by_site in rows.items() if by_site}
        return Stack(most[0], tuple(used), rows, {name: self._round.kinds[name] for name in rows}, self._reference)

    def _metrics(self) -> dict[str, float]:
        one_unit = len({kept.unit for kept in self._kept.values()}) <= 1
        sums: dict[str, tuple[float, float]] = {}
        for _, kept in sorted(self._kept.items()):
            weight = kept.weight if one_unit else 1.0
            for name, value in kept.metrics.items():
                total, weights = sums.get(name, (0.0, 0.0))
                sums[name] = total + weight * value, weights + weight
        return {name: total / weights for name, (total, weights) in sums.items()}


@dataclass(frozen=True)
class _OnShelf:
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


_Place = Array | _OnShelf


@dataclass(frozen=True)
class _Kept:
    """One update, its tensors where they are."""

    params_type: ParamsType
    unit: str
    weight: float
    metrics: Mapping[str, float]
    places: Mapping[str, _Place]

    @classmethod
    def of(cls, term: Term, keep: Callable[[Array], _Place]) -> _Kept:
        places = {name: keep(array) for name, array in term.arrays.items()}
        return cls(term.params_type, term.unit, term.weight, term.metrics, places)


class _Shelf:
    """Keeps tensors whose memory will be used again: those of blobs where they are, a few in memory, the rest in an unnamed file."""

    def __init__(self) -> None:
        self._maps: set[LastingMap] = set()
        self._in_memory = 0
        self._file: IO[bytes] | None = None
        self._size = 0
        self._map: mmap.mmap | None = None

    def keep(self, array: Array) -> _Place:
        """Raises StorageFull if there is no room for it."""
        owner = lasting_map(array)
        if owner is not None and (owner in self._maps or len(self._maps) < MAPS):
            self._maps.add(owner)
            return array
        if self._in_memory + array.nbytes <= IN_MEMORY_BYTES:
            self._in_memory += array.nbytes
            return array.copy()
        offset = self._size + -self._size % _ALIGNMENT
        left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._size = offset + left.nbytes
        try:
            self._file = self._file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, it lives as long as this
            while left.nbytes:
                written = os.pwrite(self._file.fileno(), left, self._size - left.nbytes)
                left = left[written:]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise StorageFull(
                f"no room in {tempfile.gettempdir()} for the updates of a round, of which {self._size:,} bytes are kept there.",
                hint="Make room, or name another folder in TMPDIR.",
            ) from error
        return _OnShelf(offset, array.shape, array.dtype)

    def read(self, place: _Place) -> Array:
        if not isinstance(place, _OnShelf):
            return place
        assert self._file is not None
        if self._map is None or len(self._map) < self._size:
            self._map = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
        count = int(np.prod(place.shape))
        return np.frombuffer(self._map, place.dtype, count, place.offset).reshape(place.shape)


# Kernels over the rows of a stack. S = sites, B = elements of a block


def shared(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """What `function` gives for each of the jobs, in their order, on several threads if there are several jobs."""
    if (threads := min(default_threads(), len(jobs))) <= 1:
        yield from (function(*job) for job in jobs)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda job: function(*job), jobs)


def block_elements(sites: int) -> int:
    """B: how many elements of each site make a block."""
    return max(512, SCRATCH // sites)


def squared_norms(stack: Stack, origin: Mapping[str, Array]) -> Array:
    """‖Δ‖² of each site's change over the floating-point tensors, float64, shape (S,). `origin` is subtracted from the rows."""
    return _sum_of_blocks(stack, origin, lambda block: np.einsum("sb,sb->s", block, block), (len(stack.sites),))


def squared_distances(stack: Stack, origin: Mapping[str, Array]) -> Array:
    """‖Δ_i - Δ_j‖² of each two sites over the floating-point tensors, float64, shape (S, S), at most 1e300.

    They come of inner products. An error is at most some 1e-16 of the two sites' own ‖Δ‖², whatever the other sites send; where there is an
    `origin`, subtracting it keeps these small.
    """
    count = len(stack.sites)
    with threadpoolctl.threadpool_limits(1, user_api="blas"):  # several threads here share the blocks
        inner = _sum_of_blocks(stack, origin, lambda block: block @ block.T, (count, count))
    squares = np.diagonal(inner)
    with np.errstate(all="ignore"):
        distances = np.nan_to_num(squares[:, None] + squares - 2 * inner, nan=1e300, posinf=1e300).clip(0, 1e300)
    np.fill_diagonal(distances, 0)
    return np.asarray((distances + distances.T) / 2)


def _sum_of_blocks(stack: Stack, origin: Mapping[str, Array], of: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """The sum of `of` (float64, shape (S, B)) over all blocks of the floating-point tensors.

    Blocks are added up piece by piece, then the pieces in their order: the bits are the same for any number of threads.
    """
    count = len(stack.sites)
    jobs: list[tuple[list[Array], Array | None, slice]] = []
    for name, by_site in stack.rows.items():
        dtype = stack.kinds[name].dtype
        if is_float(dtype) or dtype.kind == "c":
            rows = [as_real(row) for row in by_site.values()]
            minus = as_real(origin[name].reshape(-1)) if name in origin else None
            jobs += [(rows, minus, piece) for piece in pieces(rows[0], PIECE)]

    def of_piece(rows: list[Array], minus: Array | None, piece: slice) -> Array:
        total = np.zeros(shape)
        end = min(piece.stop, rows[0].size)
        size = block_elements(2 * count)
        scratch = np.empty((count, min(size, end - piece.start)))
        for low in range(piece.start, end, size):
            block = slice(low, min(low + size, end))
            part = scratch[:, : block.stop - low]
            for row, into in zip(rows, part, strict=True):
                into[:] = row[block]
                if minus is not None:
                    into -= minus[block]
            with np.errstate(all="ignore"):
                total += of(part)
        return total

    return sum(shared(of_piece, jobs), start=np.zeros(shape))


def weighted(stack: Stack, weights: Mapping[str, float]) -> dict[str, Array]:
    """The weighted mean of the sites in `weights`, which all sent the same tensors, in the shapes and dtypes of `stack.kinds`."""
    kinds = FLModel({name: np.broadcast_to(np.zeros((), kind.dtype), kind.shape) for name, kind in stack.kinds.items()})
    mean = WeightedMean(weights).fresh(kinds)
    for site in weights:
        arrays = {name: rows[site].reshape(stack.kinds[name].shape) for name, rows in stack.rows.items()}
        mean.add(Update(site, TaskId("", 0, 0, site), FLModel(arrays)))
    return dict(mean.result().params)
