"""The weighted mean of updates: the aggregation of FedAvg (McMahan et al., AISTATS 2017, Algorithm 1)."""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import get_ident
from typing import Any, Literal, Self

import numpy as np

from hanse.aggregation.form import (
    BLOCK,
    GREATEST,
    LEAST,
    Array,
    Form,
    Kind,
    Round,
    Term,
    as_kind,
    is_finite,
    is_weight,
    pieces,
    spoilt,
    sum_dtype,
    term_of,
    weight_of,
    where_of,
)
from hanse.errors import ConfigError, UpdateRejected
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import unflatten
from hanse.messages.update import Update

PIECE = 1 << 22  # elements a thread takes at a time
_UNUSED = 3  # references to kept memory that no array is in: from the list, the loop, and the call that counts


class WeightedMean:
    """Sum of weight × tensor over the updates, divided by the sum of weights. Implements `Aggregator`.

    by: where a site's weight comes from.
        None: the `examples` in its update's meta, else the `steps`, else all count the same; all updates must give the same unit.
        "examples" or "steps": that number, which must be there. "equal": all count the same.
        A mapping: the weight of each site by name.
        A weight lies between 1e-30 and 1e30. Zero is rejected: a site without data has nothing to add.
    threads: how many share the adding of large tensors; None: OMP_NUM_THREADS, else one a core. The result has the same bits for any
        number.

    Names and shapes of an update are those of the reference; its dtypes too, or floats of another width. It may leave
    out the names it lists in `meta["excluded"]`: each name's mean is over the sites that sent it. It may send the tensors of a nested
    model by their flat names. What is no tensor (None, numbers inline) must equal the reference's; strings and bytes have no mean and
    are rejected. Without a reference, the first site in the order of names is the measure. An update without params only adds metrics.

    Sums are taken in float32 for float32 and narrower floats, else in float64; for complex numbers in complex of the same widths; for
    integers and booleans in float64. One step is `sum = round(sum + round(weight * x))`, sites in the order of their names. The result
    has the reference's dtype. Integers are rounded to nearest, half to even (exact while weighted sums stay below 2**53). A boolean is
    the weighted majority, True if both sides weigh the same.

    Metrics are averaged with the same weights, in float64. A value that is not finite (an AUC over one class) is left out of its mean.
    """

    def __init__(
        self, by: Literal["examples", "steps", "equal"] | Mapping[str, float] | None = None, *, threads: int | None = None
    ) -> None:
        if isinstance(by, Mapping):
            for site, weight in by.items():
                if not is_weight(weight):
                    raise ConfigError(f"the weight of site {site!r} is {weight!r}: it must be a number from {LEAST} to {GREATEST}")
        elif by not in (None, "examples", "steps", "equal"):
            raise ConfigError(f'by is {by!r}: it must be "examples", "steps", "equal", None or a mapping of sites to weights')
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}: it must be at least 1")
        self.by = by
        self.threads = threads
        self._held: dict[str, Term] = {}
        self._sites: set[str] = set()  # added here so far, folded or not
        self._round = Round()
        self._sums: dict[str, Array] = {}  # flat name to running sum, shape (elements,)
        self._weights: dict[str, float] = {}  # flat name to the sum of its weights
        self._metrics: dict[str, tuple[float, float]] = {}  # name to weighted sum and sum of weights
        self._result: FLModel | None = None

    def fresh(self, reference: FLModel | None = None) -> Self:
        new = type(self)(self.by, threads=self.threads)
        if reference is not None and reference.params is not None:
            new._round.form = Form.of(reference)
        return new

    def add(self, update: Update) -> None:
        self._must_be_open()
        where = where_of(update)
        if update.site in self._sites:
            raise UpdateRejected(f"{where}: an update of this site is counted already.", hint="Add one update a site and round.")
        unit, weight = self._weight(update, where)
        term = term_of(update, where, unit, weight)
        if update.model.params is not None and self._round.form is not None:
            self._round.form.check(term)
        self._held[update.site] = term
        self._sites.add(update.site)

    def fold(self) -> dict[str, UpdateRejected]:
        self._must_be_open()
        rejected: dict[str, UpdateRejected] = {}
        terms: list[Term] = []
        for site, term in sorted(self._held.items()):
            try:
                self._round.join(term)
                terms.append(term)
            except UpdateRejected as refusal:
                rejected[site] = refusal
        self._held = {}
        # A sum that starts here is checked once for all updates, and begun again if it is spoilt. A sum that was there before could
        # not be restored, so what is added to it is checked first.
        starts = not self._sums
        if not (starts and self._sum(terms)):
            if starts:
                self._sums = {}
            for term in list(terms):
                if (error := spoilt(term)) is not None:
                    terms.remove(term)
                    rejected[term.site] = error
            self._sum(terms)
        for term in terms:
            self._count(dict.fromkeys(term.arrays, term.weight), {k: (term.weight * v, term.weight) for k, v in term.metrics.items()})
        return rejected

    def partial(self) -> FLModel:
        """The sums so far by flat name, with weights and form in `meta`. Arrays share memory with the running sums: copy them at once."""
        form, kinds = self._round.form, self._round.kinds
        return FLModel(
            params={name: total.reshape(kinds[name].shape) for name, total in self._sums.items()} or None,
            params_type=self._round.params_type or ParamsType.FULL,
            meta={
                "site": self._round.site,
                "unit": self._round.unit,
                "structure": form.structure if form else None,
                "tensors": {name: [kinds[name].dtype.name, self._weights[name]] for name in self._sums},
                "excluded": [name for name in [*kinds, *(form.later if form else ())] if name not in self._sums],
                "metrics": {name: list(sums) for name, sums in self._metrics.items()},
            },
        )

    def merge(self, partial: FLModel) -> None:
        self._must_be_open()
        meta = partial.meta
        if meta["site"] is None:  # nothing was folded there
            return
        term = Term(meta["site"], f"site {meta['site']!r} and those summed with it", meta["unit"], partial.params_type)
        if partial.params is not None:
            term.arrays, term.structure = dict(partial.params), meta["structure"]
            term.kinds = {name: Kind(array.shape, np.dtype(meta["tensors"][name][0])) for name, array in term.arrays.items()}
            term.excluded = frozenset(meta["excluded"])
        self._round.join(term)
        self._sum([term])
        self._count(
            {name: weight for name, (_, weight) in meta["tensors"].items()},
            {name: (total, weight) for name, (total, weight) in meta["metrics"].items()},
        )

    def result(self) -> FLModel:
        """The mean: `params` in the reference's form, or by flat names where no site sent some of them; `metrics` averaged.

        The running sums become the result, without a copy where dtypes agree. Raises UpdateRejected if a sum overflows.
        """
        if self._result is not None:
            return self._result
        for rejected in self.fold().values():
            raise rejected
        params = None
        if self._sums and self._round.form is not None:
            form = self._round.form
            for name in self._sums:
                self._divide(name)
            arrays = {name: as_kind(self._sums.pop(name), kind) for name, kind in form.kinds.items() if name in self._sums}
            params = unflatten(arrays, form.structure) if len(arrays) == len(form.kinds) else arrays
        metrics = {name: total / weight for name, (total, weight) in self._metrics.items()}
        self._result = FLModel(params=params, params_type=self._round.params_type or ParamsType.FULL, metrics=metrics)
        return self._result

    def _must_be_open(self) -> None:
        if self._result is not None:
            raise ConfigError("this mean has given its result: nothing can be added to it.", hint="Take a fresh() one.")

    def _weight(self, update: Update, where: str) -> tuple[str, float]:
        """The unit and number that `update` counts with."""
        if not isinstance(self.by, Mapping):
            return weight_of(update, self.by, where)
        if update.site not in self.by:
            raise UpdateRejected(f"{where}: no weight is given for this site.", hint="Name every site in WeightedMean(by={...}).")
        return "given", float(self.by[update.site])

    def _count(self, weights: Mapping[str, float], metrics: Mapping[str, tuple[float, float]]) -> None:
        for name, weight in weights.items():
            self._weights[name] = self._weights.get(name, 0.0) + weight
        for name, (total, weight) in metrics.items():
            before = self._metrics.get(name, (0.0, 0.0))
            self._metrics[name] = (before[0] + total, before[1] + weight)

    def _sum(self, terms: Sequence[Term]) -> bool:
        """Add the terms to the running sums, in their order. False if a sum that starts here is not finite; all are added even so."""
        jobs: list[tuple[Array, list[tuple[Any, Array]], bool]] = []
        for name in dict.fromkeys(name for term in terms for name in term.arrays):
            starts = name not in self._sums
            if starts:
                kind = self._round.kinds[name]
                self._sums[name] = untouched(math.prod(kind.shape), sum_dtype(kind.dtype) or kind.dtype)
            total = self._sums[name]
            real = total.real.dtype.type
            parts = [(real(term.weight), term.arrays[name].reshape(-1)) for term in terms if name in term.arrays]
            jobs += [(total[piece], [(weight, array[piece]) for weight, array in parts], starts) for piece in pieces(total, PIECE)]
        return self._share(_add, jobs)

    def _divide(self, name: str) -> None:
        """Make the running sum of `name` its mean, in place."""
        total = self._sums[name]
        weight = total.real.dtype.type(self._weights[name])
        jobs = [(total[piece], weight) for piece in pieces(total, PIECE)]
        if not self._share(_divide, jobs):
            raise UpdateRejected(
                f"the weighted sum of tensor {name!r} over site {self._round.site!r} and the others overflows {total.dtype}.",
                hint="Each update is finite, but its numbers times its weight are too large: use smaller weights, or clip.",
            )

    def _share(self, function: Callable[..., bool], jobs: Sequence[tuple[Any, ...]]) -> bool:
        """Whether `function` is true of all jobs; does all of them, on several threads if that is worth it."""
        threads = self.threads or default_threads()
        if threads == 1 or sum(job[0].size for job in jobs) <= PIECE:
            return all([function(*job) for job in jobs])  # a list, so that none is left undone
        with ThreadPoolExecutor(threads) as pool:
            return all(pool.map(lambda job: function(*job), jobs))


