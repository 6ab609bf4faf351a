from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from hanse.analytics import table_app
from hanse.app import Site
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.statistics.disclosure import Disclosure
from hanse.workflows.kmeans import kmeans

CENTRES = np.array([[0.0, 0], [10, 0], [0, 10], [10, 10]])


def rows(rank: int) -> np.ndarray:
    """Of four clumps; each site has two of them."""
    rng = np.random.default_rng(rank)
    return np.concatenate([rng.normal(CENTRES[(rank + k) % 4], 1.0, (60, 2)) for k in range(2)])


def load(site: Site) -> dict[str, np.ndarray]:
    return {"a": rows(site.rank)[:, 0], "b": rows(site.rank)[:, 1], "both": rows(site.rank)}


OPEN = table_app(load, disclosure=Disclosure(min_count=1))


async def test_from_the_same_start_it_is_the_pooled_algorithm(federate: Any) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    pooled = np.concatenate([rows(rank) for rank in range(5)])
    start = pooled[:6]
    async with federate(OPEN, sites=5) as federation:
        model = FLModel({"centroids": start})
        found = await kmeans(federation.cohort, model, clusters=6, columns=["a", "b"], tolerance=1e-12)
    theirs = cluster.KMeans(6, init=start, n_init=1, max_iter=100, tol=0).fit(pooled)
    assert_allclose(found.params["centroids"], theirs.cluster_centers_, rtol=1e-10)
    assert found.params["counts"].tolist() == np.bincount(theirs.labels_).tolist()
    assert found.metrics["inertia"] * len(pooled) == pytest.approx(theirs.inertia_, rel=1e-10)
    assert found.metrics["shift"] <= 1e-12


async def test_the_sites_propose_where_to_start(federate: Any) -> None:
    """No site has seen all four clumps."""
    async with federate(OPEN, sites=4) as federation:
        found = await kmeans(federation.cohort, FLModel(), clusters=4, columns=["both"])
        inertia = [event["metrics"]["inertia"] for event in federation.noted("round")]
    order = np.lexsort(found.params["centroids"].round().T)
    assert_allclose(found.params["centroids"][order], CENTRES, atol=0.4)
    assert found.params["counts"].sum() == 4 * 120
    assert inertia == sorted(inertia, reverse=True)
    assert inertia[-1] == pytest.approx(2, abs=0.3)


async def test_a_resumed_one_goes_on_to_the_same_bits(federate: Any) -> None:
    async with federate(OPEN) as federation:
        whole = await kmeans(federation.cohort, FLModel(), clusters=12, columns=["both"], rounds=6, tolerance=1e-300)
    for file in federation.folder.path.glob("commit*"):
        file.unlink()
    async with federate(OPEN, workers=1) as federation:
        half = await kmeans(federation.cohort, FLModel(), clusters=12, columns=["both"], rounds=2, tolerance=1e-300)
    async with federate(OPEN) as federation:
        model, _ = federation.folder.resume()
        rest = await kmeans(federation.cohort, model, clusters=12, columns=["both"], rounds=6, tolerance=1e-300)
    assert (half.current_round, rest.current_round) == (1, 5)
    assert rest.params["centroids"].tobytes() == whole.params["centroids"].tobytes()


async def test_sites_too_small_to_name_so_many(federate: Any) -> None:
    async with federate(table_app(load, disclosure=Disclosure(min_count=100)), sites=2) as federation:
        with pytest.raises(ConfigError, match=r"3 clusters are asked for, and the sites propose \d large enough"):
            await kmeans(federation.cohort, FLModel(), clusters=3, columns=["both"])
