"""What a workflow sees: a handle on the sites it may ask, and the one seam under every workflow."""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np

from hanse.aggregation.aggregator import Aggregator
from hanse.errors import ConfigError, Failure, HanseError, TooFewUpdates, UpdateRejected
from hanse.filters import Filter, Filters
from hanse.filters import apply as apply_filters
from hanse.messages.flmodel import FLModel
from hanse.messages.params import flatten
from hanse.messages.task import Task
from hanse.messages.update import Reduced, Update
from hanse.seeds import generator
from hanse.transport.courier import Ask, Courier, Folded, Roster

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Best:
    """The best model so far: the metric that chose it, its value, and the round it came from."""

    metric: str
    value: float
    round: int


class Journal(Protocol):
    """Where a job writes what happened and what must last."""

    commits: int
    """How many commits there were, those before a restart included."""
    best: Best | None

    def event(self, kind: str, /, **facts: Any) -> None:
        """Note one thing that happened; it lasts from the next commit on."""

    def progress(self, done: int, asked: int) -> None:
        """Say how far the current ask has come."""

    def commit(self, model: FLModel) -> FLModel:
        """Keep this model, so that a restarted job goes on from it. Returns once it would survive `kill -9`: the model to go on with,
        whose arrays may be mapped from where they are kept."""

    def keep_best(self, model: FLModel, best: Best) -> None:
        """Keep this model as the best so far."""


