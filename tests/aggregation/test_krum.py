from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from hanse.aggregation.krum import Bulyan, Krum, MultiKrum, mean_about_median
from hanse.errors import ConfigError, TooFewUpdates

F32 = np.float32


def plain_order(stack: np.ndarray, f: int) -> list[int]:
    scores = []
    for i, row in enumerate(stack):
        to_others = sorted(float(((row - other).astype(float) ** 2).sum()) for j, other in enumerate(stack) if j != i)
        scores.append((sum(to_others[: max(1, len(stack) - f - 2)]), sum(to_others)))
    return sorted(range(len(stack)), key=lambda i: scores[i])


def plain_bulyan(stack: np.ndarray, f: int) -> np.ndarray:
    left, chosen = list(range(len(stack))), []
    while len(chosen) < len(stack) - 2 * f:
        chosen.append(left.pop(plain_order(stack[left], f)[0]))
    column_means = []
    for column in stack[chosen].T.astype(float):
        closest = sorted(column, key=lambda value: abs(value - np.median(column)))
        column_means.append(np.mean(closest[: len(chosen) - 2 * f]))
    return np.array(column_means)


def test_krum_takes_the_update_closest_to_its_neighbours(combine):
    # squared distances to the closest two others: 1 + 9, 1 + 4, 4 + 9, 25 + 36, far
    result = combine(Krum(1), [[0], [1], [3], [8], [1000]])
    assert (result.params["w"], result.meta) == (1, {"chosen": ["site-001"]})


def test_multi_krum_takes_the_mean_of_the_best(combine):
    result = combine(MultiKrum(1, 2), [[0], [1], [3], [8], [1000]])
    assert (result.params["w"], result.meta["chosen"]) == (0.5, ["site-000", "site-001"])
    assert combine(MultiKrum(1), [[0], [1], [3], [8], [1000]]).meta == result.meta  # sites - f - 2


def test_of_equal_scores_the_first_name_wins(combine):
    assert combine(Krum(0), [[1], [1], [1]]).meta["chosen"] == ["site-000"]


def test_krum_gives_one_update_bit_for_bit(combine):
    rng = np.random.default_rng(1)
    rows = [{"w": rng.standard_normal(9).astype(F32), "n": np.array(k), "z": rng.standard_normal(2) * 1j} for k in range(7)]
    result = combine(Krum(2), rows)
    chosen = rows[int(result.meta["chosen"][0][-3:])]
    assert all(np.array_equal(result.params[name], chosen[name]) and result.params[name].dtype == chosen[name].dtype for name in chosen)


def test_integers_have_no_say_in_distances(combine):
    rows = [{"w": np.array([value], F32), "n": np.array([n])} for value, n in [(0, 0), (1, 10**6), (3, 0), (8, 0), (1000, 0)]]
    assert combine(Krum(1), rows).meta["chosen"] == ["site-001"]


@given(st.integers(0, 2), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_as_the_plain_reference_does(combine, f, seed):
    stack = np.random.default_rng(seed).standard_normal((4 * f + 4, 6)).astype(F32)
    best = plain_order(stack, f)[: len(stack) - f - 2]
    assert_array_equal(combine(Krum(f), stack).params["w"], stack[best[0]])
    assert_allclose(combine(MultiKrum(f), stack).params["w"], stack[best].mean(axis=0), rtol=1e-4, atol=1e-6)
    assert_allclose(combine(Bulyan(f), stack).params["w"], plain_bulyan(stack, f), rtol=1e-4, atol=1e-6)


@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("rule", [Krum(1), MultiKrum(1), Bulyan(1)])
def test_who_sent_what_does_not_matter_nor_where_the_origin_is(combine, rule, seed, random):
    stack = np.random.default_rng(seed).standard_normal((7, 3)).astype(F32)
    result = combine(rule, stack).params["w"]
    shuffled = list(stack)
    random.shuffle(shuffled)
    assert_allclose(combine(rule, shuffled).params["w"], result, rtol=1e-5, atol=1e-6)
    assert_allclose(combine(rule, stack * F32(4)).params["w"], result * 4, rtol=1e-5, atol=1e-6)
    assert_allclose(combine(rule, stack + F32(100)).params["w"], result + 100, rtol=1e-5)
    assert_array_equal(combine(rule, stack, reference=np.ones(3)).params["w"], result)  # distances are measured from there


@given(arrays(F32, (7, 3), elements=st.floats(-9, 9, width=32)), st.integers(1, 7))
@settings(deadline=None)
def test_the_mean_about_the_median_is_of_the_closest(stack, closest):
    ordered = np.sort(stack, axis=0)
    median = ordered[3]
    for column, mean in enumerate(mean_about_median(list(ordered), closest)):
        distances = np.sort(np.abs(ordered[:, column] - median[column]))
        windows = [ordered[low : low + closest, column] for low in range(8 - closest)]
        right = [window.mean() for window in windows if np.abs(window - median[column]).max() <= distances[closest - 1] + 1e-5]
        assert min(abs(mean - other) for other in right) < 1e-4


@pytest.mark.parametrize(
    ("rule", "needs"), [(Krum(0), 3), (Krum(2), 7), (MultiKrum(1), 5), (MultiKrum(1, 4), 7), (Bulyan(0), 3), (Bulyan(2), 11)]
)
def test_too_few_updates(combine, rule, needs):
    assert rule.needs == needs
    with pytest.raises(TooFewUpdates, match=f"at least {needs} .* there are {needs - 1}"):
        combine(rule, [[k] for k in range(needs - 1)])
    combine(rule, [[k] for k in range(needs)])


@pytest.mark.parametrize("arguments", [{"f": -1}, {"f": 1.5}, {"f": True}, {"f": 1, "m": 0}])
def test_counts_must_be_whole(arguments):
    with pytest.raises(ConfigError, match="whole number"):
        MultiKrum(**arguments)
