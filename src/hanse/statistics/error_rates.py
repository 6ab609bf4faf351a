"""Error rates of scores against labels. docs/gate.md has the conventions.

    n = rows, W = weightings of the rows

A score is the probability of class 1, the positive class; a row is decided positive if its score ≥ the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from hanse.errors import ConfigError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Metric: TypeAlias = Literal["hter", "eer", "fpr", "fnr", "error", "accuracy"]


@dataclass(frozen=True, slots=True)
class Rates:
    """What comes of deciding at one threshold, each a share of 1. NaN where no row could count: fpr without negatives, and so on.

    fpr = false positives / negatives; fnr = false negatives / positives; hter = (fpr + fnr) / 2; error = wrong / all = 1 - accuracy.
    """

    fpr: float
    fnr: float
    hter: float
    accuracy: float
    error: float
    positives: int
    negatives: int


def checked(scores: Array, labels: Array) -> tuple[Array, Array]:
    """Scores as float64 and labels as int64, both of shape (n,). Raises ConfigError, naming the first row that is wrong."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise ConfigError(f"scores have shape {scores.shape} and labels {labels.shape}: both must be (rows,)")
    if not (fine := (scores >= 0) & (scores <= 1)).all():
        row = int(np.argmin(fine))
        raise ConfigError(f"row {row} has the score {scores[row]}: a score is a probability, from 0 to 1")
    if not (fine := (labels == 0) | (labels == 1)).all():
        row = int(np.argmin(fine))
        raise ConfigError(f"row {row} has the label {labels[row]}: it must be 0 or 1.", hint="Leave out rows whose label is unknown.")
    return scores, labels.astype(np.int64)


def wrong(scores: Array, labels: Array, threshold: float) -> Array:
    """Which rows are decided wrongly: bool, shape (n,)."""
    return np.asarray((scores >= threshold) != (labels == 1))


def rates(scores: Array, labels: Array, threshold: float) -> Rates:
    """The rates at a threshold that was fixed elsewhere. scores: float in [0, 1], shape (n,); labels: 0 or 1, shape (n,)."""
    scores, labels = checked(scores, labels)
    missed, positive = wrong(scores, labels, threshold), labels == 1
    positives, n = int(positive.sum()), len(labels)
    fpr, fnr = _share(missed[~positive].sum(), n - positives), _share(missed[positive].sum(), positives)
    error = _share(missed.sum(), n)
    accuracy = _share(n - missed.sum(), n)
    return Rates(fpr, fnr, (fpr + fnr) / 2, accuracy, error, positives, n - positives)


def eer(scores: Array, labels: Array) -> tuple[float, float]:
    """The equal error rate, and the threshold there; NaN both if a class is absent.

    Along the rising thresholds FNR - FPR rises from -1 to 1. The rate is where the straight line between the two points around its change
    of sign has FNR = FPR. The threshold is the middle of the two scores that these points lie at, so that no score lies on it.
    """
    scores, labels = checked(scores, labels)
    if len(np.unique(labels)) < 2:
        return math.nan, math.nan
    ordered = np.sort(scores)
    rate, crossing = _crossing(scores, labels, np.ones((1, len(labels)), np.int64))
    above = int(crossing[0])  # rows below the upper of the two points
    low, high = ordered[above - 1], ordered[above] if above < len(ordered) else np.inf
    middle = (low + high) / 2 if np.isfinite(high) else np.inf
    return float(rate[0]), float(middle if low < middle < high else np.nextafter(low, 2))


def weighted_eer(scores: Array, labels: Array, weights: Array) -> Array:
    """The equal error rate of each of many weightings of the rows, such as a bootstrap's counts.

    scores, labels: shape (n,), as `checked` gives them. weights: int, shape (W, n), both classes with a sum above 0.
    Returns: float64, shape (W,).
    """
    return _crossing(scores, labels, weights)[0]


def metric(name: Metric, scores: Array, labels: Array, threshold: float) -> float:
    """One rate by its name; `eer` does not look at the threshold."""
    return eer(scores, labels)[0] if name == "eer" else float(getattr(rates(scores, labels, threshold), name))


def _crossing(scores: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
    """Of each weighting the equal error rate, and how many rows lie below the threshold at which FNR ≥ FPR first."""
    order = np.argsort(scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last row of each distinct score
    weights = weights[:, order]
    below_positive = np.cumsum(weights * labels[order], axis=1)[:, ends]
    below_negative = np.cumsum(weights, axis=1)[:, ends] - below_positive
    fnr = below_positive / below_positive[:, -1:]
    fpr = (below_negative[:, -1:] - below_negative) / below_negative[:, -1:]
    upper = np.argmax(fnr >= fpr, axis=1)  # the last has FNR = 1 and FPR = 0
    each, lower = np.arange(len(weights)), np.maximum(upper - 1, 0)
    first = upper == 0  # then the lower point is where all is decided positive: FNR = 0 and FPR = 1
    fnr_low, fpr_low = np.where(first, 0.0, fnr[each, lower]), np.where(first, 1.0, fpr[each, lower])
    fnr_high, fpr_high = fnr[each, upper], fpr[each, upper]
    share = (fpr_low - fnr_low) / (fpr_low - fnr_low + fnr_high - fpr_high)
    return fnr_low + share * (fnr_high - fnr_low), ends[upper] + 1


def _share(count: int, of: int) -> float:
    return float(count / of) if of else math.nan