class Cohort:
    """A workflow's handle on the sites it may ask.

    All randomness hangs on the job's seed and the number of commits, so a workflow that runs again after a crash draws the same.
    """

    def __init__(self, courier: Courier, journal: Journal, *, job_id: str, seed: int = 0, filters: Filters | None = None) -> None:
        self._courier = courier
        self._journal = journal
        self._job_id = job_id
        self._seed = seed
        self._filters = filters or Filters()
        self._round = 0
        self._total: int | None = None
        self._round_began = time.perf_counter()
        self._metrics: Mapping[str, float] = {}  # of the last commit
        self._counts: dict[str, list[int]] = {}  # of this round, by task: good, asked
        self._begin_commit()

    def _begin_commit(self) -> None:
        self._asks = 0
        self._draws = 0
        self.rng: np.random.Generator = generator(self._seed, "cohort", self._journal.commits)

    @property
    def sites(self) -> Roster:
        """All sites of the job, ranked by name."""
        return self._courier.roster

    def sample(self, count: int | None = None) -> tuple[str, ...]:
        """`count` sites drawn without replacement, ranked by name; all of them if `count` is None.

        Raises ConfigError if there are fewer sites than that.
        """
        total = len(self.sites)
        if count is None or count == total:
            return tuple(self.sites)
        if not 0 < count < total:
            raise ConfigError(f"{count} sites a round are asked for, of {total}: give a number from 1 to {total}")
        self._draws += 1
        rng = generator(self._seed, "sample", self._journal.commits, self._draws)
        return tuple(self.sites[rank] for rank in sorted(rng.choice(total, count, replace=False).tolist()))

    async def rounds(self, model: FLModel, total: int, *, until: Callable[[Mapping[str, float]], bool] | None = None) -> AsyncIterator[int]:
        """The numbers of the rounds still to do, from 0: a restarted job goes on after `model.current_round`.

        until: asked with the last commit's metrics before each round; True ends the rounds early.
        """
        self._total = total
        metrics = model.metrics
        for number in range(0 if model.current_round is None else model.current_round + 1, total):
            if until is not None and metrics and until(metrics):
                self.log(f"stopped after round {number} of {total}: {until}")
                return
            self._round, self._round_began, self._counts = number, time.perf_counter(), {}
            yield number
            metrics = self._metrics

    async def ask(
        self,
        task: Task,
        *,
        of: Iterable[str] | None = None,
        within_s: float | None = None,
        min_updates: int | None = None,
        grace_s: float | None = None,
    ) -> AsyncGenerator[Update, None]:
        """Give `task` to the sites in `of` (default: all) and yield their updates as they come, failed ones too.

        within_s: seconds until the sites that have not answered are given up.
        min_updates: how many good updates are needed; default: one from every site asked.
        grace_s: seconds that stragglers get once `min_updates` are there; default: no end.
        Raises TooFewUpdates, with every site's reason, after the last update if too few were good.
        """
        ask = self._prepare(task, of, single=True, hurried=within_s is not None or grace_s is not None)
        tally = _Tally(ask.sites, min_updates)
        async with aclosing(_replies(self._courier.ask(ask), within_s, grace_s, tally)) as replies:
            async for arrived in replies:
                update = admit(arrived, ask.task, self._filters.server_in, self._seed)
                self._note(tally, update, ask.task)
                yield update
        for site, failure in tally.silent(within_s, grace_s).items():
            update = Update(site, ask.task_id(site), failure=failure)
            self._note(tally, update, ask.task)
            yield update
        tally.check(self._round, task.name)

    async def reduce(
        self,
        task: Task,
        aggregator: Aggregator,
        *,
        of: Iterable[str] | None = None,
        within_s: float | None = None,
        min_updates: int | None = None,
        grace_s: float | None = None,
    ) -> Reduced:
        """Give `task` to the sites in `of` and combine their updates, in the same order and to the same bits whatever arrives first.

        The updates are folded where they are (in a simulation's worker, on a relay), in fixed groups of sites; where there is a deadline
        each site is a group of its own. Arguments and errors are those of `ask`.
        """
        hurried = within_s is not None or grace_s is not None
        ask = self._prepare(task, of, single=hurried, hurried=hurried)
        tally = _Tally(ask.sites, min_updates)
        total = aggregator.fresh(measure(task.model, ask.task.model))
        waiting: dict[int, Folded] = {}
        updates: list[Update] = []
        merged = 0

        def merge(folded: Folded) -> None:
            group, partial = folded.updates, folded.partial
            try:
                if partial is None and len(group) == 1:  # it may have come as it is
                    if self._filters.server_out:  # its dtypes may not be those of the total
                        partial, group = fold_group(group, aggregator, ask.task, self._filters.server_in, self._seed)
                    else:
                        group = (add_one(group[0], total, ask.task, self._filters.server_in, self._seed),)
                if partial is not None:
                    total.merge(partial)
            except UpdateRejected as error:
                group = tuple(u if u.failure else replace(u, model=FLModel(), failure=Failure.of(error)) for u in group)
            folded.release()
            for update in group:
                self._note(tally, update, ask.task)
            updates.extend(group)

        async with aclosing(_replies(self._courier.fold(ask, aggregator), within_s, grace_s, tally)) as replies:
            async for folded in replies:
                waiting[folded.group] = folded
                tally.arrived += sum(update.failure is None for update in folded.updates)
                while merged in waiting:
                    merge(waiting.pop(merged))
                    merged += 1
        for group in sorted(waiting):
            merge(waiting[group])
        for site, failure in tally.silent(within_s, grace_s).items():
            self._note(tally, Update(site, ask.task_id(site), failure=failure), ask.task)
        tally.check(self._round, task.name)
        good = tuple(update for update in updates if update.failure is None)
        model = total.result()
        return Reduced(model, model.metrics, good, dict(tally.failures))

    async def keep_best(self, model: FLModel, metrics: Mapping[str, float], metric: str, *, lowest: bool = False) -> bool:
        """Keep `model` as the best so far if `metrics[metric]` is better than every one before; True if it was."""
        value, best = metrics.get(metric, math.nan), self._journal.best
        if math.isnan(value) or (best is not None and (value >= best.value if lowest else value <= best.value)):
            return False
        self._journal.keep_best(model, Best(metric, value, self._round))
        return True

    async def commit(self, model: FLModel, metrics: Mapping[str, float] | None = None) -> FLModel:
        """Keep `model`: a restarted job goes on from here. Returns it with round and metrics filled in."""
        good, asked = next(iter(self._counts.values()), (0, 0))
        committed = replace(model, metrics=dict(metrics or {}), current_round=self._round, total_rounds=self._total)
        self._journal.event(
            "round",
            round=self._round,
            seconds=time.perf_counter() - self._round_began,
            asked=asked,
            good=good,
            metrics=dict(committed.metrics),
            best=self._journal.best is not None and self._journal.best.round == self._round,
        )
        committed = self._journal.commit(committed)
        self._metrics = committed.metrics
        self._begin_commit()
        return committed

    def log(self, text: str, *, level: str = "info") -> None:
        """Say something to whoever follows the job: `level` is info, warning or error."""
        self._journal.event("message", round=self._round, level=level, text=text)

    def event(self, kind: str, /, **facts: Any) -> None:
        """Note facts (JSON values) for the report under a kind of event."""
        self._journal.event(kind, round=self._round, **facts)

    def _prepare(self, task: Task, of: Iterable[str] | None, *, single: bool, hurried: bool) -> Ask:
        sites = self.sample() if of is None else tuple(of)
        try:
            ranks = {site: self.sites.index(site) for site in sites}
        except ValueError as error:
            raise ConfigError(f"task {task.name!r} asks a site that is not in the job: {error}") from error
        if not sites or len(ranks) < len(sites):
            raise ConfigError(
                f"task {task.name!r} asks {len(sites)} sites, {len(ranks)} of them different: ask each site once, and at least one"
            )
        key = (self._job_id, self._journal.commits, self._asks)
        self._asks += 1
        model = replace(task.model, optimizer_params={})
        if self._total is not None:
            model = replace(model, current_round=self._round, total_rounds=self._total)
        sent = apply_filters(self._filters.server_out, model, reference=model, rng=lambda: generator(self._seed, "server_out", *key))
        groups = group_by_rank(ranks, len(self.sites), single=single)
        return Ask(replace(task, model=sent), key, groups, hurried)

    def _note(self, tally: _Tally, update: Update, task: Task) -> None:
        tally.count(update)
        about = {"model_of": task.config["model_of"]} if "model_of" in task.config else {}  # a model other than the job's
        if update.failure is not None:
            self._journal.event(
                "failure", round=self._round, task=task.name, site=update.site,
                code=update.failure.code, message=update.failure.message, hint=update.failure.hint, **about,
            )  # fmt: skip
        else:
            meta = update.model.meta
            self._journal.event(
                "update", round=self._round, task=task.name, site=update.site, seconds=update.seconds,
                metrics=dict(update.model.metrics), weight=meta.get("examples", meta.get("steps")), **about,
            )  # fmt: skip
        for record in update.records:
            self._journal.event(
                "record", round=self._round, site=update.site, key=record.key, value=record.value, step=record.step, kind=record.kind
            )
        if not about:
            counts = self._counts.setdefault(task.name, [0, 0])
            counts[0] += update.failure is None
            counts[1] += 1
        self._journal.progress(tally.good + len(tally.failures), tally.asked)


