"""Scoring models where the data are: one model at every site, or every site's model at every other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import SGD
from hanse.cohort import Cohort
from hanse.messages.flmodel import FLModel
from hanse.messages.task import EVALUATE, SUBMIT_MODEL, Task
from hanse.messages.update import Reduced

SERVER = "server"
"""Under this name the job's own model stands in the table of scores."""


async def federated_evaluation(cohort: Cohort, model: FLModel, *, min_updates: int | None = None, within_s: float | None = None) -> FLModel:
    """Every site scores `model` on its own data; the committed metrics are the weighted mean. The model is returned as it came."""
    async for _ in cohort.rounds(model, 1):
        scored = await score(cohort, model, min_updates=min_updates, within_s=within_s)
        model = await cohort.commit(model, scored.metrics)
    return model


async def cross_site_evaluation(
    cohort: Cohort, model: FLModel, *, min_updates: int | None = None, within_s: float | None = None
) -> FLModel:
    """Every site hands in its own model, and every site scores every one of them, and the job's; each is held only while it is scored.

    The table of scores, model by site, is noted as the event `cross_site`. The job's model is returned with its mean metrics.
    Raises TooFewUpdates if fewer than `min_updates` sites (default: all) score a model; a site without a model of its own is left out.
    """
    async for _ in cohort.rounds(model, 1):
        table: dict[str, dict[str, Mapping[str, float]]] = {}
        metrics: Mapping[str, float] = {}
        if model.params is not None:
            own = await score(cohort, model, min_updates=min_updates, within_s=within_s)
            table[SERVER], metrics = _by_site(own), own.metrics
        for site in cohort.sites:
            handed_in = await cohort.reduce(Task(SUBMIT_MODEL, model), WeightedMean("equal"), of=[site], within_s=within_s, min_updates=0)
            if handed_in.model.params is not None:
                theirs = SGD().step(model, handed_in.model)
                table[site] = _by_site(await score(cohort, theirs, model_of=site, min_updates=min_updates, within_s=within_s))
        cohort.event("cross_site", scores=table)
        model = await cohort.commit(model, metrics)
    return model


async def score(
    cohort: Cohort,
    model: FLModel,
    *,
    model_of: str = SERVER,
    of: Iterable[str] | None = None,
    min_updates: int | None = None,
    within_s: float | None = None,
    grace_s: float | None = None,
) -> Reduced:
    """The model's metrics at each site in `of` (default: all), and their weighted mean. `model_of` names the model, for the record."""
    config = {} if model_of == SERVER else {"model_of": model_of}
    task = Task(EVALUATE, model, config)
    return await cohort.reduce(task, WeightedMean(), of=of, min_updates=min_updates, within_s=within_s, grace_s=grace_s)


def _by_site(scored: Reduced) -> dict[str, Mapping[str, float]]:
    return {update.site: update.model.metrics for update in scored.updates}
