"""Waiting for what sites answer: who has, for how long, and what a simulated clock makes of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from hanse.errors import ConfigError, Failure, TooFewUpdates
from hanse.messages.params import size_bytes
from hanse.messages.update import Columns, Update
from hanse.transport.courier import Ask, Clock, Folded

T = TypeVar("T")
A = TypeVar("A", bound=Update | Folded)


class Tally:
    """Who of the asked sites has answered, and how."""

    def __init__(self, sites: Sequence[str], min_updates: int | None) -> None:
        self.sites = sites
        self.asked = len(sites)
        self.needed = self.asked if min_updates is None else min_updates
        if not 0 <= self.needed <= self.asked:
            raise ConfigError(f"min_updates is {min_updates}, of {self.asked} sites asked: give a number up to {self.asked}")
        self.good = 0
        self.arrived = 0
        self.failures: dict[str, Failure] = {}
        self._answered: set[str] = set()

    def count(self, group: tuple[Update, ...] | Columns) -> None:
        self.good += len(good_of(group))
        if isinstance(group, Columns):
            self._answered.update(group.sites)
            return
        self._answered.update(update.site for update in group)
        self.failures |= {update.site: update.failure for update in group if update.failure is not None}

    @property
    def enough(self) -> bool:
        return max(self.good, self.arrived) >= self.needed

    def silent(self, within_s: float | None, grace_s: float | None) -> dict[str, Failure]:
        """The sites that have not answered, each with why it is not waited for any longer."""
        waited = f"{grace_s:g} s of grace after {self.needed} updates" if self.enough and grace_s is not None else f"{within_s} s"
        failure = too_late(waited)
        return {site: failure for site in self.sites if site not in self._answered}

    def check(self, round: int, task: str) -> None:
        if self.good < self.needed:
            raise TooFewUpdates(
                f"round {round + 1}, task {task!r}: {self.good} good updates of {self.asked} asked, {self.needed} needed.",
                reasons={site: str(failure) for site, failure in sorted(self.failures.items())},
                hint="Mend these sites, or let the round go on with fewer: min_updates.",
            )


async def in_real_time(
    source: AsyncGenerator[T, None], within_s: float | None, grace_s: float | None, tally: Tally
) -> AsyncGenerator[T, None]:
    """What `source` yields until the deadline, or until the grace after enough good updates is over."""
    clock = asyncio.get_running_loop().time
    deadline = math.inf if within_s is None else clock() + within_s
    grace_began = False
    async with aclosing(source):
        while True:
            if grace_s is not None and tally.enough and not grace_began:
                deadline, grace_began = min(deadline, clock() + grace_s), True
            try:
                async with asyncio.timeout_at(None if deadline == math.inf else deadline):
                    item = await anext(source)
            except (StopAsyncIteration, TimeoutError):
                return
            yield item


async def in_simulated_time(
    source: Callable[[Ask], AsyncGenerator[A, None]],
    ask: Ask,
    clock: Clock,
    within_s: float | None,
    grace_s: float | None,
    tally: Tally,
    *,
    in_order: bool,
) -> AsyncGenerator[A, None]:
    """What arrives until the deadline of the simulated time, which then is that of the last arrival, or of the deadline.

    A site that cannot be in time is not run. in_order: as they arrive, those of one instant by rank; else as soon as it is known that they
    are in time.
    """
    began_s, task_bytes = clock.now_s, size_bytes(ask.task.model.params)
    deadline_s = math.inf if within_s is None else began_s + within_s

    def in_time(site: str) -> bool:
        return clock.earliest_s(site, ask.task, task_bytes=task_bytes, began_s=began_s) <= deadline_s

    def arrival_s(item: A) -> float:
        return max(clock.arrival_s(update, ask.task, task_bytes=task_bytes, began_s=began_s) for update in _updates_in(item))

    if within_s is not None:
        ask = replace(ask, groups=tuple(group for group in ask.groups if in_time(group[0])))  # each a group by itself
    held: list[tuple[float, int, A]] = []
    last_s, count = began_s, 0
    ranks = {site: rank for rank, site in enumerate(ask.sites)}
    async with aclosing(source(ask)) as items:
        async for item in items:
            at_s = arrival_s(item)
            if at_s > deadline_s:
                _release(item)
            elif in_order or grace_s is not None:
                held.append((at_s, ranks[item.site] if isinstance(item, Update) else item.group, item))
            else:
                last_s, count = max(last_s, at_s), count + 1
                yield item
    held.sort(key=lambda entry: entry[:2])
    if grace_s is not None:
        good = [at_s for at_s, _, item in held if _updates_in(item)[0].failure is None]
        if len(good) >= tally.needed:
            enough_s = good[tally.needed - 1] if tally.needed else began_s
            deadline_s = min(deadline_s, enough_s + grace_s)
    for at_s, _, item in held:
        if at_s > deadline_s:
            _release(item)
            continue
        clock.now_s = last_s = max(last_s, at_s)
        count += 1
        yield item
    all_there = in_order or within_s is not None or grace_s is not None  # then each site is an item
    clock.now_s = deadline_s if all_there and count < tally.asked else last_s


def _updates_in(item: Update | Folded) -> tuple[Update, ...]:
    return (item,) if isinstance(item, Update) else tuple(item.updates)


def _release(item: Update | Folded) -> None:
    if isinstance(item, Folded):
        item.release()


def good_of(group: tuple[Update, ...] | Columns) -> tuple[Update, ...] | Columns:
    return group if isinstance(group, Columns) else tuple(update for update in group if update.failure is None)


def too_late(waited: str) -> Failure:
    return Failure("DeadlineExceeded", f"no update within {waited}")
