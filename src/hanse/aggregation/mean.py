"""The weighted mean of updates: the aggregation of FedAvg (McMahan et al., AISTATS 2017, Algorithm 1)."""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from threading import get_ident
from typing import Any, Literal, NamedTuple, Self

import ml_dtypes  # noqa: F401, without it np.dtype("bfloat16") is not known
import numpy as np

from hanse.errors import ConfigError, UpdateRejected
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import flatten, unflatten
from hanse.messages.update import Update

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 1 << 16  # elements added at a time: 256 KiB of float32, so that what is added and its sum stay in the cache
PIECE = 1 << 22  # elements a thread takes at a time
_UNUSED = 3  # references to kept memory that no array is in: from the list, the loop, and the call that counts
LEAST, GREATEST = 1e-30, 1e30  # of a weight, so that neither it nor the sum of many leaves float32


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
                if not _is_weight(weight):
                    raise ConfigError(f"the weight of site {site!r} is {weight!r}: it must be a number from {LEAST} to {GREATEST}")
        elif by not in (None, "examples", "steps", "equal"):
            raise ConfigError(f'by is {by!r}: it must be "examples", "steps", "equal", None or a mapping of sites to weights')
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}: it must be at least 1")
        self.by = by
        self.threads = threads
        self._held: dict[str, _Term] = {}
        self._sites: set[str] = set()  # added here so far, folded or not
        self._round = _Round()
        self._sums: dict[str, Array] = {}  # flat name to running sum, shape (elements,)
        self._weights: dict[str, float] = {}  # flat name to the sum of its weights
        self._metrics: dict[str, tuple[float, float]] = {}  # name to weighted sum and sum of weights
        self._result: FLModel | None = None

    def fresh(self, reference: FLModel | None = None) -> Self:
        new = type(self)(self.by, threads=self.threads)
        if reference is not None and reference.params is not None:
            arrays, structure = flatten(reference.params)
            new._round.form = _Form("the task's model", structure, _kinds(arrays, structure))
        return new

    def add(self, update: Update) -> None:
        self._must_be_open()
        model = update.model
        where = f"site {update.site!r}, round {(update.task_id.commit if model.current_round is None else model.current_round) + 1}"
        if update.failure is not None:
            raise UpdateRejected(f"{where}: the site could not do its task: {update.failure}")
        if update.site in self._sites:
            raise UpdateRejected(f"{where}: an update of this site is counted already.", hint="Add one update a site and round.")
        unit, weight = self._weight(update, where)
        term = _Term(update.site, where, unit, model.params_type, weight=weight, metrics=_usable_metrics(model, weight, where))
        if model.params is not None:
            term.arrays, term.structure = flatten(model.params)
            term.kinds = _kinds(term.arrays, term.structure)
            term.excluded = excluded_names(model, where)
            for name, kind in term.kinds.items():
                if sum_dtype(kind.dtype) is None:
                    raise UpdateRejected(
                        f"{where}: tensor {name!r} has dtype {kind.dtype.name}, of which there is no mean.",
                        hint="Leave it out with the filter Exclude.",
                    )
            if self._round.form is not None:
                self._round.form.check(term)
        self._held[update.site] = term
        self._sites.add(update.site)

    def fold(self) -> dict[str, UpdateRejected]:
        self._must_be_open()
        rejected: dict[str, UpdateRejected] = {}
        terms: list[_Term] = []
        for site, term in sorted(self._held.items()):
            try:
                self._round.join(term)
                terms.append(term)
            except UpdateRejected as error:
                rejected[site] = error
        self._held = {}
        # A sum that starts here is checked once for all updates, and begun again if it is spoilt. A sum that was there before could
        # not be restored, so what is added to it is checked first.
        starts = not self._sums
        if not (starts and self._sum(terms)):
            if starts:
                self._sums = {}
            for term in list(terms):
                if (name := _not_finite(term.arrays)) is not None:
                    terms.remove(term)
                    rejected[term.site] = UpdateRejected(
                        f"{term.where}: tensor {name!r} holds NaN or inf.",
                        hint="Training diverged there: lower the learning rate or clip the gradients.",
                    )
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
        term = _Term(meta["site"], f"site {meta['site']!r} and those summed with it", meta["unit"], partial.params_type)
        if partial.params is not None:
            term.arrays, term.structure = dict(partial.params), meta["structure"]
            term.kinds = {name: _Kind(array.shape, np.dtype(meta["tensors"][name][0])) for name, array in term.arrays.items()}
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
            arrays = {name: _as_kind(self._sums.pop(name), kind) for name, kind in form.kinds.items() if name in self._sums}
            params = unflatten(arrays, form.structure) if len(arrays) == len(form.kinds) else arrays
        metrics = {name: total / weight for name, (total, weight) in self._metrics.items()}
        self._result = FLModel(params=params, params_type=self._round.params_type or ParamsType.FULL, metrics=metrics)
        return self._result

    def _must_be_open(self) -> None:
        if self._result is not None:
            raise ConfigError("this mean has given its result: nothing can be added to it.", hint="Take a fresh() one.")

    def _weight(self, update: Update, where: str) -> tuple[str, float]:
        """The unit and number that `update` counts with."""
        by, meta = self.by, update.model.meta
        if isinstance(by, Mapping):
            if update.site not in by:
                raise UpdateRejected(f"{where}: no weight is given for this site.", hint="Name every site in WeightedMean(by={...}).")
            return "given", float(by[update.site])
        unit: str = by or next((unit for unit in ("examples", "steps") if meta.get(unit) is not None), "equal")
        if unit == "equal":
            return unit, 1.0
        weight = meta.get(unit)
        if weight is None:
            raise UpdateRejected(f"{where}: its meta has no {unit!r}.", hint=f'Send FLModel(..., meta={{"{unit}": n}}).')
        if not _is_weight(weight):
            raise UpdateRejected(
                f"{where}: its weight is {weight!r} {unit}.",
                hint=f"It must be a number from {LEAST} to {GREATEST}; a site without data should not answer, or raise.",
            )
        return unit, float(weight)

    def _count(self, weights: Mapping[str, float], metrics: Mapping[str, tuple[float, float]]) -> None:
        for name, weight in weights.items():
            self._weights[name] = self._weights.get(name, 0.0) + weight
        for name, (total, weight) in metrics.items():
            before = self._metrics.get(name, (0.0, 0.0))
            self._metrics[name] = (before[0] + total, before[1] + weight)

    def _sum(self, terms: Sequence[_Term]) -> bool:
        """Add the terms to the running sums, in their order. False if a sum that starts here is not finite; all are added even so."""
        jobs: list[tuple[Array, list[tuple[Any, Array]], bool]] = []
        for name in dict.fromkeys(name for term in terms for name in term.arrays):
            starts = name not in self._sums
            if starts:
                kind = self._round.kinds[name]
                self._sums[name] = _untouched(math.prod(kind.shape), sum_dtype(kind.dtype) or kind.dtype)
            total = self._sums[name]
            real = total.real.dtype.type
            parts = [(real(term.weight), term.arrays[name].reshape(-1)) for term in terms if name in term.arrays]
            jobs += [(total[piece], [(weight, array[piece]) for weight, array in parts], starts) for piece in _pieces(total, PIECE)]
        return self._share(_add, jobs)

    def _divide(self, name: str) -> None:
        """Make the running sum of `name` its mean, in place."""
        total = self._sums[name]
        weight = total.real.dtype.type(self._weights[name])
        jobs = [(total[piece], weight) for piece in _pieces(total, PIECE)]
        if not self._share(_divide, jobs):
            raise UpdateRejected(
                f"the weighted sum of tensor {name!r} over site {self._round.site!r} and the others overflows {total.dtype}.",
                hint="Each update is finite, but its numbers times its weight are too large: use smaller weights, or clip.",
            )

    def _share(self, function: Callable[..., bool], jobs: Sequence[tuple[Any, ...]]) -> bool:
        """Whether `function` is true of all jobs; does all of them, on several threads if that is worth it."""
        threads = self.threads or _default_threads()
        if threads == 1 or sum(job[0].size for job in jobs) <= PIECE:
            return all([function(*job) for job in jobs])  # a list, so that none is left undone
        with ThreadPoolExecutor(threads) as pool:
            return all(pool.map(lambda job: function(*job), jobs))


