"""The recipe for federated k-means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from hanse.errors import ConfigError
from hanse.jobs.describe import column_names
from hanse.jobs.recipe import Recipe, Workflow, counts, positive
from hanse.messages.task import ASSIGN, PROPOSE_CENTROIDS
from hanse.workflows.kmeans import kmeans


@dataclass(frozen=True, kw_only=True)
class KMeansRecipe(Recipe):
    """k-means (Lloyd, 1982) on the rows of all sites, with an app made by `hanse.table_app`.

    clusters: how many. columns: which columns of the table are the rows, in this order; they are taken as they are, so scale them at the
        site. model: the first centroids, {"centroids": shape (k, d)}; None: the sites propose them.
    rounds: at most so many. tolerance: the rounds end once no centroid moves further.
    min_updates: how many sites must answer (None: all). within_s: seconds for each task.
    """

    kind: ClassVar[str] = "kmeans"

    clusters: int
    columns: Sequence[str]
    rounds: int = 50
    tolerance: float = 1e-6
    min_updates: int | None = None
    within_s: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must_handle(ASSIGN, *([PROPOSE_CENTROIDS] if self.model is None else []))
        counts(self, rounds=self.rounds, clusters=self.clusters, min_updates=self.min_updates)
        positive(self, tolerance=self.tolerance, within_s=self.within_s)
        column_names(self, columns=self.columns)
        if (params := self.first_model()[0].params) is not None:
            centroids = params.get("centroids") if isinstance(params, dict) else None
            if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or len(centroids) != self.clusters:
                raise ConfigError(f"recipe {self.name!r} has a model without {self.clusters} centroids: give {{'centroids': array (k, d)}}")

    def workflow(self) -> Workflow:
        return partial(
            kmeans,
            clusters=self.clusters,
            columns=self.columns,
            rounds=self.rounds,
            tolerance=self.tolerance,
            min_updates=self.min_updates,
            within_s=self.within_s,
        )
