from __future__ import annotations

from fractions import Fraction
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


def test_noise_moves_mean_and_variance_as_much_as_so_many_rows_would() -> None:
    """By s / n and √2 s² / n, times 5 of 1000 rows."""
    exact, rng = Moments.of(np.random.default_rng(0).normal(7.0, 2.0, 1000)), np.random.default_rng(1)
    noisy = [Disclosure(count_noise=5.0).noisy(exact, rng) for _ in range(4000)]
    share = 5 / 1000
    drawn = np.array([[each.count, each.mean, each.variance] for each in noisy])
    assert drawn.mean(axis=0) == pytest.approx([1000, exact.mean, exact.variance], rel=1e-3)
    spread = [5, share * exact.variance**0.5, share * 2**0.5 * exact.variance]
    assert drawn.std(axis=0) == pytest.approx(spread, rel=0.05)
    assert Disclosure().noisy(exact, rng) == exact


def test_the_mean_of_whole_numbers_does_not_tell_the_count_through_the_noise() -> None:
    """An exact mean is a fraction, and its denominator divides the count: that told 195 of 200."""
    told = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        ages = rng.integers(18, 90, rng.integers(50, 2000)).astype(float)
        noisy = Disclosure(count_noise=5.0).noisy(Moments.of(ages), rng)
        part = Fraction(noisy.mean).limit_denominator(5000).denominator
        told += [count for count in range(part, 10_000, part) if abs(count - noisy.count) <= 15] == [len(ages)]
    assert told < 20


def test_noise_on_few_values() -> None:
    for values in ([], [3.0], [3.0, 3.0]):
        noisy = Disclosure(count_noise=5.0, min_count=4).noisy(Moments.of(np.array(values)), np.random.default_rng(0))
        assert noisy.count >= 4
        assert noisy.total == pytest.approx(noisy.count * 3.0 if values else 0.0)
        assert noisy.m2 == 0.0


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


RULES = st.builds(
    Disclosure,
    min_count=st.integers(1, 30),
    max_bins_share=st.floats(0.01, 2.0),
    extremes=st.booleans(),
    count_noise=st.floats(0, 10),
    range_noise=st.floats(0, 1),
)


@given(RULES, RULES)
def test_the_stricter_rule_wins_whatever_both_say(one: Disclosure, other: Disclosure) -> None:
    both = one.stricter(other)
    for rules in (one, other):
        assert both.min_count >= rules.min_count
        assert both.max_bins_share <= rules.max_bins_share
        assert both.extremes <= rules.extremes
        assert both.count_noise >= rules.count_noise
        assert both.range_noise >= rules.range_noise
    for name in Disclosure.__dataclass_fields__:  # and no stricter than it has to be
        assert getattr(both, name) in (getattr(one, name), getattr(other, name))
    assert both == other.stricter(one)
    assert both.stricter(one) == both


@pytest.mark.parametrize(
    "wrong",
    [{"min_count": 0}, {"min_count": 2.5}, {"max_bins_share": 0}, {"count_noise": -1}, {"range_noise": float("nan")}],
    ids=str,
)
def test_rules_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Disclosure(**wrong)
