"""How much an update counts that was made from an older model: the staleness functions of Xie et al., 2019, section 5.2."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from hanse.aggregation.form import sum_dtype
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import flatten, unflatten

_KINDS = {"constant": 0, "polynomial": 1, "hinge": 2}  # numbers that follow


@dataclass(frozen=True)
class Staleness:
    """s(τ), for an update that is τ versions old; s(0) is 1. Asynchronous Federated Optimization (Xie, Koyejo and Gupta, 2019).

    text: "constant", s = 1; "polynomial a", s = (τ + 1)^-a; "hinge a b", s = 1 up to τ = b, then 1 / (a (τ - b) + 1).
    The weight of FedBuff's paper, 1 / √(1 + τ), is "polynomial 0.5". Raises ConfigError if malformed.
    """

    text: str
    kind: str = field(init=False)
    numbers: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        kind, *rest = self.text.split() if isinstance(self.text, str) and self.text.split() else [""]
        try:
            numbers = tuple(map(float, rest))
        except ValueError:
            numbers = (math.nan,)
        if _KINDS.get(kind) != len(numbers) or not all(0 <= number < math.inf for number in numbers):
            raise ConfigError(
                f"{self.text!r} is no staleness function: write 'constant', 'polynomial a' such as 'polynomial 0.5', or 'hinge a b' such as"
                " 'hinge 10 4', with numbers from 0"
            )
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "numbers", numbers)

    def __call__(self, staleness: int) -> float:
        """s(τ)."""
        match self.kind, self.numbers:
            case "polynomial", (a,):
                return float((staleness + 1) ** -a)
            case "hinge", (a, b):
                return 1.0 if staleness <= b else 1.0 / (a * (staleness - b) + 1.0)
        return 1.0


def scaled_difference(update: FLModel, sent: FLModel, scale: float) -> FLModel:
    """`update`, FULL or DIFF, as scale × its difference from `sent`, the model that the site got: a DIFF by flat names.

    A difference is taken in float32 for float32 and narrower floats, and float64 for float64, and goes back to the update's dtype.
    Integers and booleans have no scale: of integers it is the plain difference, and of booleans the site's value.
    """
    if update.params is None:
        return update
    arrays, structure = flatten(update.params)
    if update.params_type is ParamsType.DIFF and scale == 1.0:
        return update
    old = {} if update.params_type is ParamsType.DIFF or sent.params is None else flatten(sent.params)[0]
    new = {}
    for name, array in arrays.items():
        if array.dtype.kind == "b":
            new[name] = array
            continue
        dtype = array.dtype if array.dtype.kind in "iu" else sum_dtype(array.dtype) or array.dtype
        difference = array.astype(dtype, copy=False)
        if name in old and old[name].shape == array.shape:  # whatever does not fit is refused by the aggregator
            difference = difference - old[name].astype(dtype, copy=False)
        if scale != 1.0 and dtype.kind in "fc":
            difference = difference * dtype.type(scale)
        new[name] = np.asarray(difference).astype(array.dtype, copy=False)
    return replace(update, params=unflatten(new, structure), params_type=ParamsType.DIFF)


def whole(update: FLModel, sent: FLModel) -> FLModel:
    """`update` as a FULL one: what a DIFF makes of `sent`, the model that the site got."""
    if update.params is None or update.params_type is ParamsType.FULL:
        return update
    arrays, structure = flatten(update.params)
    old = {} if sent.params is None else flatten(sent.params)[0]
    new = {}
    for name, array in arrays.items():
        fits = name in old and old[name].shape == array.shape and array.dtype.kind != "b"
        new[name] = np.asarray(old[name] + array).astype(old[name].dtype, copy=False) if fits else array
    return replace(update, params=unflatten(new, structure), params_type=ParamsType.FULL)
