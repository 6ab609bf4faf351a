from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from hanse.aggregation.norm_bound import NormBoundedMean
from hanse.errors import ConfigError

F32 = np.float32


def plain(deltas: np.ndarray, bound: float | None) -> np.ndarray:
    norms = np.linalg.norm(deltas.astype(float), axis=1)
    limit = np.median(norms) if bound is None else bound
    return np.mean([delta * min(1, limit / norm) if norm else delta for delta, norm in zip(deltas, norms, strict=True)], axis=0)


def test_a_long_change_is_shortened(combine):
    rows = [[3, 4], [0, 1], [300, 400]]  # norms 5, 1, 500
    assert_allclose(combine(NormBoundedMean(5), rows, params_type="DIFF").params["w"], [2, 3], rtol=1e-6)  # of (3, 4), (0, 1), (3, 4)
    result = combine(NormBoundedMean(), rows, params_type="DIFF")  # the median norm is 5 as well
    assert_allclose(result.params["w"], [2, 3], rtol=1e-6)
    assert_allclose(list(result.meta["weights"].values()), [1, 1, 0.01])


def test_full_is_measured_from_the_tasks_model(combine):
    result = combine(NormBoundedMean(5), [[13, 14], [10, 11], [310, 410]], reference=[10, 10])
    assert_allclose(result.params["w"], [12, 13], rtol=1e-6)


def test_full_without_a_model_is_an_error(combine):
    with pytest.raises(ConfigError, match="tensor 'w' of the model they started from is not known"):
        combine(NormBoundedMean(), [[1, 2]])


def test_sites_that_did_not_move(combine):
    assert_array_equal(combine(NormBoundedMean(), [[1, 2]] * 3, reference=[1, 2]).params["w"], [1, 2])
    assert_array_equal(combine(NormBoundedMean(), [[1, 2], [1, 2], [9, 9]], reference=[1, 2]).params["w"], [1, 2])  # the bound is 0


def test_all_within_the_bound_is_the_plain_mean(combine):
    assert_array_equal(combine(NormBoundedMean(100), [[1, 2], [3, 4]], params_type="DIFF").params["w"], [2, 3])


@given(st.integers(1, 9), st.integers(0, 10**6), st.none() | st.floats(0.1, 10))
@settings(deadline=None, max_examples=40)
def test_as_the_plain_reference_does(combine, sites, seed, bound):
    rng = np.random.default_rng(seed)
    deltas = (rng.standard_normal((sites, 5)) * rng.exponential(size=(sites, 1))).astype(F32)
    start = rng.standard_normal(5).astype(F32)
    expected = plain(deltas, bound)
    assert_allclose(combine(NormBoundedMean(bound), deltas, params_type="DIFF").params["w"], expected, rtol=1e-4, atol=1e-5)
    assert_allclose(combine(NormBoundedMean(bound), start + deltas, reference=start).params["w"], start + expected, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 10**6), st.floats(1, 1e30))
@settings(deadline=None, max_examples=40)
def test_one_site_moves_the_result_by_no_more_than_its_share(combine, seed, factor):
    honest = np.random.default_rng(seed).standard_normal((4, 5)).astype(F32)
    hostile = (-factor * honest[0]).astype(F32)
    with_it, with_zero = (combine(NormBoundedMean(0.5), [*honest, row], params_type="DIFF").params["w"] for row in (hostile, hostile * 0))
    assert np.linalg.norm(with_it - with_zero) <= 0.5 / 5 + 1e-6


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_bound(bound):
    with pytest.raises(ConfigError, match="bound"):
        NormBoundedMean(bound)
