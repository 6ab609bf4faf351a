"""Has the data changed? Distances between a window of inputs and a reference of which only means are known.

Both distances are between two means of a vector that each input has: for Kolmogorov–Smirnov the steps of its score on a grid of quantiles,
for MMD the random Fourier features of its embedding. So a reference is a few means, a mixture of classes is a mixture of means, and one
resampling calibrates both.

n = inputs, d = numbers in an embedding, c = cells of a sketch, f = Fourier features, w = window sizes, a = levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hanse.errors import ConfigError
from hanse.seeds import seed_for

Array = np.ndarray[Any, np.dtype[Any]]

POINTS = 200
FEATURES = 512
_ROWS = 256  # resamples computed at a time


def quantile_sketch(scores_n: Array, points: int = POINTS) -> Array:
    """float64, shape (points,): the scores at the levels (i + ½) / points, each one of the scores itself."""
    return np.quantile(np.asarray(scores_n, np.float64), (np.arange(points) + 0.5) / points, method="inverted_cdf")


def cells(scores_n: Array, sketch: Array) -> Array:
    """int64, shape (n,): where each score lies on the sketch: the number of points below it plus the number not above it.

    There are c = 2 · points + 1 cells: the sketch's points and the gaps between them, so that scores that occur often are told apart.
    """
    return np.searchsorted(sketch, scores_n, "left") + np.searchsorted(sketch, scores_n, "right")


def steps(scores_n: Array, sketch: Array) -> Array:
    """float32, shape (n, c): 1 in the score's cell and all after it. Their mean over inputs is the distribution function on the cells."""
    return (cells(scores_n, sketch)[:, None] <= np.arange(2 * sketch.size + 1)).astype(np.float32)


def kolmogorov_smirnov(first_c: Array, second_c: Array) -> float:
    """The largest distance of two distribution functions on the cells of one sketch.

    Against the sketch's own, it is the two-sample statistic of Kolmogorov and Smirnov between the scores and the sketch's points: between
    two points the one function is flat and the other rises, so that the distance is largest at an end.
    """
    return float(np.abs(np.asarray(first_c, np.float64) - second_c).max())


def median_distance(embeddings_nd: Array, *, rng: np.random.Generator, rows: int = 500) -> float:
    """The median Euclidean distance between two of at most `rows` embeddings: the usual width of a Gaussian kernel.

    Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012, §8. Raises ConfigError if most embeddings are the same.
    """
    sample = np.asarray(embeddings_nd, np.float64)
    if len(sample) > rows:
        sample = sample[rng.choice(len(sample), rows, replace=False)]
    squares = (sample**2).sum(1)
    distances2 = squares[:, None] + squares - 2 * sample @ sample.T
    median = float(np.sqrt(np.median(np.maximum(distances2[np.triu_indices(len(sample), 1)], 0))))
    if not median > 1e-12:
        raise ConfigError("more than half of the embeddings are the same: they cannot tell inputs apart")
    return median


def frequencies(seed: int, dimension: int, bandwidth: float, features: int = FEATURES) -> Array:
    """float64, shape (features / 2, d): draws of N(0, 1 / bandwidth²), the spectrum of the kernel exp(−|x − y|² / (2 · bandwidth²)).

    They come from the generator's raw bits by Box and Muller's formula: NumPy promises to keep those, and not its normal numbers, and both
    parties need the same.
    """
    half = features // 2 * dimension
    raw = np.random.PCG64(seed_for(seed, "drift", "frequencies")).random_raw(2 * half)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    normal = np.sqrt(-2 * np.log(uniform[:half])) * np.cos(2 * np.pi * uniform[half:])
    return np.asarray(normal.reshape(features // 2, dimension) / bandwidth)


def fourier_features(embeddings_nd: Array, frequencies_fd: Array) -> Array:
    """float32, shape (n, f): cosines, then sines, scaled so that the product of two rows approximates the kernel.

    Rahimi and Recht, Random Features for Large-Scale Kernel Machines, NeurIPS 2007, in the form with both, which Sutherland and Schneider
    (On the Error of Random Fourier Features, UAI 2015) prefer.
    """
    angles = np.asarray(embeddings_nd, np.float64) @ frequencies_fd.T
    scale = 1 / np.sqrt(len(frequencies_fd))
    return np.asarray(np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * scale, np.float32)


def mmd2(first_f: Array, second_f: Array) -> float:
    """The squared maximum mean discrepancy of two means of Fourier features: Gretton et al. 2012, equation (5), the biased estimate."""
    return float(((np.asarray(first_f, np.float64) - second_f) ** 2).sum())


def psi(expected: Array, observed: Array) -> float:
    """The population stability index Σ (o − e) ln(o / e) of two lists of shares, each share at least 10⁻⁴.

    To report, not to alarm on: with few inputs it is large by chance.
    """
    e, o = (np.maximum(np.asarray(shares, np.float64), 1e-4) for shares in (expected, observed))
    return float(((o - e) * np.log(o / e)).sum())


def calibrate(
    steps_nc: Array,
    features_nf: Array | None,
    *,
    sizes: Sequence[int],
    levels: Sequence[float],
    resamples: int,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """What the two statistics reach by chance: thresholds of Kolmogorov–Smirnov and of MMD², float64, shape (w, a) each.

    A window of `size` inputs is drawn from the holdout with replacement, and the holdout itself is drawn anew too: the reference is a
    sample, and its own error is part of the distance that a window of the same population has. The threshold for a level is the quantile
    1 − level, rounded up to a draw. Without features the second array is zeros.
    """
    whole = steps_nc if features_nf is None else np.concatenate([steps_nc, features_nf], axis=1)
    n, c = steps_nc.shape
    middle = whole.mean(0, dtype=np.float64)
    found = np.empty((2, len(sizes), resamples))
    for start in range(0, resamples, _ROWS):
        rows = min(_ROWS, resamples - start)
        anew = _means(whole, n, rows, rng) - middle
        for i, size in enumerate(sizes):
            apart = _means(whole, size, rows, rng) - middle - anew
            found[0, i, start : start + rows] = np.abs(apart[:, :c]).max(1)
            found[1, i, start : start + rows] = (apart[:, c:] ** 2).sum(1)
    ks, mmd = np.moveaxis(np.quantile(found, 1 - np.asarray(levels), axis=2, method="higher"), 0, -1)
    return ks, mmd


def _means(whole: Array, size: int, rows: int, rng: np.random.Generator) -> Array:
    """float64, shape (rows, columns): means over `size` rows drawn with replacement."""
    n = len(whole)
    drawn = rng.integers(n, size=(rows, size)) + n * np.arange(rows)[:, None]
    counts = np.bincount(drawn.reshape(-1), minlength=rows * n).reshape(rows, n).astype(np.float32)
    return np.asarray((counts @ whole).astype(np.float64) / size)


def reached_level(statistic: float, n: int, sizes: Sequence[int], thresholds_wa: Array, levels: Sequence[float]) -> float:
    """The smallest calibrated level whose threshold the statistic exceeds, 1 if none: an upper bound of its p-value.

    n: the window's size, not below the smallest calibrated. Between two sizes the threshold lies on the straight line between theirs,
    above the convex curve that it follows; beyond the largest it stays. Both err towards no alarm. sizes rise, levels fall.
    """
    if n < sizes[0]:
        raise ConfigError(f"a window of {n} inputs: the reference is calibrated for {sizes[0]} and more")
    reached = [level for level, column in zip(levels, np.asarray(thresholds_wa).T, strict=True) if statistic > np.interp(n, sizes, column)]
    return min(reached, default=1.0)
