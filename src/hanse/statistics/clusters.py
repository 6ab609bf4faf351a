"""k-means: seeds and steps, of which a site's part is sums and counts.

n = rows, d = columns, k = clusters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hanse.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 4096  # rows whose distances are computed at a time


class Assigned(NamedTuple):
    """What one step of Lloyd needs of some rows: each cluster's sum, shape (k, d), its (weighted) count, shape (k,), and the inertia."""

    sums_kd: Array
    counts_k: Array
    inertia: float


def nearest(rows_nd: Array, centroids_kd: Array) -> tuple[Array, Array]:
    """Which centroid is nearest to each row (of equal ones the first), int64, and its squared distance, float64; both of shape (n,)."""
    labels = np.empty(len(rows_nd), np.int64)
    distances = np.empty(len(rows_nd))
    for start in range(0, len(rows_nd), _BLOCK):
        block = slice(start, start + _BLOCK)
        squares = np.stack([np.square(rows_nd[block] - centroid).sum(axis=1) for centroid in centroids_kd], axis=1)
        labels[block] = squares.argmin(axis=1)
        distances[block] = squares.min(axis=1)
    return labels, distances


def assigned(rows_nd: Array, centroids_kd: Array, weights_n: Array | None = None) -> Assigned:
    """The rows by their nearest centroid: the assignment step of Lloyd, IEEE Transactions on Information Theory 28 (2), 1982."""
    labels, distances = nearest(rows_nd, centroids_kd)
    weights = np.ones(len(rows_nd)) if weights_n is None else weights_n
    sums = np.zeros(centroids_kd.shape)
    np.add.at(sums, labels, rows_nd * weights[:, None])
    return Assigned(sums, np.bincount(labels, weights, len(centroids_kd)), float(distances @ weights))


def moved(centroids_kd: Array, sums_kd: Array, counts_k: Array) -> Array:
    """The centroids at their clusters' means; one without rows stays where it is."""
    some = counts_k > 0
    return np.where(some[:, None], sums_kd / np.where(some, counts_k, 1.0)[:, None], centroids_kd)


def seeds(rows_nd: Array, clusters: int, *, weights_n: Array | None = None, rng: np.random.Generator) -> Array:
    """k rows as first centroids: k-means++ (Arthur and Vassilvitskii, SODA 2007, §2.2), shape (k, d).

    Raises ConfigError if there are fewer different rows.
    """
    weights = np.ones(len(rows_nd)) if weights_n is None else weights_n
    share, chosen = weights.copy(), list[int]()
    distances = np.full(len(rows_nd), np.inf)
    while len(chosen) < clusters:
        if not share.sum() > 0:
            raise ConfigError(f"{clusters} clusters are asked for, and there are only {len(chosen)} different rows")
        chosen.append(int(rng.choice(len(rows_nd), p=share / share.sum())))
        distances = np.minimum(distances, np.square(rows_nd - rows_nd[chosen[-1]]).sum(axis=1))
        share = distances * weights
    return rows_nd[chosen]


def clustered(
    rows_nd: Array, clusters: int, *, weights_n: Array | None = None, steps: int = 20, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Centroids, shape (k, d), and their counts, shape (k,): k-means++ and at most `steps` steps of Lloyd."""
    centroids = seeds(rows_nd, clusters, weights_n=weights_n, rng=rng)
    for _ in range(steps):
        part = assigned(rows_nd, centroids, weights_n)
        before, centroids = centroids, moved(centroids, part.sums_kd, part.counts_k)
        if np.array_equal(before, centroids):
            break
    return centroids, assigned(rows_nd, centroids, weights_n).counts_k
