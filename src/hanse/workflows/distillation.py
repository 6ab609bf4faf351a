"""Knowledge distillation among sites with different models: scores on public examples travel, and no parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.cohort import Cohort
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.params import flatten
from hanse.messages.task import Task
from hanse.workflows.condition import Condition
from hanse.workflows.evaluate import score

SCORE, DIGEST = "score", "digest"
ROWS, SCORES = "rows", "scores"


async def fedmd(
    cohort: Cohort,
    model: FLModel,
    *,
    rounds: int,
    public_examples: int,
    examples_per_round: int | None = None,
    sites_per_round: int | None = None,
    aggregator: Aggregator | None = None,
    config: Mapping[str, Any] | None = None,
    evaluate: bool = False,
    stop_when: Condition | None = None,
    min_updates: int | None = None,
    within_s: float | None = None,
    grace_s: float | None = None,
) -> FLModel:
    """FedMD (Li & Wang, 2019, arXiv:1910.03581, Algorithm 1): sites with models of different kinds learn from each other's scores.

    All sites have the same public examples, and each a model f_k of its own, which stays there. A round draws rows of the public examples.
    Communicate: the task "score"; a site answers FLModel({"scores": f_k(x), shape (rows, classes)}), before softmax in the paper.
    Aggregate: the mean over sites is the consensus. Distribute, Digest and Revisit: the task "digest", with the consensus as its params'
    "scores"; a site trains its model to score like it, then on its own examples. Both tasks have the rows, a list of numbers, in their
    config as "rows". A site that has not trained yet does so when it is first asked to score (Transfer learning in the paper).

    public_examples: how many there are. examples_per_round: how many are drawn, without replacement; None: all.
    sites_per_round: drawn anew each round, all alike; None asks all. A site that could not score is not asked to digest.
    aggregator: None: the plain mean, as in the paper. config: rides in both tasks.
    evaluate: have the same sites score their own models on their own data, after they have digested; None of these is kept here.
    stop_when: when to end early. Returns the last consensus: its params are "scores" and "rows".
    Raises TooFewUpdates if fewer than `min_updates` sites (default: all that were asked) score, or digest, in a round.
    """
    if not 0 < (examples_per_round or public_examples) <= public_examples:
        raise ConfigError(f"{examples_per_round} of {public_examples} public examples are asked for in each round: give fewer")
    aggregator = aggregator or WeightedMean("equal")
    limits: dict[str, Any] = {"min_updates": min_updates, "within_s": within_s, "grace_s": grace_s}
    async for _ in cohort.rounds(model, rounds, until=stop_when):
        rows = np.sort(cohort.rng.choice(public_examples, examples_per_round or public_examples, replace=False))
        about = {**(config or {}), ROWS: rows.tolist()}
        scored = await cohort.reduce(Task(SCORE, FLModel(), about), aggregator, of=cohort.sample(sites_per_round), **limits)
        consensus = FLModel({SCORES: _checked(scored.model, len(rows))})
        sites = [update.site for update in scored.updates]
        digested = await cohort.reduce(Task(DIGEST, consensus, about), WeightedMean(), of=sites, **limits)
        metrics = {**scored.metrics, **digested.metrics}
        if evaluate:
            sites = [update.site for update in digested.updates]
            metrics |= (await score(cohort, FLModel(), of=sites, **limits)).metrics
        model = await cohort.commit(replace(model, params={SCORES: consensus.params[SCORES], ROWS: rows}), metrics)
    return model


def _checked(mean: FLModel, rows: int) -> np.ndarray[Any, np.dtype[Any]]:
    """The consensus. Raises ConfigError if the sites did not send a row of scores for each row that they were asked for."""
    found = {} if mean.params is None else flatten(mean.params)[0]
    if found.keys() != {SCORES} or found[SCORES].ndim < 2 or len(found[SCORES]) != rows:
        sent = ", ".join(f"{name!r} of shape {array.shape}" for name, array in found.items()) or "nothing"
        raise ConfigError(
            f"the sites sent {sent} for {rows} public examples.",
            hint='Answer the task "score" with FLModel({"scores": …}), one row for each of site.config["rows"].',
        )
    return found[SCORES]