def excluded_names(model: FLModel, where: str) -> frozenset[str]:
    """The names in `meta["excluded"]`, of tensors left out on purpose. Raises UpdateRejected, beginning with `where`, if it is no list."""
    names = model.meta.get("excluded", [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UpdateRejected(f'{where}: meta["excluded"] is {names!r:.80}.', hint="It must be a list of tensor names.")
    return frozenset(names)


class _Kind(NamedTuple):
    """What a tensor is. A `bytes` value has dtype S0, though it travels as uint8."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(slots=True)
class _Term:
    """One update, or one partial sum, as it is added."""

    site: str
    where: str  # for messages
    unit: str
    params_type: ParamsType
    weight: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    kinds: Mapping[str, _Kind] = field(default_factory=dict)
    structure: Any = None
    excluded: frozenset[str] = frozenset()  # names it may lack


@dataclass(slots=True)
class _Form:
    """The tensors that every update of a round has. `whose`, for messages. `later`: names known, of a kind not yet seen."""

    whose: str
    structure: Any
    kinds: dict[str, _Kind]
    later: Sequence[str] = ()

    def check(self, term: _Term) -> None:
        if term.structure is not None and term.structure != self.structure:
            raise UpdateRejected(
                f"{term.where}: its params are nested in another way than in {self.whose}, or numbers that are no arrays differ.",
                hint="Keep the form of the params received, and send numbers that change as arrays.",
            )
        missing = [name for name in self.kinds if name not in term.kinds and name not in term.excluded]
        if missing:
            raise UpdateRejected(
                f"{term.where}: {len(missing)} of {len(self.kinds)} tensors of {self.whose} are missing, the first is {missing[0]!r}.",
                hint='Send every tensor, or list those left out in meta["excluded"], as the filter Exclude does.',
            )
        for name, kind in term.kinds.items():
            if name not in self.kinds:
                if name in self.later:
                    continue
                raise UpdateRejected(f"{term.where}: tensor {name!r} is not in {self.whose}.", hint="Send the tensors received, no others.")
            expected = self.kinds[name]
            if kind.shape != expected.shape:
                raise UpdateRejected(f"{term.where}: tensor {name!r} has shape {kind.shape}, in {self.whose} it is {expected.shape}.")
            if kind.dtype != expected.dtype and not (_is_float(kind.dtype) and _is_float(expected.dtype)):
                raise UpdateRejected(
                    f"{term.where}: tensor {name!r} has dtype {kind.dtype}, in {self.whose} it is {expected.dtype}.",
                    hint=f"Send it as {expected.dtype}.",
                )


@dataclass(slots=True)
class _Round:
    """What the updates of one round share. The first site in the order of names sets what the reference does not."""

    site: str | None = None
    unit: str | None = None
    params_type: ParamsType | None = None
    form: _Form | None = None

    @property
    def kinds(self) -> dict[str, _Kind]:
        return self.form.kinds if self.form else {}

    def join(self, term: _Term) -> None:
        """Raises UpdateRejected, and changes nothing, if `term` does not go with those before."""
        if self.unit not in (None, term.unit):
            raise UpdateRejected(
                f"{term.where}: it is weighed by {term.unit!r}, that of site {self.site!r} by {self.unit!r}.",
                hint='Give every site\'s FLModel the same key in meta, or choose WeightedMean(by="equal").',
            )
        if term.arrays:
            if self.params_type not in (None, term.params_type):
                raise UpdateRejected(
                    f"{term.where}: its params are {term.params_type}, those of site {self.site!r} are {self.params_type}.",
                    hint="Send FULL from every site, or DIFF from every site.",
                )
            if self.form is None:
                self.form = _Form(f"the update of site {term.site!r}", term.structure, {}, sorted(term.excluded | term.kinds.keys()))
            self.form.check(term)
            self.form.kinds.update((name, kind) for name, kind in term.kinds.items() if name not in self.form.kinds)
            self.params_type = term.params_type
        self.site, self.unit = self.site or term.site, term.unit


def _kinds(arrays: Mapping[str, Array], structure: Any) -> dict[str, _Kind]:
    kinds = {name: _Kind(array.shape, array.dtype) for name, array in arrays.items()}
    if structure is not None:
        kinds |= {name: _Kind(kinds[name].shape, np.dtype("S0")) for name in _bytes_names(structure["tree"])}
    return kinds


def _bytes_names(node: Any) -> Iterator[str]:
    """The names of the tensors that stand for `bytes` in a structure; see `hanse.messages.params`."""
    if isinstance(node, list):
        for item in node:
            yield from _bytes_names(item)
    elif isinstance(node, dict):
        [(kind, content)] = node.items()
        if kind == "bytes":
            yield content
        elif kind in ("tuple", "dict"):
            yield from _bytes_names(content if kind == "tuple" else list(content.values()))


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool) and bool(LEAST <= value <= GREATEST)


def _usable_metrics(model: FLModel, weight: float, where: str) -> dict[str, float]:
    """The metrics whose weighted sum over any number of sites is a finite float64."""
    metrics = {}
    for name, value in model.metrics.items():
        try:
            metrics[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            raise UpdateRejected(f"{where}: metric {name!r} is {value!r:.80}.", hint="It must be a number.") from None
    return {name: value for name, value in metrics.items() if abs(value) * weight < 1e300}


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.name.startswith(("float", "bfloat"))  # ml_dtypes' floats have kind V


@cache
def sum_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype in which tensors of `dtype` are summed; None if they are no numbers."""
    if _is_float(dtype):
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    if dtype.kind == "c":
        return np.dtype(np.complex64 if dtype.itemsize <= 8 else np.complex128)
    return np.dtype(np.float64) if dtype.kind in "iub" else None


_large: list[mmap.mmap] = []  # memory of large sums, kept to be used again: the first touch of a page takes longer than all adding to it


def _untouched(elements: int, dtype: np.dtype[Any]) -> Array:
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


def _pieces(array: Array, elements: int) -> list[slice]:
    return [slice(low, low + elements) for low in range(0, array.size, elements)]


def _default_threads() -> int:
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
        for block in _pieces(total, BLOCK):
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
                finite = _is_finite(into) and finite
    return finite


def _divide(total: Array, weight: Any) -> bool:
    """Divide `total` by `weight` in place. Whether it is finite then."""
    finite = True
    with np.errstate(all="ignore"):
        for block in _pieces(total, BLOCK):
            np.divide(total[block], weight, out=total[block])
            finite = _is_finite(total[block]) and finite
    return finite


def _as_kind(mean: Array, kind: _Kind) -> Array:
    """`mean`, shape (elements,), in the dtype and shape of `kind`; not copied if it has that dtype."""
    if kind.dtype.kind == "b":
        mean = mean >= 0.5
    elif kind.dtype.kind in "iu":
        least, greatest = np.iinfo(kind.dtype).min, np.iinfo(kind.dtype).max
        if float(greatest) > greatest:  # 2**63 is a float64, 2**63 - 1 is not
            greatest = int(np.nextafter(float(greatest), 0))
        mean = np.clip(np.rint(mean), least, greatest)
    return mean.astype(kind.dtype, copy=False).reshape(kind.shape)


def _not_finite(arrays: Mapping[str, Array]) -> str | None:
    """The first tensor that holds a NaN or inf."""
    with np.errstate(all="ignore"):
        for name, array in arrays.items():
            if array.dtype.kind in "iub":
                continue
            flat = array.reshape(-1)
            for block in _pieces(flat, BLOCK):
                if not _is_finite(flat[block]):
                    return name
    return None


def _is_finite(block: Array) -> bool:
    """Whether no element is NaN or inf."""
    return bool(np.isfinite(block).all())
