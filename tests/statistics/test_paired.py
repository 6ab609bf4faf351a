from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from hanse.errors import ConfigError
from hanse.statistics.error_rates import metric
from hanse.statistics.intervals import bounds
from hanse.statistics.paired import Changes, changes, holm, mcnemar, needed_per_class, paired_bootstrap

COUNT = st.integers(0, 300)


def two_versions(n: int = 900) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    labels = (np.arange(n) % 3 == 0).astype(int)
    old = np.clip(0.35 + 0.3 * labels + rng.normal(0, 0.15, n), 0, 1)
    return old, np.clip(old + rng.normal(0.01, 0.05, n), 0, 1), labels


def draws_of(name, *, groups=None, resamples=4000, seed=0):
    old, new, labels = two_versions()
    rng = np.random.default_rng(seed)
    return paired_bootstrap(name, old, new, labels, old_threshold=0.5, new_threshold=0.52, resamples=resamples, rng=rng, groups=groups)


@pytest.mark.parametrize("name", ["hter", "fpr", "fnr", "error", "eer"])
@pytest.mark.parametrize("by_group", [False, True])
def test_draws_are_spread_as_those_of_resampled_rows(name, by_group):
    old, new, labels = two_versions()
    draws = draws_of(name, groups=[str(row // 30) for row in range(900)] if by_group else None)
    rng, slow = np.random.default_rng(1), []
    for _ in range(1000):
        if by_group:
            chosen = np.concatenate([np.arange(30 * group, 30 * group + 30) for group in rng.integers(0, 30, 30)])
        else:
            chosen = np.concatenate([rng.choice(np.flatnonzero(labels == label), (labels == label).sum()) for label in (0, 1)])
        slow.append(metric(name, new[chosen], labels[chosen], 0.52) - metric(name, old[chosen], labels[chosen], 0.5))
    assert_allclose(draws.mean(), np.mean(slow), atol=0.0015)
    assert_allclose(draws.std(), np.std(slow), rtol=0.1)


def test_one_version_twice_is_equal_but_not_surely():
    old, _, labels = two_versions()
    same = {"old_threshold": 0.5, "new_threshold": 0.5, "resamples": 4000}
    draws = paired_bootstrap("fpr", old, old, labels, rng=np.random.default_rng(0), **same)
    low, high = bounds(draws)
    assert low < 0 < high <= 5 / 600  # 600 negatives, and one imaginary change to either side
    assert (paired_bootstrap("eer", old, old, labels, rng=np.random.default_rng(0), **same) == 0).all()


def test_a_seed_gives_the_same_draws():
    for name in ("hter", "eer"):
        assert (draws_of(name, resamples=100) == draws_of(name, resamples=100)).all()
        assert (draws_of(name, resamples=100) != draws_of(name, resamples=100, seed=1)).any()


def test_accuracy_is_not_for_the_gate():
    with pytest.raises(ConfigError, match="metric is 'accuracy'"):
        draws_of("accuracy")


def test_changes_by_hand():
    labels = np.array([1, 1, 1, 0, 0])
    old, new = np.array([0.9, 0.9, 0.1, 0.9, 0.1]), np.array([0.1, 0.9, 0.9, 0.9, 0.7])
    at = {"old_threshold": 0.5, "new_threshold": 0.6}
    assert changes(old, new, labels, **at) == Changes(worse=2, better=1)
    assert changes(old, new, labels, **at, groups=["a", "a", "a", "b", "b"]) == Changes(worse=1, better=0)  # in a they cancel


@given(COUNT, COUNT)
def test_mcnemar_is_scipys_binomial_test(worse, better):
    p = mcnemar(Changes(worse, better))
    assert_allclose(p, stats.binomtest(worse, worse + better).pvalue if worse + better else 1, rtol=1e-9)
    assert p == mcnemar(Changes(better, worse))


def test_holm_by_hand():
    # 0.01 · 3, then max(0.03, 0.02 · 2), then max(0.04, 0.03 · 1)
    assert holm({"b": 0.02, "a": 0.01, "c": 0.03}) == {"b": pytest.approx(0.04), "a": pytest.approx(0.03), "c": pytest.approx(0.04)}
    assert holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_lies_between_the_raw_and_bonferronis(p_values):
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    for name, p in p_values.items():
        assert p <= adjusted[name] <= min(1, len(p_values) * p)
        assert all(adjusted[name] <= adjusted[other] for other in p_values if p < p_values[other])


def test_needed_rows():
    assert needed_per_class(0.01, 0.005) == 2474  # (1.645 + 0.842)² · 0.01 / 0.005²
    assert needed_per_class(0.01, 0.005, alpha=0.05 / 3) > 2474
    assert needed_per_class(0.0, 0.005) == 0
    with pytest.raises(ConfigError):
        needed_per_class(0.01, 0)
