"""Cyclic weight transfer: the model goes from site to site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import SGD
from hanse.cohort import Cohort
from hanse.errors import TooFewUpdates
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TRAIN, Task
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.evaluate import score
from hanse.workflows.fedavg import ACCURACY

Order = Literal["fixed", "random"]


async def cyclic(
    cohort: Cohort,
    model: FLModel,
    *,
    rounds: int,
    order: Order = "fixed",
    aggregator: Aggregator | None = None,
    config: Mapping[str, Any] | None = None,
    evaluate: bool = False,
    best: Goal = ACCURACY,
    stop_when: Condition | None = None,
    min_updates: int | None = None,
    within_s: float | None = None,
) -> FLModel:
    """Cyclic weight transfer (Chang et al., JAMIA 2018): in each round every site trains once, each on what the one before it made.

    order: by name, or shuffled anew each round. within_s: seconds for one site.
    aggregator: what makes the next model of one site's update; None: the update is the next model.
    min_updates: how many sites must train in a round (default: all); a site that fails is passed over.
    evaluate: have all sites score the round's last model, and keep the best of these. Without it, the round's metrics are the mean over its
        sites, each of the model as that site got it.
    Raises TooFewUpdates, with the reasons, if too few sites trained.
    """
    step = SGD().step
    aggregator = aggregator or WeightedMean("equal")
    async for round in cohort.rounds(model, rounds, until=stop_when):
        sites = list(cohort.sites)
        if order == "random":
            cohort.rng.shuffle(sites)
        scores, trained = WeightedMean(), 0
        reasons: dict[str, str] = {}
        for site in sites:
            try:
                reduced = await cohort.reduce(Task(TRAIN, model, config or {}), aggregator, of=[site], within_s=within_s)
            except TooFewUpdates as error:
                reasons |= error.reasons
            else:
                model = step(model, reduced.model)
                scores.add(reduced.updates[0])
                trained += 1
        needed = min_updates or len(sites)
        if trained < needed:
            raise TooFewUpdates(f"round {round + 1}: {trained} of {len(sites)} sites trained, {needed} needed.", reasons=reasons)
        metrics = dict(scores.result().metrics)
        if evaluate:
            metrics |= (await score(cohort, model, min_updates=min_updates, within_s=within_s)).metrics
            await cohort.keep_best(model, metrics, best.metric, lowest=best.lowest)
        model = await cohort.commit(model, metrics)
    return model
