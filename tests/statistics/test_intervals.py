from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from hanse.errors import ConfigError
from hanse.statistics.error_rates import eer, rates
from hanse.statistics.intervals import Units, beta_cdf, bootstrap, bounds, clopper_pearson, resampled_sums, resampled_weights, wilson

SHARES = st.integers(1, 5000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials)))
LEVELS = st.sampled_from([0.9, 0.95, 1 - 2 * 0.05 / 3])


@settings(max_examples=60, deadline=None)
@given(SHARES, LEVELS)
def test_binomial_intervals_are_scipys(share, level):
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        theirs = stats.binomtest(*share).proportion_ci(level, method=method)
        assert_allclose(ours(*share, level=level), theirs, rtol=1e-8, atol=1e-9)


@given(st.floats(0, 1), st.floats(0.5, 4000), st.floats(0.5, 4000))
def test_the_incomplete_beta_function_is_scipys(x, a, b):
    assert_allclose(beta_cdf(x, a, b), stats.beta.cdf(x, a, b), rtol=1e-8, atol=1e-12)


def test_no_failures_in_n_trials():
    assert clopper_pearson(0, 100) == (0.0, pytest.approx(1 - 0.025 ** (1 / 100)))  # (1 - p)¹⁰⁰ = 0.025
    assert clopper_pearson(100, 100)[1] == 1.0
    assert all(map(math.isnan, wilson(0, 0)))


@pytest.mark.parametrize(("successes", "trials", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_shares_that_are_none(successes, trials, level):
    for interval in (wilson, clopper_pearson):
        with pytest.raises(ConfigError):
            interval(successes, trials, level=level)


def test_bounds_are_draws():
    assert bounds(np.arange(1000.0), level=0.9) == (49.0, 950.0)  # positions 49.95 and 949.05, to the outside
    assert bounds(np.array([2.0])) == (2.0, 2.0)


def some_rows(n: int = 600) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = (np.arange(n) % 3 == 0).astype(int)
    return np.clip(0.35 + 0.3 * labels + rng.normal(0, 0.15, n), 0, 1), labels


def test_draws_are_spread_as_those_of_resampled_rows():
    scores, labels = some_rows()
    draws = bootstrap(scores, labels, 0.5, resamples=4000, rng=np.random.default_rng(0))
    rng, slow = np.random.default_rng(1), []
    for _ in range(1500):
        chosen = np.concatenate([rng.choice(np.flatnonzero(labels == label), (labels == label).sum()) for label in (0, 1)])
        at = rates(scores[chosen], labels[chosen], 0.5)
        slow.append([at.fpr, at.fnr, at.hter, at.accuracy, eer(scores[chosen], labels[chosen])[0]])
    for name, column in zip(("fpr", "fnr", "hter", "accuracy", "eer"), np.array(slow).T, strict=True):
        assert_allclose(draws[name].mean(), column.mean(), atol=0.002)
        assert_allclose(draws[name].std(), column.std(), rtol=0.08)


def test_by_group_they_are_spread_as_those_of_resampled_groups():
    scores, labels = some_rows()
    groups = [str(row // 20) for row in range(600)]
    draws = bootstrap(scores, labels, 0.5, resamples=4000, rng=np.random.default_rng(0), groups=groups)
    rng, slow = np.random.default_rng(1), []
    for _ in range(1500):
        chosen = np.concatenate([np.arange(20 * group, 20 * group + 20) for group in rng.integers(0, 30, 30)])
        slow.append([rates(scores[chosen], labels[chosen], 0.5).hter, eer(scores[chosen], labels[chosen])[0]])
    for name, column in zip(("hter", "eer"), np.array(slow).T, strict=True):
        assert_allclose(draws[name].mean(), column.mean(), atol=0.002)
        assert_allclose(draws[name].std(), column.std(), rtol=0.08)


def test_rows_that_come_together_are_one_row():
    scores, labels = some_rows()
    tenfold = bootstrap(
        np.repeat(scores, 10), np.repeat(labels, 10), 0.5, resamples=3000, rng=np.random.default_rng(0),
        groups=[str(row // 10) for row in range(6000)],
    )  # fmt: skip
    alone = bootstrap(scores, labels, 0.5, resamples=3000, rng=np.random.default_rng(1))
    assert_allclose(tenfold["hter"].std(), alone["hter"].std(), rtol=0.08)


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abcde")), min_size=2, max_size=30), st.booleans())
def test_no_resample_loses_a_class_or_a_stratum(rows, by_group):
    labels, groups = np.array([label for label, _ in rows]), [group for _, group in rows]
    if len(set(labels)) < 2:
        with pytest.raises(ConfigError, match="both classes"):
            Units.of(labels)
        return
    units = Units.of(labels, groups if by_group else None)
    columns = np.stack([labels == 0, labels == 1], axis=1).astype(np.int64)
    sums = resampled_sums(columns, units, resamples=20, rng=np.random.default_rng(0))
    blocks = np.concatenate(list(resampled_weights(units, resamples=20, rng=np.random.default_rng(0))))
    assert sums.shape == (20, 2)
    assert blocks.shape == (20, len(rows))
    assert (sums > 0).all()
    assert (blocks @ columns > 0).all()
    if not by_group:
        assert_array_equal(sums, np.broadcast_to(columns.sum(axis=0), (20, 2)))
        assert_array_equal(blocks @ columns, np.broadcast_to(columns.sum(axis=0), (20, 2)))
    else:
        for group in set(groups):  # rows of a group have the same weight
            assert (blocks[:, [row for row, name in enumerate(groups) if name == group]].std(axis=1) == 0).all()


def test_groups_of_another_length():
    with pytest.raises(ConfigError, match="2 rows, and groups of 1"):
        Units.of(np.array([0, 1]), ["a"])
