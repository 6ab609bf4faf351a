from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hanse.errors import ConfigError
from hanse.privacy.gaussian import add_gaussian_noise


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_noise_has_the_stddev_asked_for_and_the_dtype_given(dtype):
    total = np.full((100, 200), 3, dtype)
    noisy = add_gaussian_noise(total, stddev=2.0, rng=np.random.default_rng(1))
    assert noisy.dtype == dtype
    assert noisy.shape == total.shape
    noise = noisy.astype(np.float64) - 3
    assert abs(noise.mean()) < 5 * 2 / math.sqrt(noise.size)
    assert abs(noise.std() - 2) < 5 * 2 / math.sqrt(2 * noise.size)
    assert_array_equal(total, np.full((100, 200), 3, dtype))


def test_the_same_generator_gives_the_same_noise():
    draws = [add_gaussian_noise(np.zeros(5, np.float32), stddev=1.0, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).all()


def test_no_stddev_no_noise_and_an_array_without_axes():
    noisy = add_gaussian_noise(np.array(3, np.float32), stddev=0, rng=np.random.default_rng(1))
    assert isinstance(noisy, np.ndarray)
    assert noisy == 3
    assert add_gaussian_noise(np.empty(0), stddev=1, rng=np.random.default_rng(1)).size == 0


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_wrong_settings(bad):
    with pytest.raises(ConfigError, match="stddev"):
        add_gaussian_noise(np.zeros(1), stddev=bad, rng=np.random.default_rng(1))
