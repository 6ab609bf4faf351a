from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from hanse.aggregation.geometric_median import GeometricMedian, weiszfeld
from hanse.errors import ConfigError


def plain_weiszfeld(stack: np.ndarray, smoothing: float, iterations: int) -> np.ndarray:
    """Algorithm 2 of the paper, on the points themselves, from their mean."""
    v = stack.mean(axis=0)
    for _ in range(iterations):
        pulls = 1 / np.maximum(smoothing, np.linalg.norm(stack - v, axis=1))
        v = pulls @ stack / pulls.sum()
    return v


def test_the_corners_of_a_square_pull_alike_and_the_one_far_away_hardly(combine):
    square = [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert_allclose(combine(GeometricMedian(), square).params["w"], [1, 1])
    result = combine(GeometricMedian(), [*square, [1e6, 1e6]])
    assert np.abs(result.params["w"] - 1).max() < 1
    assert result.meta["weights"]["site-004"] < 1e-5


def test_on_a_line_it_is_the_median(combine):
    assert_allclose(combine(GeometricMedian(iterations=5000), [[1], [2], [4], [9], [1000]]).params["w"], [4], atol=1e-2)


@given(st.integers(2, 9), st.integers(0, 10**6), st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_as_the_plain_reference_does(combine, sites, seed, iterations):
    stack = np.random.default_rng(seed).standard_normal((sites, 5)).astype(np.float32)
    expected = plain_weiszfeld(stack.astype(float), 1e-6, iterations)
    assert_allclose(combine(GeometricMedian(iterations=iterations), stack).params["w"], expected, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_who_sent_what_does_not_matter_nor_where_the_origin_is(combine, seed, random):
    stack = np.random.default_rng(seed).standard_normal((7, 3)).astype(np.float32)
    result = combine(GeometricMedian(), stack).params["w"]
    shuffled = list(stack)
    random.shuffle(shuffled)
    for moved, back in ((shuffled, result), (stack + np.float32(8), result + 8), (stack * np.float32(4), result * 4)):
        assert_allclose(combine(GeometricMedian(), moved).params["w"], back, rtol=1e-4, atol=1e-4)


def test_no_sum_of_distances_is_smaller():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((8, 4))
    weights = weiszfeld(((points[:, None] - points) ** 2).sum(axis=2), smoothing=1e-6, iterations=1000)
    assert weights.sum() == pytest.approx(1)
    found = weights @ points
    distance = lambda v: np.linalg.norm(points - v, axis=1).sum()  # noqa: E731
    assert all(distance(found) <= distance(found + 0.01 * rng.standard_normal(4)) for _ in range(100))


def test_equal_updates(combine):
    assert_allclose(combine(GeometricMedian(), [[3, 4]] * 5).params["w"], [3, 4])


@pytest.mark.parametrize("arguments", [{"smoothing": 0.0}, {"smoothing": float("inf")}, {"iterations": 0}])
def test_wrong_settings(arguments):
    with pytest.raises(ConfigError):
        GeometricMedian(**arguments)
