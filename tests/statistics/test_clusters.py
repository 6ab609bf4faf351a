from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hanse.errors import ConfigError
from hanse.statistics.clusters import assigned, clustered, moved, nearest, seeds

ROWS = np.array([[0.0, 0], [2, 0], [10, 0], [10, 4]])


def test_a_step_by_hand() -> None:
    """Two rows each; the third centroid has none and stays."""
    centroids = np.array([[1.0, 0], [9, 2], [50, 50]])
    labels, distances = nearest(ROWS, centroids)
    assert_array_equal(labels, [0, 0, 1, 1])
    assert_array_equal(distances, [1, 1, 5, 5])
    part = assigned(ROWS, centroids)
    assert_array_equal(part.sums_kd, [[2, 0], [20, 4], [0, 0]])
    assert_array_equal(part.counts_k, [2, 2, 0])
    assert part.inertia == 12
    assert_array_equal(moved(centroids, part.sums_kd, part.counts_k), [[1, 0], [10, 2], [50, 50]])


def test_a_weight_is_so_many_rows() -> None:
    rng = np.random.default_rng(0)
    rows, weights, centroids = rng.normal(size=(5000, 3)), rng.integers(1, 4, 5000), rng.normal(size=(4, 3))
    one, other = assigned(rows, centroids, weights.astype(float)), assigned(np.repeat(rows, weights, axis=0), centroids)
    assert_array_equal(one.counts_k, other.counts_k)
    assert_allclose(one.sums_kd, other.sums_kd, rtol=1e-10)
    assert one.inertia == pytest.approx(other.inertia, rel=1e-12)


def test_steps_agree_with_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    rows = np.random.default_rng(1).normal(size=(400, 2))
    start = rows[:5]
    centroids = start
    for _ in range(100):
        part = assigned(rows, centroids)
        centroids = moved(centroids, part.sums_kd, part.counts_k)
    theirs = cluster.KMeans(5, init=start, n_init=1, max_iter=100, tol=0).fit(rows)
    assert_allclose(centroids, theirs.cluster_centers_, rtol=1e-9)
    assert assigned(rows, centroids).inertia == pytest.approx(theirs.inertia_, rel=1e-9)


def test_seeds_are_rows_far_from_each_other() -> None:
    rows = np.concatenate([np.random.default_rng(0).normal(10 * k, 0.1, (20, 2)) for k in range(4)])
    for draw in range(20):
        found = seeds(rows, 4, rng=np.random.default_rng(draw))
        assert sorted(np.rint(found[:, 0] / 10).tolist()) == [0, 1, 2, 3]
    centroids, counts = clustered(rows, 4, rng=np.random.default_rng(0))
    assert_array_equal(counts, [20] * 4)
    assert_allclose(np.sort(centroids[:, 0]), [0, 10, 20, 30], atol=0.2)


def test_rows_of_no_weight_are_never_seeds() -> None:
    assert_array_equal(np.sort(seeds(ROWS, 2, weights_n=np.array([0, 1.0, 0, 1]), rng=np.random.default_rng(0)), axis=0), ROWS[[1, 3]])


def test_more_clusters_than_different_rows() -> None:
    with pytest.raises(ConfigError, match="3 clusters are asked for, and there are only 2 different rows"):
        seeds(np.array([[1.0], [1.0], [2.0]]), 3, rng=np.random.default_rng(0))
