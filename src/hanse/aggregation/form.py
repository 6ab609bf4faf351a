"""What the updates of one round have in common: the names, shapes and dtypes of their tensors, their metrics, and finite numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401, without it np.dtype("bfloat16") is not known
import numpy as np

from hanse.errors import UpdateRejected
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import flatten
from hanse.messages.update import Update

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 1 << 16  # elements looked at or added at a time: 256 KiB of float32, so that what is added and its sum stay in the cache
LEAST, GREATEST = 1e-30, 1e30  # of a weight, so that neither it nor the sum of many leaves float32


def excluded_names(model: FLModel, where: str) -> frozenset[str]:
    """The names in `meta["excluded"]`, of tensors left out on purpose. Raises UpdateRejected, beginning with `where`, if it is no list."""
    names = model.meta.get("excluded", [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UpdateRejected(f'{where}: meta["excluded"] is {names!r:.80}.', hint="It must be a list of tensor names.")
    return frozenset(names)


class Kind(NamedTuple):
    """What a tensor is. A `bytes` value has dtype S0, though it travels as uint8."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(slots=True)
class Term:
    """One update, or one partial sum, as it is added."""

    site: str
    where: str  # for messages
    unit: str
    params_type: ParamsType
    weight: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    structure: Any = None
    excluded: frozenset[str] = frozenset()  # names it may lack


@dataclass(slots=True)
class Form:
    """The tensors that every update of a round has. `whose`, for messages. `later`: names known, of a kind not yet seen."""

    whose: str
    structure: Any
    kinds: dict[str, Kind]
    later: Sequence[str] = ()

    @classmethod
    def of(cls, reference: FLModel) -> Form:
        """That of the task's model, which has params."""
        arrays, structure = flatten(reference.params)
        return cls("the task's model", structure, kinds_of(arrays, structure))

    def check(self, term: Term) -> None:
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
            if kind.dtype != expected.dtype and not (is_float(kind.dtype) and is_float(expected.dtype)):
                raise UpdateRejected(
                    f"{term.where}: tensor {name!r} has dtype {kind.dtype}, in {self.whose} it is {expected.dtype}.",
                    hint=f"Send it as {expected.dtype}.",
                )


@dataclass(slots=True)
class Round:
    """What the updates of one round share. The first site in the order of names sets what the reference does not."""

    site: str | None = None
    unit: str | None = None
    params_type: ParamsType | None = None
    form: Form | None = None

    @property
    def kinds(self) -> dict[str, Kind]:
        return self.form.kinds if self.form else {}

    def join(self, term: Term) -> None:
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
            self.fit(term)
            self.params_type = term.params_type
        self.site, self.unit = self.site or term.site, term.unit

    def fit(self, term: Term) -> None:
        """Of `join`, what concerns names, shapes and dtypes."""
        if self.form is None:
            self.form = Form(f"the update of site {term.site!r}", term.structure, {}, sorted(term.excluded | term.kinds.keys()))
        self.form.check(term)
        self.form.kinds.update((name, kind) for name, kind in term.kinds.items() if name not in self.form.kinds)


def where_of(update: Update) -> str:
    """Site and round, for messages. Raises UpdateRejected if the site could not do its task."""
    commit, round = update.task_id.commit, update.model.current_round
    where = f"site {update.site!r}, round {(commit if round is None else round) + 1}"
    if update.failure is not None:
        raise UpdateRejected(f"{where}: the site could not do its task: {update.failure}")
    return where


def term_of(update: Update, where: str, unit: str, weight: float) -> Term:
    """The update as it is added. Raises UpdateRejected for tensors and metrics that are no numbers."""
    model = update.model
    term = Term(update.site, where, unit, model.params_type, weight=weight, metrics=usable_metrics(model, weight, where))
    if model.params is not None:
        term.arrays, term.structure = flatten(model.params)
        term.kinds = kinds_of(term.arrays, term.structure)
        term.excluded = excluded_names(model, where)
        for name, kind in term.kinds.items():
            if sum_dtype(kind.dtype) is None:
                raise UpdateRejected(
                    f"{where}: tensor {name!r} has dtype {kind.dtype.name}, of which there is no mean.",
                    hint="Leave it out with the filter Exclude.",
                )
    return term


