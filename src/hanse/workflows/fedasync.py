"""Asynchronous federated optimization: the server mixes each update into its model as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import SGD
from hanse.aggregation.staleness import Staleness, whole
from hanse.cohort import Arrival, Cohort
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TRAIN, Task
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.fedavg import ACCURACY
from hanse.workflows.fedbuff import folded

POLYNOMIAL = Staleness("polynomial 0.5")


async def fedasync(
    cohort: Cohort,
    model: FLModel,
    *,
    rounds: int,
    alpha: float = 0.6,
    concurrency: int | None = None,
    staleness: Staleness = POLYNOMIAL,
    config: Mapping[str, Any] | None = None,
    best: Goal = ACCURACY,
    stop_when: Condition | None = None,
    within_s: float | None = None,
) -> FLModel:
    """FedAsync (Xie, Koyejo and Gupta, 2019, Algorithm 1): x_t ← (1 - α_t) · x_{t-1} + α_t · x_new, with α_t = α · s(t - τ).

    rounds: how many updates, T. alpha: α, above 0 and at most 1. staleness: s. concurrency: sites that train at a time; None: all.
    config: rides in each training task, such as `proximal_mu`, the ρ of the paper. within_s: seconds until a site is given up.
    best, stop_when: look at the metrics of one update, which are of the model that its site had got.
    Raises TooFewUpdates if every site has failed since the last update.
    """
    if not 0 < alpha <= 1:
        raise ConfigError(f"alpha is {alpha!r}: it must be above 0 and at most 1")

    def take(arrival: Arrival) -> tuple[float, FLModel]:
        update = replace(arrival.update, model=whole(arrival.update.model, arrival.task.model))
        one = WeightedMean("equal").fresh(model)
        one.merge(folded(update, one, model))
        return alpha * staleness(arrival.staleness), one.result()

    updates = cohort.stream(lambda: Task(TRAIN, model, config or {}), take, concurrency=concurrency, within_s=within_s)
    async with aclosing(updates):
        async for _ in cohort.rounds(model, rounds, until=stop_when):
            alpha_t, new = await anext(updates)
            await cohort.keep_best(model, new.metrics, best.metric, lowest=best.lowest)
            model = SGD(alpha_t).step(model, new)
            model = await cohort.commit(model, new.metrics)
    return model
