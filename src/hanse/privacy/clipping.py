"""Clipping: a bound on how much one site can change a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hanse.errors import ConfigError, UpdateRejected

Array = np.ndarray[Any, np.dtype[Any]]
BLOCK = 1 << 16  # elements squared at a time


def l2_norm(arrays: Mapping[str, Array]) -> float:
    """The L2 norm over all elements of all arrays, in float64. NaN or inf if an element is."""
    total = 0.0
    for array in arrays.values():
        flat = array.reshape(-1)
        for low in range(0, flat.size, BLOCK):
            block = flat[low : low + BLOCK].astype(np.float64)
            total += float(np.sum(np.square(block, out=block)))
    return math.sqrt(total)


def clip(arrays: Mapping[str, Array], *, max_norm: float) -> dict[str, Array]:
    """The arrays scaled down together so that their L2 norm is at most `max_norm`: new arrays, or the given ones if it is already.

    This is the flat clipping of DP-FedAvg (McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018, §2).

    arrays: floats, any shapes. Scaling is in float32 for it and narrower floats, in float64 for float64; then rounding to the dtype may
        take the norm past `max_norm` by that rounding.
    Raises: ConfigError if max_norm is not above 0; UpdateRejected, naming the tensor, if an element is NaN or inf.
    """
    if not 0 < max_norm < math.inf:
        raise ConfigError(f"max_norm is {max_norm!r}: it must be a finite number above 0")
    norm = l2_norm(arrays)
    if not math.isfinite(norm):
        bad = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
        raise UpdateRejected(f"tensor {bad!r} holds NaN or inf: it cannot be clipped" if bad else "the L2 norm overflows float64")
    if norm <= max_norm:
        return dict(arrays)
    scale = max_norm / norm
    return {name: _scaled(array, scale) for name, array in arrays.items()}


def _scaled(array: Array, scale: float) -> Array:
    wide = array.astype(np.float32, copy=False) if array.dtype.itemsize < 4 else array
    return np.asarray(wide * wide.dtype.type(scale)).astype(array.dtype, copy=False)
