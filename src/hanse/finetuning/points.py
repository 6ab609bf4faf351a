"""Where a training run stands: the arrays that are trained, as every party has them to the same bits.

What is trained may be all of a model, or an adapter over a base that stays. Everything here is NumPy, element by element, so that two
machines agree on each bit; a party's own arithmetic, in PyTorch, shows only in the differences that it sends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import blake3
import numpy as np

from hanse.compression.quantize import Bits, Quantized, quantize
from hanse.errors import UpdateRejected
from hanse.messages.codec import encode
from hanse.messages.flmodel import FLModel, ParamsType

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
LORA_A, LORA_B = ".lora_a", ".lora_b"


def digest_of(arrays: Arrays) -> str:
    """BLAKE3 of the frame that holds the arrays in the order of their names, as `blake3:` and 64 hexadecimal digits."""
    hasher = blake3.blake3()
    for piece in encode(FLModel({name: arrays[name] for name in sorted(arrays)})):
        hasher.update(piece)
    return f"blake3:{hasher.hexdigest()}"


def merged(base: Arrays, arrays: Arrays) -> dict[str, Array]:
    """The whole model: `base` with `arrays` in place of its own, and with each pair of LoRA's factors added (Hu et al., 2022, Eq. 3).

    NAME.lora_a, float32 (rank, columns), and NAME.lora_b, float32 (rows, rank), change NAME by b·a, in float64, rank by rank.
    """
    whole = {name: arrays.get(name, array) for name, array in base.items()}
    for name in arrays:
        if name.endswith(LORA_A):
            weight = name.removesuffix(LORA_A)
            a, b = arrays[name].astype(np.float64), arrays[weight + LORA_B].astype(np.float64)
            change = np.zeros((b.shape[0], a.shape[1]))
            for rank in range(a.shape[0]):
                change += b[:, rank, None] * a[None, rank]
            whole[weight] = (base[weight] + change.reshape(base[weight].shape)).astype(np.float32)
    return whole


def difference(after: Arrays, before: Arrays) -> dict[str, Array]:
    """What has to be added to `before`, float32."""
    return {name: np.asarray(array - before[name]) for name, array in after.items()}


def moved(arrays: Arrays, change: Arrays) -> dict[str, Array]:
    """`arrays` with a difference added. Raises UpdateRejected if it is of another model."""
    if arrays.keys() != change.keys() or any(arrays[name].shape != change[name].shape for name in arrays):
        raise UpdateRejected("a difference came that is not of this model: its tensors have other names or shapes")
    return {name: np.asarray(array + change[name]) for name, array in arrays.items()}


def norm(array: Array) -> float:
    """The L2 norm, in float64. Not by BLAS, whose idle threads take a core for a while after each call."""
    return math.sqrt(np.square(array, dtype=np.float64).sum())


def checked(arrays: Any, like: Arrays) -> Arrays:
    """The arrays that a party sent. Raises UpdateRejected unless they are finite, with names, shapes and dtypes as in `like`."""
    if not isinstance(arrays, Mapping) or arrays.keys() != like.keys():
        raise UpdateRejected("arrays came that are not of this model: they have other names")
    for name, array in arrays.items():
        form = getattr(array, "dtype", None), getattr(array, "shape", None)
        if form != (like[name].dtype, like[name].shape) or not np.isfinite(array).all():
            raise UpdateRejected(f"tensor {name!r} came in another shape or dtype than the model's, or is not finite")
    return arrays


def encode_change(change: Arrays, bits: Bits, residual: Arrays | None) -> tuple[FLModel, dict[str, Array]]:
    """A difference as it travels, and what rounding left of it for the next one. See `hanse.compression.quantize`.

    All of it is in params, under "bits", "values" and "scales": a site's policy names what may leave, and meta stays as it was.
    """
    quantized = quantize(change, bits, residual)
    scales = {name: np.float32(scale) for name, scale in quantized.scales.items()}
    params = {"bits": bits, "values": quantized.values, "scales": {name: np.array(scale) for name, scale in scales.items()}}
    return FLModel(params, ParamsType.DIFF), quantized.residual_after(change, residual)


def decode_change(model: FLModel, like: Arrays) -> dict[str, Array]:
    """What to add to arrays of the names and shapes of `like`, float32. Raises UpdateRejected for what is no difference of those."""
    params = model.params
    if not isinstance(params, Mapping) or params.keys() != {"bits", "values", "scales"}:
        raise UpdateRejected("this carries no difference of a model: bits, values and scales are its parts")
    try:
        about = {
            "bits": params["bits"],
            "scales": {name: float(scale) for name, scale in params["scales"].items()},
            "shapes": {name: list(array.shape) for name, array in like.items()},
        }
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UpdateRejected(f"the scales of a difference are no numbers by name: {error}") from error
    return Quantized.from_flmodel(FLModel(params["values"], ParamsType.DIFF, meta={"quantized": about})).restored()
