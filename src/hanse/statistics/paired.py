"""Two versions on the same rows: how their rates differ, how sure that is, and how many rows it takes.

n = rows, R = resamples
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hanse.errors import ConfigError
from hanse.statistics.error_rates import Array, Metric, checked, weighted_eer, wrong
from hanse.statistics.intervals import Units, beta_cdf, normal_quantile, resampled_sums, resampled_weights

_WEIGHTS = {"hter": (0.5, 0.5), "fpr": (1.0, 0.0), "fnr": (0.0, 1.0)}


class Changes(NamedTuple):
    """Of the rows, or of groups as wholes: how many are decided worse by the new version, and how many better."""

    worse: int
    better: int


def paired_bootstrap(
    metric: Metric,
    old_scores: Array,
    new_scores: Array,
    labels: Array,
    *,
    old_threshold: float,
    new_threshold: float,
    resamples: int,
    rng: np.random.Generator,
    groups: Sequence[str] | None = None,
) -> Array:
    """Draws of new - old of a rate where less is better: float64, shape (R,). Old and new are taken on the same resampled rows.

    Rows are drawn within each class, or by group as in `bootstrap`. A rate at a threshold depends only on how many rows of each class went
    from right to wrong and back, so these counts are drawn, a multinomial. To either count one row is added beforehand: where hardly a
    row differs, the plain bootstrap is too sure of itself. Agresti and Min (Statistics in Medicine 2005) add a half for the same reason;
    with one, the level holds from 300 rows a class on. Nothing is added to groups, nor for eer.
    Raises: ConfigError if a class is absent, or for a metric that is not one of hter, fpr, fnr, error and eer.
    """
    old_scores, labels = checked(old_scores, labels)
    new_scores, _ = checked(new_scores, labels)
    units = Units.of(labels, groups)
    if metric == "eer":
        blocks = resampled_weights(units, resamples=resamples, rng=rng)
        return np.concatenate([weighted_eer(new_scores, labels, block) - weighted_eer(old_scores, labels, block) for block in blocks])
    if metric not in {*_WEIGHTS, "error"}:
        raise ConfigError(f"metric is {metric!r}: it must be hter, fpr, fnr, error or eer")
    change = wrong(new_scores, labels, new_threshold).astype(np.int64) - wrong(old_scores, labels, old_threshold)
    if groups is None:
        sizes = np.bincount(labels, minlength=2)
        changed = np.stack([_redrawn(change[labels == label], resamples, rng) for label in (0, 1)], axis=1)
    else:
        columns = np.stack([labels == 0, labels == 1, change * (labels == 0), change * (labels == 1)], axis=1).astype(np.int64)
        sums = resampled_sums(columns, units, resamples=resamples, rng=rng)
        sizes, changed = sums[:, :2], sums[:, 2:]
    if metric == "error":
        return np.asarray(changed.sum(axis=-1) / sizes.sum(axis=-1))
    return np.asarray((changed / sizes) @ np.array(_WEIGHTS[metric]))


def changes(
    old_scores: Array,
    new_scores: Array,
    labels: Array,
    *,
    old_threshold: float,
    new_threshold: float,
    groups: Sequence[str] | None = None,
) -> Changes:
    """Rows that only the new version decides wrongly, and rows that only the old one does; or groups with more of the one, or the other."""
    change = wrong(new_scores, labels, new_threshold).astype(np.int64) - wrong(old_scores, labels, old_threshold)
    if groups is not None and len(change):
        of_row = np.unique(np.asarray(groups, str), return_inverse=True)[1]
        change = np.bincount(of_row, change)
    return Changes(int((change > 0).sum()), int((change < 0).sum()))


def mcnemar(counts: Changes) -> float:
    """The two-sided p-value of the exact test of McNemar (Psychometrika 1947) that both changes are equally likely; 1 if none is."""
    n, fewer = sum(counts), min(counts)
    return min(1.0, 2 * beta_cdf(0.5, n - fewer, fewer + 1)) if n else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values adjusted for that there are several (Holm, Scandinavian Journal of Statistics 1979), by the same names."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def needed_per_class(d: float, delta: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Rows of each class with which equal versions are accepted with probability `power`: (z_{1-α} + z_power)² · d / δ², rounded up.

    d: n times the variance of the difference, n rows a class. Of fpr or fnr that is the share of rows of that class that the versions
    decide differently; of hter a quarter of the sum of both classes' shares. delta: the margin. alpha: of the one-sided test.
    """
    if d < 0 or delta <= 0:
        raise ConfigError(f"d is {d!r} and delta {delta!r}: d must be at least 0, and delta above 0")
    return math.ceil((normal_quantile(1 - alpha) + normal_quantile(power)) ** 2 * d / delta**2)


def _redrawn(change: Array, resamples: int, rng: np.random.Generator) -> Array:
    """The sum of n changes, each -1, 0 or 1, drawn anew R times from those given and from one of each sign."""
    n, worse, better = len(change), int((change > 0).sum()) + 1, int((change < 0).sum()) + 1
    drawn = rng.multinomial(n, np.array([worse, better, n + 2 - worse - better]) / (n + 2), size=resamples)
    return np.asarray(drawn[:, 0] - drawn[:, 1])
