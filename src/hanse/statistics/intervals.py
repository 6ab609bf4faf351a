"""How sure a rate is: intervals of binomial shares, and the bootstrap, stratified by class or by group.

n = rows, k = counted columns, R = resamples
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

from hanse.errors import ConfigError
from hanse.statistics.error_rates import Array, checked, weighted_eer, wrong

_ELEMENTS = 1 << 17  # of one block of weights


def normal_quantile(probability: float) -> float:
    """z with P(Z ≤ z) = probability, Z standard normal."""
    return NormalDist().inv_cdf(probability)


def wilson(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (JASA 1927). NaN both without trials."""
    _check(successes, trials, level)
    if trials == 0:
        return math.nan, math.nan
    z = normal_quantile((1 + level) / 2)
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def clopper_pearson(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson, Biometrika 1934): each end errs at most (1 - level) / 2. NaN: no trials."""
    _check(successes, trials, level)
    if trials == 0:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _beta_quantile(tail, successes, trials - successes + 1)
    high = 1.0 if successes == trials else _beta_quantile(1 - tail, successes + 1, trials - successes)
    return low, high


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22) with Lentz's method. a, b: above 0.

    P(X ≤ k) of a binomial of n trials with share p is I_{1-p}(n - k, k + 1).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges quickly on the other side
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    d = 1 / (1 - (a + b) * x / (a + 1) or tiny)
    c, fraction = 1.0, d
    for m in range(1, 100_000):
        for step in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)), -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            d = 1 / (1 + step * d or tiny)
            c = 1 + step / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return min(1.0, front * fraction)


def bounds(draws: Array, *, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of a bootstrap's draws, shape (R,). Each end is one of the draws, the outer one if it falls between two."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, tail, method="lower"), np.quantile(draws, 1 - tail, method="higher")
    return float(low), float(high)


def bootstrap(
    scores: Array, labels: Array, threshold: float, *, resamples: int, rng: np.random.Generator, groups: Sequence[str] | None = None
) -> dict[str, Array]:
    """Draws of fpr, fnr, hter, accuracy and eer, each float64 of shape (R,): rows resampled within each class (Efron, Ann. Stat. 1979).

    groups: what each row belongs to, if rows of a group come together; then whole groups are resampled, within those of only negatives,
        of only positives, and of both.
    Raises: ConfigError if a class is absent.
    """
    scores, labels = checked(scores, labels)
    missed = wrong(scores, labels, threshold)
    columns = np.stack([labels == 0, labels == 1, missed & (labels == 0), missed & (labels == 1)], axis=1).astype(np.int64)
    units = Units.of(labels, groups)
    negatives, positives, false_positives, false_negatives = resampled_sums(columns, units, resamples=resamples, rng=rng).T
    fpr, fnr = false_positives / negatives, false_negatives / positives
    accuracy = 1 - (false_positives + false_negatives) / (negatives + positives)
    eers = [weighted_eer(scores, labels, weights) for weights in resampled_weights(units, resamples=resamples, rng=rng)]
    return {"fpr": fpr, "fnr": fnr, "hter": (fpr + fnr) / 2, "accuracy": accuracy, "eer": np.concatenate(eers)}


class Units:
    """What a bootstrap draws: single rows, or groups of rows that belong together.

    of_row: the unit of each row, int64, shape (n,). strata: of each unit, the stratum it is drawn in.
    """

    def __init__(self, of_row: Array, strata: Array) -> None:
        self.of_row, self.strata = of_row, strata

    @classmethod
    def of(cls, labels: Array, groups: Sequence[str] | None = None) -> Units:
        """Strata are classes; of groups, which classes they hold. Raises ConfigError if a class is absent or groups do not fit the rows."""
        if len(np.unique(labels)) < 2:
            raise ConfigError("a bootstrap needs rows of both classes")
        if groups is None:
            return cls(np.arange(len(labels)), labels)
        if len(groups) != len(labels):
            raise ConfigError(f"there are {len(labels):,} rows, and groups of {len(groups):,}")
        of_row = np.unique(np.asarray(groups, str), return_inverse=True)[1]
        positives, rows = np.bincount(of_row, labels), np.bincount(of_row)
        return cls(of_row, np.where(positives == 0, 0, np.where(positives < rows, 1, 2)))


def resampled_sums(columns: Array, units: Units, *, resamples: int, rng: np.random.Generator) -> Array:
    """The columns' sums over each resample. columns: int, shape (n, k). Returns: int64, shape (R, k).

    Units with the same sums are the same to the result, so how often each kind is drawn is drawn at once: a multinomial count.
    """
    sums = np.zeros((len(units.strata), columns.shape[1]), np.int64)
    np.add.at(sums, units.of_row, columns)
    total = np.zeros((resamples, columns.shape[1]), np.int64)
    for stratum in np.unique(units.strata):
        kinds, counts = np.unique(sums[units.strata == stratum], axis=0, return_counts=True)
        total += rng.multinomial(counts.sum(), counts / counts.sum(), size=resamples) @ kinds
    return total


def resampled_weights(units: Units, *, resamples: int, rng: np.random.Generator) -> Iterator[Array]:
    """How often each row is in each resample, in blocks: int64, shape (some of R, n)."""
    members = [np.flatnonzero(units.strata == stratum) for stratum in np.unique(units.strata)]
    size, block = len(units.strata), max(1, _ELEMENTS // len(units.of_row))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = np.concatenate([of[rng.integers(0, len(of), (rows, len(of)))] for of in members], axis=1)
        counts = np.bincount((drawn + size * np.arange(rows)[:, None]).reshape(-1), minlength=rows * size)
        yield counts.reshape(rows, size)[:, units.of_row]


def _check(successes: int, trials: int, level: float) -> None:
    if not 0 <= successes <= trials:
        raise ConfigError(f"{successes} of {trials} is no share")
    if not 0 < level < 1:
        raise ConfigError(f"level is {level!r}: it must be between 0 and 1")


def _beta_quantile(probability: float, a: float, b: float) -> float:
    """By bisection, to the last bit that it can tell."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if beta_cdf(middle, a, b) < probability else (low, middle)
    return low
