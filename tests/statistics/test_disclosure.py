from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hanse.errors import ConfigError
from hanse.statistics.disclosure import Disclosure, hide_small
from hanse.statistics.moments import Moments


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ([20, 4, 30, 3, 0], [20, 0, 30, 0, 0]),  # 7 hidden together, at least 5
        ([20, 4, 30, 0], [0, 0, 30, 0]),  # one alone could be told from the total: the smallest other goes with it
        ([20, 2, 30, 2], [0, 0, 30, 0]),  # two of 4 together are fewer than 5
        ([20, 30, 0], [20, 30, 0]),
        ([4, 0, 0], [0, 0, 0]),
    ],
)
def test_cells_below_five(counts: list[int], shown: list[int]) -> None:
    assert_array_equal(hide_small(np.array(counts), 5), shown)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).map(np.array), st.integers(1, 12))
def test_no_small_number_can_be_told(counts: np.ndarray, least: int) -> None:
    shown = hide_small(counts, least)
    assert ((shown == 0) | (shown == counts)).all()
    assert (shown[shown > 0] >= least).all()
    hidden = counts[shown == 0]
    small = hidden[hidden > 0]
    assert not shown.any() or small.size == 0 or (small.size > 1 and small.sum() >= least)


def test_noise_on_counts_keeps_mean_and_variance() -> None:
    """Else the count would be the sum divided by the mean."""
    exact = Moments.of(np.arange(100.0))
    noisy = Disclosure(count_noise=5.0).noisy(exact, np.random.default_rng(1))
    assert noisy.count != 100
    assert noisy.mean == pytest.approx(exact.mean, rel=1e-14)
    assert noisy.variance == pytest.approx(exact.variance, rel=1e-14)
    assert Disclosure().noisy(exact, np.random.default_rng(1)) == exact


def test_noise_on_cells_comes_before_the_minimum() -> None:
    rules = Disclosure(count_noise=3.0, min_count=10)
    shown = rules.shown(np.full(1000, 12), np.random.default_rng(0))
    assert set(np.unique(shown)) <= {0, *range(10, 30)}
    assert shown[shown > 0].std() > 1
    assert (shown == 0).mean() > 0.1
    assert_array_equal(shown, rules.shown(np.full(1000, 12), np.random.default_rng(0)))


def test_a_range_is_only_widened() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        low, high = Disclosure(range_noise=0.2).widened(10.0, 20.0, rng)
        assert 8.0 <= low <= 10.0 <= 20.0 <= high <= 22.0
    assert Disclosure().widened(10.0, 20.0, rng) == (10.0, 20.0)


@pytest.mark.parametrize(
    "wrong",
    [{"min_count": 0}, {"min_count": 2.5}, {"max_bins_share": 0}, {"count_noise": -1}, {"range_noise": float("nan")}],
    ids=str,
)
def test_rules_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Disclosure(**wrong)
