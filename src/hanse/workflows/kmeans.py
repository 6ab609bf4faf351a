"""k-means over sites: each step is that of the pooled rows, and only sums and counts travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hanse.aggregation.mean import WeightedMean
from hanse.cohort import Cohort
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.task import ASSIGN, PROPOSE_CENTROIDS, Task
from hanse.statistics.clusters import clustered, moved
from hanse.workflows.condition import Condition


async def kmeans(
    cohort: Cohort,
    model: FLModel,
    *,
    clusters: int,
    columns: Sequence[str],
    rounds: int = 50,
    tolerance: float = 1e-6,
    min_updates: int | None = None,
    within_s: float | None = None,
) -> FLModel:
    """Lloyd's algorithm (IEEE Transactions on Information Theory 28 (2), 1982), with assignment at the sites and means at the server.

    Without a first model the sites propose: each sends the centroids and counts of its own clusters, and the server clusters these, with
    their counts as weights: one-shot federated clustering as in k-FED (Dennis, Li and Smith, ICML 2021), with the weighted k-means++ by
    which Bahmani et al. (VLDB 2012, Algorithm 2, step 8) join candidates instead of its farthest-point rule.

    Returns `centroids`, float64 of shape (k, d), and `counts`, shape (k,): the rows that each of the centroids before the last move had.
    The metrics are the `inertia` a row of the centroids that the sites got, and the `shift`, how far the farthest one moved.
    tolerance: the rounds end once no centroid moves further than this. within_s: seconds for each task.
    Raises TooFewUpdates if fewer than `min_updates` sites (default: all) answer; ConfigError if they do not propose enough.
    """
    config = {"kmeans": {"columns": list(columns), "clusters": clusters}}
    async for _ in cohort.rounds(model, rounds, until=Condition(f"shift <= {tolerance!r}")):
        if model.params is None:
            task = Task(PROPOSE_CENTROIDS, FLModel(), config)
            asked = cohort.ask(task, min_updates=min_updates, within_s=within_s)
            proposed = sorted([update async for update in asked if update.failure is None], key=lambda update: update.site)
            rows = np.concatenate([update.model.params["centroids"] for update in proposed])
            weights = np.concatenate([update.model.params["counts"] for update in proposed])
            if len(rows) < clusters:
                raise ConfigError(f"{clusters} clusters are asked for, and the sites propose {len(rows)} large enough to be named")
            centroids, _ = clustered(rows, clusters, weights_n=weights, steps=100, rng=cohort.rng)
        else:
            centroids = np.asarray(model.params["centroids"], np.float64)
        sent = replace(model, params={"centroids": centroids, "counts": np.zeros(clusters)})
        reduced = await cohort.reduce(Task(ASSIGN, sent, config), WeightedMean("equal"), min_updates=min_updates, within_s=within_s)
        before, sites = centroids, len(reduced.updates)
        sums, counts = reduced.model.params["centroids"], reduced.model.params["counts"]  # over sites: means, and so are their quotients
        centroids = moved(before, sums, counts)
        metrics = {
            "inertia": reduced.metrics["inertia"] / reduced.metrics["rows"],
            "shift": float(np.sqrt(np.square(centroids - before).sum(axis=1)).max()),
        }
        model = await cohort.commit(FLModel({"centroids": centroids, "counts": np.rint(counts * sites)}), metrics)
    return model
