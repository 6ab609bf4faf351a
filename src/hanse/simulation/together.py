"""Sites that a worker trains many at once: which ones, and how what they make is folded."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import TypeVar

import numpy as np

from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.cohort import add_one
from hanse.errors import UpdateRejected
from hanse.filters import Filter
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Columns, Update
from hanse.site.runner import Stacked

T = TypeVar("T")

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
    sites: Sequence[str], stacks: Iterable[Stacked], left: Callable[[Container[str]], Iterable[Update]], aggregator: Aggregator, task: Task,
    filters: Sequence[Filter], seed: int,
) -> tuple[FLModel | None, tuple[Update, ...] | Columns]:  # fmt: skip
    """Fold a group's sites: stacks as they come, each as one weighted sum where the aggregator is a mean by examples or steps, and then
    what is `left` after the sites that were in them.

    Returns the partial sum (None if no update was good) and the updates in the order of `sites`, without their parameters, rejected ones
    with a failure.
    """
    total = aggregator.fresh(task.model)
    whole: list[Columns] = []
    light: dict[str, Update] = {}
    for stack in stacks:
        mean = None if filters or type(aggregator) is not WeightedMean else _mean_of(stack, aggregator)
        if mean is not None and _takes(total, mean):
            whole.append(stack.updates)
        else:
            light.update((update.site, add_one(update, total, task, filters, seed)) for update in stack.each())
    if not light and (columns := _in_order(sites, whole)) is not None:
        return total.partial(), columns
    light.update((update.site, update) for columns in whole for update in columns)
    light.update((update.site, add_one(update, total, task, filters, seed)) for update in left(set(light)))
    good = any(update.failure is None for update in light.values())
    return (total.partial() if good else None), tuple(light[site] for site in sites)


def _in_order(sites: Sequence[str], stacks: Sequence[Columns]) -> Columns | None:
    """The stacks as one, in the order of `sites`; None if some are in none of them, or they tell different things."""
    if sum(map(len, stacks)) < len(sites) or any(each.metrics.keys() != stacks[0].metrics.keys() for each in stacks):
        return None
    place = {site: at for at, site in enumerate(site for each in stacks for site in each.sites)}
    order = [place[site] for site in sites]

    def column(parts: Iterable[Sequence[T]]) -> list[T]:
        values = [value for part in parts for value in part]
        return [values[at] for at in order]

    return Columns(
        sites,
        stacks[0].key,
        column(each.seconds for each in stacks),
        {name: column(each.metrics[name] for each in stacks) for name in stacks[0].metrics},
        {name: column(each.meta[name] for each in stacks) for name in stacks[0].meta},
    )


def _takes(total: Aggregator, update: Update) -> bool:
    try:
        total.add(update)
    except UpdateRejected:  # for a reason that each site is told by itself
        return False
    return not total.fold()


def _mean_of(stack: Stacked, aggregator: WeightedMean) -> Update | None:
    """One update that weighs as much as all of the stack: their mean. None if the weights are not in their meta, or a number is not
    finite, so that they have to be looked at one by one."""
    updates, unit = stack.updates, aggregator.by or "examples"
    if unit not in ("examples", "steps") or unit not in updates.meta:
        return None
    weights = np.array(updates.meta[unit], np.float64)
    if not (weights > 0).all():
        return None
    shares = (weights / weights.sum()).astype(np.float32)
    params = {}
    for name, array in stack.params.items():
        if array.dtype != np.float32:
            return None
        params[name] = (shares @ array.reshape(len(shares), -1)).reshape(array.shape[1:])
    metrics = {name: float(weights @ np.array(values) / weights.sum()) for name, values in updates.metrics.items()}
    if not (all(np.isfinite(array).all() for array in params.values()) and all(map(np.isfinite, metrics.values()))):
        return None
    meta = {str(unit): int(weights.sum())}
    return Update(updates.sites[0], TaskId(*updates.key, updates.sites[0]), FLModel(params, metrics=metrics, meta=meta))
