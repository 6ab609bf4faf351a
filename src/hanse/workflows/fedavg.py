"""Federated averaging and its kin: they differ in server optimizer, aggregator and what rides in the task, not in the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import SGD, ServerOptimizer
from hanse.cohort import Cohort
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TRAIN, Task
from hanse.messages.update import Reduced
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.evaluate import score
from hanse.workflows.selection import Selection, Uniform

ACCURACY = Goal("max accuracy")


async def fedavg(
    cohort: Cohort,
    model: FLModel,
    *,
    rounds: int,
    sites_per_round: int | None = None,
    selection: Selection | None = None,
    aggregator: Aggregator | None = None,
    server_optimizer: ServerOptimizer | None = None,
    config: Mapping[str, Any] | None = None,
    evaluate: bool = False,
    best: Goal = ACCURACY,
    stop_when: Condition | None = None,
    min_updates: int | None = None,
    within_s: float | None = None,
    grace_s: float | None = None,
    task: Callable[[FLModel], Task] | None = None,
    step: Callable[[FLModel, Reduced], FLModel] | None = None,
) -> FLModel:
    """Federated averaging (McMahan et al., AISTATS 2017, Algorithm 1), with a server optimizer (Reddi et al., ICLR 2021, Algorithm 1).

    sites_per_round: chosen anew each round; None asks all. selection: how they are chosen; None: all alike. Those that evaluate are always
        drawn all alike.
    config: rides in each training task, such as FedProx's `proximal_mu`.
    evaluate: have as many sites, drawn anew, evaluate each new model. Without it, the metrics that come with the updates are taken as
        those of the model the sites received, and the last model is not scored.
    task, step: what sites are asked to do with a model, and how the next model is made; None: a training task with `config`, and the
        server optimizer's step. SCAFFOLD and FedDyn are this loop with theirs.
    best, stop_when: which model to keep as the best; when to end early. Both look at the metrics averaged over sites.
    Raises TooFewUpdates if fewer than `min_updates` sites (default: all that were asked) train in a round.
    """
    aggregator = aggregator or WeightedMean()
    optimizer = server_optimizer or SGD()
    selection = selection or Uniform()
    missed = ""
    async for _ in cohort.rounds(model, rounds, until=stop_when):
        reduced = await cohort.reduce(
            task(model) if task else Task(TRAIN, model, config or {}),
            aggregator,
            of=await selection.select(cohort, model, sites_per_round, within_s=within_s, grace_s=grace_s),
            min_updates=min_updates,
            within_s=within_s,
            grace_s=grace_s,
        )
        scored, metrics = model, dict(reduced.metrics)
        model = step(model, reduced) if step else optimizer.step(model, reduced.model)
        if evaluate:
            sites = cohort.sample(sites_per_round)
            scored = model
            metrics |= (await score(cohort, model, of=sites, min_updates=min_updates, within_s=within_s, grace_s=grace_s)).metrics
        if stop_when is not None and stop_when.metric not in metrics and not missed:
            missed = (
                f"'{stop_when}' is no reason to stop: there is no metric {stop_when.metric!r}, only {', '.join(sorted(metrics)) or 'none'}"
            )
            cohort.log(missed, level="warning")
        await cohort.keep_best(scored, metrics, best.metric, lowest=best.lowest)
        model = await cohort.commit(model, metrics)
        del reduced, scored  # a large model is not in memory twice
    return model