_large: list[mmap.mmap] = []  # memory of large sums, kept to be used again: the first touch of a page takes longer than all adding to it


def untouched(elements: int, dtype: np.dtype[Any]) -> Array:
    """Memory for a sum, its numbers arbitrary. Large ones in small pages: on a virtual machine the first touch of the huge pages that
    NumPy asks for takes up to five times as long."""
    size = elements * dtype.itemsize
    if size < 4 << 20:
        return np.empty(elements, dtype)
    for memory in _large:
        if len(memory) == size and sys.getrefcount(memory) == _UNUSED:  # every array in it holds a reference
            return np.frombuffer(memory, dtype)
    _large.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return np.frombuffer(_large[-1], dtype)


def free_memory() -> None:
    """Give back the memory that is kept for large sums; what is in use goes with its last array."""
    _large.clear()


def default_threads() -> int:
    """As many as a process computes with."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _scratch(dtype: np.dtype[Any], thread: int) -> Array:
    """A block that one thread may use, made once: memory that was touched before is quicker."""
    return np.empty(BLOCK, dtype)


def _add(total: Array, parts: Sequence[tuple[Any, Array]], starts: bool) -> bool:
    """Add weight × array for each of `parts` to `total`, or start it with them. False if it was started and is not finite.

    All parts of a block before the next block, so that each update is read once and the sum stays in the cache.
    """
    finite = True
    scratch = _scratch(total.dtype, get_ident())
    with np.errstate(all="ignore"):
        for block in pieces(total, BLOCK):
            into = total[block]
            product = scratch[: into.size]
            for index, (weight, array) in enumerate(parts):
                if starts and index == 0:
                    np.multiply(array[block], weight, out=into, dtype=into.dtype)
                elif weight == 1 and array.dtype == into.dtype:  # as for a partial sum
                    np.add(into, array[block], out=into)
                else:
                    np.multiply(array[block], weight, out=product, dtype=into.dtype)
                    np.add(into, product, out=into)
            if starts:
                finite = is_finite(into) and finite
    return finite


def _divide(total: Array, weight: Any) -> bool:
    """Divide `total` by `weight` in place. Whether it is finite then."""
    finite = True
    with np.errstate(all="ignore"):
        for block in pieces(total, BLOCK):
            np.divide(total[block], weight, out=total[block])
            finite = is_finite(total[block]) and finite
    return finite
