"""Narrower floats: half the bytes for fewer digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hanse.errors import ConfigError, UpdateRejected

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def dtype_named(name: str) -> np.dtype[Any]:
    """Raises ConfigError, naming the choices, if there is none."""
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}: it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether it is a float of any width, those of ml_dtypes among them."""
    return dtype.name.startswith(("float", "bfloat"))  # ml_dtypes' floats have kind V


def cast(arrays: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """Every float array as `dtype`, rounded to nearest, half to even; arrays that are no floats, or have it already, as they are.

    float16 has 11 significant bits and ends at 65504; bfloat16 has 8 and float32's range.
    Raises: ConfigError for another dtype; UpdateRejected, naming the tensor, if a finite number would become inf.
    """
    into = dtype_named(dtype)
    return {name: _cast(name, array, into) if is_float(array.dtype) else array for name, array in arrays.items()}


def _cast(name: str, array: Array, into: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        narrow = array.astype(into, copy=False)
    if narrow is not array and not np.isfinite(narrow).all():
        overflown = np.isfinite(array) & ~np.isfinite(narrow)
        if overflown.any():
            raise UpdateRejected(
                f"tensor {name!r}: {np.count_nonzero(overflown)} numbers, up to {np.abs(array[overflown]).max():.3g}, overflow {into}.",
                hint="Cast to bfloat16, which has float32's range, or clip first.",
            )
    return narrow
