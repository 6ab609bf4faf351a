"""Gaussian noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hanse.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]


def add_gaussian_noise(total: Array, *, stddev: float, rng: np.random.Generator) -> Array:
    """`total` plus independent N(0, stddev²) noise on every element, as a new array of its dtype.

    total: floats, any shape. Noise is drawn and added in float32 for it and narrower floats, in float64 for float64.
    Raises: ConfigError if stddev is negative or not finite.
    """
    if not 0 <= stddev < math.inf:
        raise ConfigError(f"stddev is {stddev!r}: it must be a finite number, 0 or above")
    dtype: type[Any] = np.float64 if total.dtype.itemsize >= 8 else np.float32
    noise: Array = np.asarray(rng.standard_normal(total.shape, dtype=dtype))
    return np.asarray(total.astype(dtype, copy=False) + noise * dtype(stddev)).astype(total.dtype, copy=False)
