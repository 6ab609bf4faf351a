"""Sites that a worker trains many at once: which ones, and how what they make is folded."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

import numpy as np

from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.cohort import add_one
from hanse.errors import UpdateRejected
from hanse.filters import Filter
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task
from hanse.messages.update import Update
from hanse.site.runner import Stacked

FEWEST, MOST = 16, 256
"""Sites that are trained together: an eighth of those asked, within these limits."""


def joined(groups: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Neighbouring groups of an ask made one, so that there are enough sites in each to train together. Hangs on the groups alone, so the
    result has the same bits for any number of workers."""
    size = min(max(FEWEST, sum(map(len, groups)) // 8), MOST)
    made: list[tuple[str, ...]] = []
    for group in groups:
        if made and len(made[-1]) + len(group) <= size:
            made[-1] += group
        else:
            made.append(group)
    return made


def fold_together(
    stacks: Iterable[Stacked], left: Callable[[Container[str]], Iterable[Update]], aggregator: Aggregator, task: Task,
    filters: Sequence[Filter], seed: int,
) -> tuple[FLModel | None, dict[str, Update]]:  # fmt: skip
    """Fold a group's sites: stacks as they come, each as one weighted sum where the aggregator is a mean by examples or steps, and then
    what is `left` after the sites that were in them.

    Returns the partial sum (None if no update was good) and the updates by site, without their parameters, rejected ones with a failure.
    """
    total = aggregator.fresh(task.model)
    light: dict[str, Update] = {}
    for stack in stacks:
        whole = None if filters or type(aggregator) is not WeightedMean else _mean_of(stack, aggregator)
        if whole is None or not _takes(total, whole):
            for update in stack.each():
                light[update.site] = add_one(update, total, task, filters, seed)
        else:
            light.update((update.site, update) for update in stack.updates)
    for update in left(set(light)):
        light[update.site] = add_one(update, total, task, filters, seed)
    good = any(update.failure is None for update in light.values())
    return (total.partial() if good else None), light


def _takes(total: Aggregator, update: Update) -> bool:
    try:
        total.add(update)
    except UpdateRejected:  # for a reason that each site is told by itself
        return False
    return not total.fold()


def _mean_of(stack: Stacked, aggregator: WeightedMean) -> Update | None:
    """One update that weighs as much as all of the stack: their mean. None if the weights are not in their meta, or a number is not
    finite, so that they have to be looked at one by one."""
    models = [update.model for update in stack.updates]
    unit = aggregator.by or "examples"
    if unit not in ("examples", "steps") or not all(model.meta.get(unit, 0) > 0 for model in models):
        return None
    weights = np.array([model.meta[unit] for model in models], np.float64)
    shares = (weights / weights.sum()).astype(np.float32)
    params = {}
    for name, array in stack.params.items():
        if array.dtype != np.float32:
            return None
        params[name] = (shares @ array.reshape(len(models), -1)).reshape(array.shape[1:])
    metrics = {}
    for name in models[0].metrics:
        values = np.array([model.metrics.get(name, np.nan) for model in models])
        metrics[name] = float(weights @ values / weights.sum())
    finite = all(np.isfinite(array).all() for array in params.values()) and all(map(np.isfinite, metrics.values()))
    first = stack.updates[0]
    meta = {str(unit): int(weights.sum())}
    return Update(first.site, first.task_id, FLModel(params, metrics=metrics, meta=meta)) if finite else None
