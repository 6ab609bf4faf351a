from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.statistics.moments import Moments, merged

parts = st.lists(st.lists(st.floats(-1e6, 1e6), max_size=8), max_size=12)


def test_by_hand() -> None:
    """Mean 4; (2² + 0² + 2²) = 8, and 8 / 2 = 4."""
    moments = Moments.of(np.array([2.0, np.nan, 4.0, 6.0, np.inf]))
    assert moments == Moments(count=3, missing=2, total=12.0, m2=8.0)
    assert (moments.mean, moments.variance) == (4.0, 4.0)


def test_two_parts_by_hand() -> None:
    """1, 3 with mean 2 and m2 2; 7, 9 with mean 8 and m2 2. Together: mean 5, m2 2 + 2 + 6² · 2 · 2 / 4 = 40."""
    assert Moments.of(np.array([1, 3])).merge(Moments.of(np.array([7, 9]))) == Moments(4, 0, 20.0, 40.0)


def test_of_nothing_and_of_one() -> None:
    none = Moments.of(np.array([np.nan]))
    assert none == Moments(missing=1)
    assert math.isnan(none.mean)
    one = none.merge(Moments.of(np.array([True])))
    assert one == Moments(1, 1, 1.0, 0.0)
    assert math.isnan(one.variance)
    assert merged([]) == Moments()


@given(parts)
@settings(max_examples=200)
def test_parts_give_what_numpy_gives_on_the_pooled_values(values: list[list[float]]) -> None:
    whole = merged([Moments.of(np.array(part, float)) for part in values])
    pooled = np.concatenate([np.empty(0), *map(np.array, values)])
    assert whole.count == pooled.size
    scale = float(np.abs(pooled).max(initial=1.0))
    assert whole.total == pytest.approx(pooled.sum(), abs=1e-12 * scale * max(1, pooled.size))
    if pooled.size > 1:
        assert whole.variance == pytest.approx(pooled.var(ddof=1), rel=1e-9, abs=1e-12 * scale**2)


@given(st.permutations(range(7)))
@settings(max_examples=30)
def test_the_order_of_parts_changes_rounding_only(order: list[int]) -> None:
    columns = [np.random.default_rng(seed).normal(seed, 2, 50) for seed in range(7)]
    one, other = (merged([Moments.of(columns[index]) for index in those]) for those in (range(7), order))
    assert other.m2 == pytest.approx(one.m2, rel=1e-13)
    assert other.mean == pytest.approx(one.mean, rel=1e-13)


@pytest.mark.parametrize("shift", [0.0, 1e9, -1e12])
def test_a_large_mean_costs_no_digits(shift: Any) -> None:
    """Sums of squares about zero would lose all of them: (1e12)² has no room for a variance of 1."""
    x = np.random.default_rng(0).integers(-8, 9, 3000) + shift
    whole = merged([Moments.of(part) for part in np.split(x, 30)])
    assert whole.variance == pytest.approx((x - shift).var(ddof=1), rel=1e-6)
