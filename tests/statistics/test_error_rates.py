from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from sklearn.metrics import accuracy_score, confusion_matrix, roc_curve

from hanse.errors import ConfigError
from hanse.statistics.error_rates import eer, metric, rates, weighted_eer

COARSE = st.integers(0, 8).map(lambda eighths: eighths / 8)  # so that scores are often equal
ROWS = st.lists(st.tuples(COARSE, st.integers(0, 1)), min_size=2, max_size=40)
BOTH = ROWS.filter(lambda rows: {label for _, label in rows} == {0, 1})


def columns(rows: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in rows]), np.array([label for _, label in rows])


def slow_eer(scores: np.ndarray, labels: np.ndarray) -> float:
    """Along scikit-learn's ROC, where FNR - FPR changes sign, on the straight line."""
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    fnr, fpr = (1 - tpr)[::-1], fpr[::-1]  # thresholds rising
    at = next(place for place in range(1, len(fpr)) if fnr[place] >= fpr[place])
    share = (fpr[at - 1] - fnr[at - 1]) / ((fpr[at - 1] - fnr[at - 1]) + (fnr[at] - fpr[at]))
    return float(fnr[at - 1] + share * (fnr[at] - fnr[at - 1]))


def test_rates_by_hand():
    scores, labels = np.array([0.1, 0.5, 0.9, 0.2, 0.6]), np.array([0, 0, 0, 1, 1])
    found = rates(scores, labels, 0.5)  # the score 0.5 counts as positive: two of three negatives are wrong, one of two positives
    assert_allclose([found.fpr, found.fnr, found.hter, found.error, found.accuracy], [2 / 3, 1 / 2, 7 / 12, 3 / 5, 2 / 5])
    assert (found.positives, found.negatives) == (2, 3)


def test_equal_error_rate_by_hand():
    # thresholds between 0.4 | 0.6: FPR 1/3, FNR 1/3, and so is the rate
    assert eer(np.array([0.1, 0.2, 0.6, 0.4, 0.8, 0.9]), np.array([0, 0, 0, 1, 1, 1])) == (pytest.approx(1 / 3), pytest.approx(0.5))
    # one score for all: the line from (FNR 0, FPR 1) to (1, 0)
    assert eer(np.array([0.3, 0.3]), np.array([0, 1])) == (0.5, np.nextafter(0.3, 1))


def test_the_threshold_of_separable_scores_lies_in_the_middle():
    assert eer(np.array([0.2, 0.6]), np.array([0, 1])) == (0.0, pytest.approx(0.4))


@given(BOTH)
def test_equal_error_rate_is_that_on_scikit_learns_curve(rows):
    scores, labels = columns(rows)
    assert_allclose(eer(scores, labels)[0], slow_eer(scores, labels), atol=1e-12)


@given(BOTH)
def test_at_its_threshold_fnr_has_just_passed_fpr(rows):
    scores, labels = columns(rows)
    threshold = eer(scores, labels)[1]
    found = rates(scores, labels, threshold)
    assert found.fnr >= found.fpr
    assert threshold not in scores
    below = scores[scores < threshold]
    assert len(below)
    before = rates(scores, labels, below.max())
    assert before.fnr < before.fpr


@given(ROWS, COARSE)
def test_rates_are_scikit_learns(rows, threshold):
    scores, labels = columns(rows)
    decided = scores >= threshold
    (tn, fp), (fn, tp) = confusion_matrix(labels, decided, labels=[0, 1])
    found = rates(scores, labels, threshold)
    assert_allclose(found.fpr, fp / (fp + tn) if fp + tn else math.nan)
    assert_allclose(found.fnr, fn / (fn + tp) if fn + tp else math.nan)
    assert_allclose(found.accuracy, accuracy_score(labels, decided))
    assert found.error == pytest.approx(1 - found.accuracy)


@given(BOTH, st.randoms())
def test_the_order_of_rows_does_not_matter(rows, random):
    mixed = random.sample(rows, len(rows))
    assert eer(*columns(mixed)) == eer(*columns(rows))
    assert rates(*columns(mixed), 0.5) == rates(*columns(rows), 0.5)


@given(BOTH, st.data())
def test_a_weight_is_so_many_copies_of_a_row(rows, data):
    weights = np.array([data.draw(st.integers(1, 3)) for _ in rows])
    scores, labels = columns(rows)
    copied = eer(np.repeat(scores, weights), np.repeat(labels, weights))[0]
    assert_allclose(weighted_eer(scores, labels, np.stack([np.ones_like(weights), weights])), [eer(scores, labels)[0], copied], atol=1e-12)


@given(BOTH)
def test_a_row_of_weight_zero_is_not_there(rows):
    scores, labels = columns([*rows, (0.5, 0)])
    weights = np.array([[1] * len(rows) + [0]])
    assert_allclose(weighted_eer(scores, labels, weights), eer(*columns(rows))[0], atol=1e-12)


def test_metrics_by_name():
    scores, labels = np.array([0.1, 0.5, 0.9, 0.2, 0.6]), np.array([0, 0, 0, 1, 1])
    assert metric("hter", scores, labels, 0.5) == pytest.approx(7 / 12)
    assert metric("eer", scores, labels, 0.0) == eer(scores, labels)[0]


def test_an_absent_class_is_not_a_rate_of_zero():
    found = rates(np.array([0.9]), np.array([1]), 0.5)
    assert (found.fnr, found.accuracy) == (0, 1)
    assert math.isnan(found.fpr)
    assert math.isnan(found.hter)
    assert all(map(math.isnan, eer(np.array([0.9]), np.array([1]))))
    assert math.isnan(rates(np.array([]), np.array([]), 0.5).accuracy)


@pytest.mark.parametrize(
    ("scores", "labels", "says"),
    [
        ([0.1, math.nan], [0, 1], "row 1 has the score nan"),
        ([1.5, 0], [0, 1], "row 0 has the score 1.5"),
        ([0.1, 0.2], [0, -1], "row 1 has the label -1"),
        ([0.1], [0, 1], r"shape \(1,\) and labels \(2,\)"),
    ],
)
def test_rows_that_are_none(scores, labels, says):
    with pytest.raises(ConfigError, match=says):
        rates(np.array(scores), np.array(labels), 0.5)