@cache
def group_starts(roster: int) -> tuple[int, ...]:
    """The first rank of each group that so many sites are split into. A group is folded by itself: few leave little to merge, many keep
    many workers busy, and small ones at the end let all workers end together.

    Up to 64 sites, each is a group. Of more, 64 make one, but no less than 1/256 and no more than 1/16 of all; towards the end a group is
    an eighth of those that are left.
    """
    if roster <= 64:
        return tuple(range(roster))
    widest, starts, rank = roster // min(max(16, roster // 64), 256), [], 0
    while rank < roster:
        starts.append(rank)
        rank += max(1, min(widest, (roster - rank) // 8))
    return tuple(starts)


def group_of(rank: int, roster: int) -> int:
    """The number of the group that the site of this rank is in."""
    return bisect_right(group_starts(roster), rank) - 1


def group_by_rank(ranks: Mapping[str, int], roster: int, *, single: bool = False) -> tuple[tuple[str, ...], ...]:
    """The sites by rank, in groups that depend on their ranks in the roster alone. `single`: one site a group."""
    groups: dict[int, list[str]] = {}
    for site, rank in sorted(ranks.items(), key=lambda item: item[1]):
        groups.setdefault(rank if single else group_of(rank, roster), []).append(site)
    return tuple(tuple(group) for group in groups.values())


def measure(model: FLModel, sent: FLModel) -> FLModel:
    """What updates are combined as: of the server's own model, in its own dtypes, the tensors that its filters let out."""
    if model.params is None or sent.params is None:
        return sent
    own, theirs = flatten(model.params)[0], flatten(sent.params)[0]
    return model if own.keys() == theirs.keys() else replace(model, params={name: own.get(name, array) for name, array in theirs.items()})


def admit(update: Update, task: Task, filters: Sequence[Filter], seed: int) -> Update:
    """The server's door for one update: its `server_in` filters. An update they refuse comes out with a failure."""
    if update.failure is not None or not filters:
        return update
    try:
        rng = lambda: generator(seed, "server_in", update.task_id)  # noqa: E731
        return replace(update, model=apply_filters(filters, update.model, reference=task.model, rng=rng))
    except HanseError as error:
        return replace(update, model=FLModel(), failure=Failure.of(error))


def fold_group(
    updates: Iterable[Update], aggregator: Aggregator, task: Task, filters: Sequence[Filter], seed: int
) -> tuple[FLModel | None, tuple[Update, ...]]:
    """Fold one group's updates, each as it comes, so that a site's memory may be used again for the next.

    Returns the partial sum (None if no update was good) and the updates without their parameters, rejected ones with a failure.
    """
    total = aggregator.fresh(task.model)
    light = tuple([add_one(update, total, task, filters, seed) for update in updates])
    good = any(update.failure is None for update in light)
    return (total.partial() if good else None), light


def add_one(arrived: Update, total: Aggregator, task: Task, filters: Sequence[Filter], seed: int) -> Update:
    """Through the server's door and into `total`. Returns the update without its parameters; one that was rejected carries a failure."""
    update = admit(arrived, task, filters, seed)
    failure = update.failure
    if failure is None:
        try:
            total.add(update)
            rejected = total.fold().get(update.site)
            failure = None if rejected is None else Failure.of(rejected)
        except UpdateRejected as error:
            failure = Failure.of(error)
    model = FLModel() if failure else replace(update.model, params=None, optimizer_params={})
    return replace(update, model=model, failure=failure)


class _Tally:
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

    def count(self, update: Update) -> None:
        self._answered.add(update.site)
        if update.failure is None:
            self.good += 1
        else:
            self.failures[update.site] = update.failure

    @property
    def enough(self) -> bool:
        return max(self.good, self.arrived) >= self.needed

    def silent(self, within_s: float | None, grace_s: float | None) -> dict[str, Failure]:
        """The sites that have not answered, each with why it is not waited for any longer."""
        waited = f"{grace_s:g} s of grace after {self.needed} updates" if self.enough and grace_s is not None else f"{within_s} s"
        failure = Failure("DeadlineExceeded", f"no update within {waited}")
        return {site: failure for site in self.sites if site not in self._answered}

    def check(self, round: int, task: str) -> None:
        if self.good < self.needed:
            raise TooFewUpdates(
                f"round {round + 1}, task {task!r}: {self.good} good updates of {self.asked} asked, {self.needed} needed.",
                reasons={site: str(failure) for site, failure in sorted(self.failures.items())},
                hint="Mend these sites, or let the round go on with fewer: min_updates.",
            )


async def _replies(
    source: AsyncGenerator[T, None], within_s: float | None, grace_s: float | None, tally: _Tally
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