def weight_of(update: Update, by: str | None, where: str) -> tuple[str, float]:
    """The unit and number that `update` counts with: `by` is "examples", "steps" or "equal"; None takes the first that is there."""
    meta = update.model.meta
    unit = by or next((unit for unit in ("examples", "steps") if meta.get(unit) is not None), "equal")
    if unit == "equal":
        return unit, 1.0
    weight = meta.get(unit)
    if weight is None:
        raise UpdateRejected(f"{where}: its meta has no {unit!r}.", hint=f'Send FLModel(..., meta={{"{unit}": n}}).')
    if not is_weight(weight):
        raise UpdateRejected(
            f"{where}: its weight is {weight!r} {unit}.",
            hint=f"It must be a number from {LEAST} to {GREATEST}; a site without data should not answer, or raise.",
        )
    return unit, float(weight)


def kinds_of(arrays: Mapping[str, Array], structure: Any) -> dict[str, Kind]:
    kinds = {name: Kind(array.shape, array.dtype) for name, array in arrays.items()}
    if structure is not None:
        kinds |= {name: Kind(kinds[name].shape, np.dtype("S0")) for name in _bytes_names(structure["tree"])}
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


def is_weight(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool) and bool(LEAST <= value <= GREATEST)


def usable_metrics(model: FLModel, weight: float, where: str) -> dict[str, float]:
    """The metrics whose weighted sum over any number of sites is a finite float64."""
    metrics = {}
    for name, value in model.metrics.items():
        try:
            metrics[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            raise UpdateRejected(f"{where}: metric {name!r} is {value!r:.80}.", hint="It must be a number.") from None
    return {name: value for name, value in metrics.items() if abs(value) * weight < 1e300}


def is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.name.startswith(("float", "bfloat"))  # ml_dtypes' floats have kind V


@cache
def sum_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype in which tensors of `dtype` are summed; None if they are no numbers."""
    if is_float(dtype):
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    if dtype.kind == "c":
        return np.dtype(np.complex64 if dtype.itemsize <= 8 else np.complex128)
    return np.dtype(np.float64) if dtype.kind in "iub" else None


def as_real(array: Array) -> Array:
    """Complex numbers as twice as many real ones; others as they are."""
    return np.ascontiguousarray(array).view(array.real.dtype) if array.dtype.kind == "c" else array


def real_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """In which the elements of a tensor are compared and added: float32 for narrow floats and complex numbers, else float64."""
    summed = sum_dtype(dtype)
    assert summed is not None
    return np.empty(0, summed).real.dtype


def as_kind(mean: Array, kind: Kind) -> Array:
    """`mean`, shape (elements,), in the dtype and shape of `kind`; not copied if it has that dtype."""
    if kind.dtype.kind == "b":
        mean = mean >= 0.5
    elif kind.dtype.kind in "iu":
        least, greatest = np.iinfo(kind.dtype).min, np.iinfo(kind.dtype).max
        if float(greatest) > greatest:  # 2**63 is a float64, 2**63 - 1 is not
            greatest = int(np.nextafter(float(greatest), 0))
        mean = np.clip(np.rint(mean), least, greatest)
    return mean.astype(kind.dtype, copy=False).reshape(kind.shape)


def spoilt(term: Term) -> UpdateRejected | None:
    """Why an update with a NaN or inf is left out; None if it has none."""
    if (name := _not_finite(term.arrays)) is None:
        return None
    return UpdateRejected(
        f"{term.where}: tensor {name!r} holds NaN or inf.", hint="Training diverged there: lower the learning rate or clip the gradients."
    )


def _not_finite(arrays: Mapping[str, Array]) -> str | None:
    """The first tensor that holds a NaN or inf."""
    with np.errstate(all="ignore"):
        for name, array in arrays.items():
            if array.dtype.kind in "iub":
                continue
            flat = array.reshape(-1)
            for block in pieces(flat, BLOCK):
                if not is_finite(flat[block]):
                    return name
    return None


def is_finite(block: Array) -> bool:
    """Whether no element is NaN or inf."""
    return bool(np.isfinite(block).all())


def pieces(array: Array, elements: int) -> list[slice]:
    return [slice(low, low + elements) for low in range(0, array.size, elements)]
