"""Buffered asynchronous federated averaging: no site waits for another, and the server steps after each few updates."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import SGD, ServerOptimizer
from hanse.aggregation.staleness import Staleness, scaled_difference
from hanse.cohort import Arrival, Cohort, fold_group
from hanse.errors import UpdateRejected
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TRAIN, Task
from hanse.messages.update import Update
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.fedavg import ACCURACY

INVERSE_ROOT = Staleness("polynomial 0.5")


async def fedbuff(
    cohort: Cohort,
    model: FLModel,
    *,
    rounds: int,
    buffer: int = 10,
    concurrency: int | None = None,
    staleness: Staleness = INVERSE_ROOT,
    aggregator: Aggregator | None = None,
    server_optimizer: ServerOptimizer | None = None,
    config: Mapping[str, Any] | None = None,
    best: Goal = ACCURACY,
    stop_when: Condition | None = None,
    within_s: float | None = None,
) -> FLModel:
    """FedBuff (Nguyen et al., AISTATS 2022, Algorithm 1): w ← w - η_g · Δ̄ after each K updates, Δ̄ = 1/K · Σ s(τ_i) · Δ_i.

    rounds: how many steps of the server, T. buffer: updates for each, K. concurrency: sites that train at a time; None: all.
    staleness: s; the paper's is 1 / √(1 + τ). aggregator: how the buffer is combined; None: the plain mean, as in the paper.
    server_optimizer: SGD(η_g) in the paper. config: rides in each training task. within_s: seconds until a site is given up.
    best, stop_when: look at the mean of the metrics in a buffer, which are of the models that its sites had got.
    Raises TooFewUpdates if every site has failed since the last step.
    """
    aggregator, optimizer = aggregator or WeightedMean("equal"), server_optimizer or SGD()
    total = aggregator.fresh()

    def take(arrival: Arrival) -> None:
        delta = scaled_difference(arrival.update.model, arrival.task.model, staleness(arrival.staleness))
        total.merge(folded(replace(arrival.update, model=delta), aggregator, model))

    updates = cohort.stream(lambda: Task(TRAIN, model, config or {}), take, concurrency=concurrency, within_s=within_s)
    async with aclosing(updates):
        async for _ in cohort.rounds(model, rounds, until=stop_when):
            total = aggregator.fresh(model)
            for _ in range(buffer):
                await anext(updates)
            mean = total.result()
            await cohort.keep_best(model, mean.metrics, best.metric, lowest=best.lowest)
            model = optimizer.step(model, mean)
            model = await cohort.commit(model, mean.metrics)
    return model


def folded(update: Update, aggregator: Aggregator, model: FLModel) -> FLModel:
    """One update as a partial sum, judged against `model`. Raises UpdateRejected."""
    partial, (light,) = fold_group([update], aggregator, Task(TRAIN, model), (), 0)
    if light.failure is not None:
        raise UpdateRejected(light.failure.message, hint=light.failure.hint)
    assert partial is not None
    return partial
