from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hanse.compression.cast import cast
from hanse.errors import ConfigError, UpdateRejected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floats_are_cast_and_the_rest_stays(dtype):
    arrays = {"w": np.array([1, -0.5], np.float32), "h": np.array(2, ml_dtypes.bfloat16), "n": np.array([3]), "b": np.array([True])}
    narrow = cast(arrays, dtype)
    assert list(narrow) == list(arrays)
    assert narrow["w"].dtype.name == narrow["h"].dtype.name == dtype
    assert_array_equal(narrow["w"].astype(np.float32), [1, -0.5])
    assert narrow["n"] is arrays["n"]
    assert narrow["b"] is arrays["b"]
    assert arrays["w"].dtype == np.float32


def test_rounding_is_to_nearest_half_to_even():
    halfway = {"w": np.array([1 + 2**-11, 1 + 3 * 2**-11], np.float32)}  # float16 has steps of 2**-10 here
    assert_array_equal(cast(halfway, "float16")["w"], np.array([1, 1 + 2**-9], np.float16))


def test_an_array_that_has_the_dtype_is_not_copied():
    w = np.ones(3, np.float16)
    assert cast({"w": w}, "float16")["w"] is w


def test_overflow_names_the_tensor_and_what_to_do():
    with pytest.raises(UpdateRejected, match=r"tensor 'w': 2 numbers, up to 1e\+05, overflow float16.*bfloat16"):
        cast({"v": np.ones(2), "w": np.array([1, 1e5, -7e4, math.inf], np.float32)}, "float16")
    assert cast({"w": np.array([1e5], np.float32)}, "bfloat16")["w"].dtype == ml_dtypes.bfloat16


def test_what_is_not_finite_stays_so():
    assert_array_equal(cast({"w": np.array([math.inf, math.nan], np.float32)}, "float16")["w"], [math.inf, math.nan])


def test_wrong_settings():
    with pytest.raises(ConfigError, match="'int8': it must be one of float16, bfloat16"):
        cast({}, "int8")
