from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from hanse.errors import ConfigError, UpdateRejected
from hanse.privacy.clipping import clip, l2_norm


def test_the_norm_is_over_all_arrays_together():
    arrays = {"a": np.array([[1, 2]], np.float32), "b": np.array(2, np.float32)}  # √(1 + 4 + 4)
    assert l2_norm(arrays) == 3
    clipped = clip(arrays, max_norm=1.5)
    assert_array_equal(clipped["a"], [[0.5, 1]])
    assert_array_equal(clipped["b"], 1)
    assert clipped["b"].dtype == np.float32
    assert_array_equal(arrays["a"], [[1, 2]])


def test_what_is_short_enough_stays_as_it_is():
    arrays = {"a": np.array([3, 4], np.float32)}
    assert clip(arrays, max_norm=5)["a"] is arrays["a"]


def test_the_norm_is_taken_in_float64():
    arrays = {"a": np.full(100, 3e37, np.float32), "b": np.full(3, 60000, np.float16)}
    assert math.isclose(l2_norm(arrays), 3e38, rel_tol=1e-6)
    clipped = clip(arrays, max_norm=1)
    assert_allclose(clipped["a"], 0.1, rtol=1e-6)


@given(st.lists(st.floats(-1e9, 1e9), max_size=8), st.floats(1e-3, 1e3))
def test_the_direction_stays_and_the_norm_is_bounded(values, max_norm):
    array = np.array(values)
    clipped = clip({"a": array}, max_norm=max_norm)["a"]
    norm = math.sqrt(math.fsum(value * value for value in values))
    assert_allclose(clipped, array * min(1, max_norm / norm if norm else 1), rtol=1e-9, atol=1e-300)
    assert l2_norm({"a": clipped}) <= max_norm * (1 + 1e-12)


def test_narrow_floats_keep_their_dtype():
    assert clip({"a": np.array([30, 40], ml_dtypes.bfloat16)}, max_norm=5)["a"].dtype == ml_dtypes.bfloat16


def test_nothing_is_short():
    assert clip({}, max_norm=1) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite(bad):
    with pytest.raises(UpdateRejected, match="tensor 'b' holds NaN or inf"):
        clip({"a": np.ones(2), "b": np.array([bad])}, max_norm=1)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_wrong_settings(bad):
    with pytest.raises(ConfigError, match="max_norm"):
        clip({}, max_norm=bad)
