"""Symmetric integers of 8 or 4 bits in place of float32, one scale a tensor, and what rounding lost kept for the next message.

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019): the residual of one message is added to the next before
it is rounded, so the sum of all that was sent differs from the sum of all that was meant by the last residual alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from hanse.errors import ConfigError, UpdateRejected
from hanse.messages.flmodel import FLModel, ParamsType

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Bits: TypeAlias = Literal[4, 8, 32]

_META = "quantized"
_DTYPES = {4: np.dtype(np.uint8), 8: np.dtype(np.int8), 32: np.dtype(np.float32)}


class _About(msgspec.Struct, forbid_unknown_fields=True):
    """What travels beside the integers. Scales are float32, which JSON's numbers hold exactly."""

    bits: Bits
    scales: dict[str, float]
    shapes: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Quantized:
    """Tensors as integers. What one stands for is its integer times its tensor's scale.

    values: by bits. 8: int8, -127…127, in the tensor's shape. 4: uint8, shape (⌈n / 2⌉,), two to a byte, the first in the low half, each
        as -7…7 in two's complement; the last half is 0 where n is odd. 32: float32, as it was, with scale 1.
    """

    values: dict[str, Array]
    scales: dict[str, float]
    bits: Bits
    shapes: dict[str, tuple[int, ...]]

    def restored(self) -> dict[str, Array]:
        """The tensors again: float32, rounded by at most half a scale."""
        return {name: self._restored(name) for name in self.values}

    def _restored(self, name: str) -> Array:
        value = self.values[name]
        if self.bits == 32:
            return value
        integers = _unpacked(value, self.shapes[name]) if self.bits == 4 else value
        return np.asarray(integers.astype(np.float32) * np.float32(self.scales[name]))

    def residual_after(self, arrays: Mapping[str, Array], residual: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """What rounding lost: (arrays + residual) - restored, for the next `quantize`. Give what `quantize` was given."""
        return {name: np.asarray(_with_residual(name, array, residual) - self._restored(name)) for name, array in arrays.items()}

    def to_flmodel(self) -> FLModel:
        """As it travels: the integers by name as a DIFF, bits, scales and shapes in its meta."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return FLModel(self.values, ParamsType.DIFF, meta={_META: {"bits": self.bits, "scales": self.scales, "shapes": shapes}})

    @classmethod
    def from_flmodel(cls, model: FLModel) -> Quantized:
        """Raises UpdateRejected, naming the tensor, unless it is what `to_flmodel` writes; then `restored` holds finite numbers."""
        try:
            about = msgspec.convert(model.meta.get(_META), _About)
        except msgspec.ValidationError as error:
            raise UpdateRejected(f"this is no quantised difference: meta[{_META!r}]: {error}") from error
        values = model.params
        if model.params_type is not ParamsType.DIFF or not isinstance(values, dict):
            raise UpdateRejected(f"a quantised difference has named arrays and params_type DIFF, not {model.params_type}")
        if not values.keys() == about.scales.keys() == about.shapes.keys():
            odd = values.keys() ^ about.scales.keys() or values.keys() ^ about.shapes.keys()
            raise UpdateRejected(f"tensors, scales and shapes have different names, such as {min(odd)!r}")
        quantized = cls(dict(values), about.scales, about.bits, {name: tuple(shape) for name, shape in about.shapes.items()})
        for name in values:
            if problem := quantized._problem(name):
                raise UpdateRejected(f"tensor {name!r}: {problem}")
        return quantized

    def _problem(self, name: str) -> str:
        """What is wrong with a tensor that came from outside, or nothing."""
        value, scale, shape, dtype = self.values[name], self.scales[name], self.shapes[name], _DTYPES[self.bits]
        size = math.prod(shape)
        if not isinstance(value, np.ndarray) or value.dtype != dtype:
            return f"{self.bits} bits travel as an array of {dtype}, not {getattr(value, 'dtype', type(value).__name__)}"
        if any(length < 0 for length in shape) or value.shape != (((size + 1) // 2,) if self.bits == 4 else shape):
            return f"its shape {value.shape} does not hold the shape {shape} that is said with {self.bits} bits"
        if self.bits == 32:
            return "" if scale == 1 and np.isfinite(value).all() else "it is not finite, or its scale is not 1"
        levels = _levels(self.bits)
        if not 0 <= scale <= float(np.finfo(np.float32).max) / levels or float(np.float32(scale)) != scale:
            return f"its scale {scale!r} is no float32 from 0 to what float32 can hold"
        if self.bits == 8:
            return "it holds -128, which no rounding gives" if (value == -128).any() else ""
        if size % 2 and value[-1] >> 4:
            return "the half byte after its end is not 0"
        return "it holds -8, which no rounding gives" if (_halves(value) == -8).any() else ""


def quantize(arrays: Mapping[str, Array], bits: Bits, residual: Mapping[str, Array] | None = None) -> Quantized:
    """`arrays` plus `residual`, each tensor in steps of max|x| / 127 (8 bits) or max|x| / 7 (4 bits), rounded half to even.

    arrays: float32, any shape. residual: what `residual_after` gave after the last message; None or a name that is missing: zeros.
    bits: 32 leaves the numbers as they are, for callers that let it be chosen.
    Raises: ConfigError for another dtype; UpdateRejected, naming the tensor, for numbers that are not finite.
    """
    if bits not in _DTYPES:
        raise ConfigError(f"bits is {bits}: it must be 4, 8 or 32")
    values: dict[str, Array] = {}
    scales: dict[str, float] = {}
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise ConfigError(f"tensor {name!r} has dtype {array.dtype}: only float32 is quantised")
        values[name], scales[name] = _quantize(name, _with_residual(name, array, residual), bits)
    return Quantized(values, scales, bits, {name: array.shape for name, array in arrays.items()})


def _quantize(name: str, array: Array, bits: Bits) -> tuple[Array, float]:
    levels = np.float32(_levels(bits))
    largest = np.abs(array).max(initial=np.float32(0))
    scale = largest / levels
    with np.errstate(over="ignore"):
        if not np.isfinite(scale * levels):
            raise UpdateRejected(
                f"tensor {name!r}: its largest number is {largest}, so it cannot be quantised.",
                hint="Training has diverged: lower the learning rate.",
            )
    if bits == 32:
        return array, 1.0
    if scale == 0:  # nothing, or numbers so small that the scale has no float32: the residual keeps them
        return _packed(np.zeros(array.shape, np.int8), bits), 0.0
    return _packed(np.clip(np.rint(array / scale), -levels, levels).astype(np.int8), bits), float(scale)


def _with_residual(name: str, array: Array, residual: Mapping[str, Array] | None) -> Array:
    if residual is None or name not in residual:
        return array
    if residual[name].shape != array.shape:
        raise ConfigError(f"tensor {name!r} has shape {array.shape} and its residual {residual[name].shape}")
    return np.asarray(array + residual[name])


def _levels(bits: Bits) -> int:
    return 7 if bits == 4 else 127


def _packed(integers: Array, bits: Bits) -> Array:
    if bits != 4:
        return np.asarray(integers)
    halves = np.zeros(integers.size + integers.size % 2, np.uint8)
    halves[: integers.size] = integers.reshape(-1).view(np.uint8) & 15
    return halves[::2] | (halves[1::2] << 4)


def _unpacked(packed: Array, shape: tuple[int, ...]) -> Array:
    return _halves(packed)[: math.prod(shape)].reshape(shape)


def _halves(packed: Array) -> Array:
    """int8, -8…7, shape (2 · bytes,)."""
    halves = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    return ((halves ^ 8).astype(np.int8) - np.int8(8)).astype(np.int8)
