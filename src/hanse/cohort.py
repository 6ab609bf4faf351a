"""What a workflow sees: a handle on the sites it may ask, and the one seam under every workflow."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol, TypeVar

import numpy as np

from hanse.aggregation.aggregator import Aggregator, check_enough
from hanse.errors import ConfigError, Failure, HanseError, TooFewUpdates, UpdateRejected
from hanse.filters import Filter, Filters
from hanse.filters import apply as apply_filters
from hanse.messages.flmodel import FLModel, bearing
from hanse.messages.params import flatten, size_bytes
from hanse.messages.task import TRAIN, Task
from hanse.messages.update import Columns, Reduced, Update, Updates
from hanse.replies import Tally, good_of, in_real_time, in_simulated_time, too_late
from hanse.seeds import generator
from hanse.transport.courier import Ask, Clock, Courier, Folded, Roster

T = TypeVar("T")

FEW_SITES = 64
"""A job of no more sites has each as a group of its own, so that none of them waits for others in a real federation."""

HELD_BYTES = 64 << 10
"""An update of no more is copied and folded together with others of its group, which takes less time than to fold each by itself."""

STREAMED = 1 << 20
"""The index of a commit's first asynchronous task; those of `ask` and `reduce` count from 0."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """An update of an asynchronous workflow.

    task: as the site got it. staleness: how many commits there were between the task and this, τ in the papers.
    """

    update: Update
    task: Task
    staleness: int


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

    clock: simulated time, by which all deadlines and the order of arrival are judged; None: they are real.
    by_roster: a group's sites are the asked ones of a range of the roster, since a simulated script lives in one worker and a group must
        not be split; else of a range of those that are asked.
    """

    def __init__(
        self,
        courier: Courier,
        journal: Journal,
        *,
        job_id: str,
        seed: int = 0,
        filters: Filters | None = None,
        clock: Clock | None = None,
        by_roster: bool = False,
    ) -> None:
        self._courier = courier
        self._journal = journal
        self._job_id = job_id
        self._seed = seed
        self._filters = filters or Filters()
        self._clock = clock
        self._by_roster = by_roster
        self._round = 0
        self._total: int | None = None
        self._round_began = time.perf_counter()
        self._metrics: Mapping[str, float] = {}  # of the last commit
        self._counts: dict[str, list[int]] = {}  # of this round, by task: good, asked
        self._begin_commit()

    def _begin_commit(self) -> None:
        self._asks = 0
        self._draws = 0
        self._streamed: Counter[str] = Counter()  # asynchronous tasks since this commit, by site
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
        tally = Tally(ask.sites, min_updates)
        if self._clock is None:
            source = in_real_time(self._courier.ask(ask), within_s, grace_s, tally)
        else:
            source = in_simulated_time(self._courier.ask, ask, self._clock, within_s, grace_s, tally, in_order=True)
        async with aclosing(source) as replies:
            async for arrived in replies:
                update = admit(arrived, ask.task, self._filters.server_in, self._seed)
                self._note(tally, (update,), ask.task)
                yield update
        for site, failure in tally.silent(within_s, grace_s).items():
            update = Update(site, ask.task_id(site), failure=failure)
            self._note(tally, (update,), ask.task)
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
        check_enough(aggregator, len(ask.sites))
        tally = Tally(ask.sites, min_updates)
        total = aggregator.fresh(measure(task.model, ask.task.model))
        waiting: dict[int, Folded] = {}
        updates: list[tuple[Update, ...] | Columns] = []
        merged = 0

        def merge(folded: Folded) -> None:
            group, summed = folded.updates, folded.partial
            try:
                if summed is None and isinstance(group, tuple) and len(group) == 1:  # it may have come as it is
                    if self._filters.server_out:  # its dtypes may not be those of the total
                        summed, group = fold_group(group, aggregator, ask.task, self._filters.server_in, self._seed)
                    else:
                        group = (add_one(group[0], total, ask.task, self._filters.server_in, self._seed),)
                if summed is not None:
                    total.merge(summed)
            except UpdateRejected as error:
                group = tuple(u if u.failure else replace(u, model=FLModel(), failure=Failure.of(error)) for u in group)
            folded.release()
            self._note(tally, group, ask.task)
            updates.append(group)

        if self._clock is None:
            source = in_real_time(self._courier.fold(ask, aggregator), within_s, grace_s, tally)
        else:
            fold = partial(self._courier.fold, aggregator=aggregator)
            source = in_simulated_time(fold, ask, self._clock, within_s, grace_s, tally, in_order=False)
        async with aclosing(source) as replies:
            async for folded in replies:
                waiting[folded.group] = folded
                tally.arrived += len(good_of(folded.updates))
                while merged in waiting:
                    merge(waiting.pop(merged))
                    merged += 1
        for group in sorted(waiting):
            merge(waiting[group])
        for site, failure in tally.silent(within_s, grace_s).items():
            self._note(tally, (Update(site, ask.task_id(site), failure=failure),), ask.task)
        tally.check(self._round, task.name)
        model = total.result()
        if left_out := model.meta.get("left_out"):
            self.log(f"{type(aggregator).__name__} left out {', '.join(left_out)}: most sent another kind of update.", level="warning")
        return Reduced(model, model.metrics, Updates(map(good_of, updates)), dict(tally.failures))

    async def stream(
        self,
        next_task: Callable[[], Task],
        take: Callable[[Arrival], T],
        *,
        concurrency: int | None = None,
        within_s: float | None = None,
    ) -> AsyncGenerator[T, None]:
        """Asynchronous rounds: keep so many sites at work, and yield what `take` makes of each good update, as they come.

        As soon as one has answered, a site drawn at random among the idle ones gets a task. A site is at one task at a time. One that
        fails is asked again after the next commit. Under a simulated clock, updates come in the order of its time, those of one instant by
        rank, and before new tasks are given out. Close it, and what is out is given up.

        next_task: called once after each commit; all that begin until the next one get what it gives.
        take: a HanseError that it raises makes the update a failed one, which is noted and not yielded.
        concurrency: how many sites are at work at a time; default: all. within_s: seconds until one that has not answered is given up.
        Raises TooFewUpdates, with the reasons, once every site has failed since the last commit.
        """
        concurrency = len(self.sites) if concurrency is None else concurrency
        if not 0 < concurrency <= len(self.sites):
            raise ConfigError(f"concurrency is {concurrency}, of {len(self.sites)} sites: give a number from 1 to {len(self.sites)}")
        out: dict[str, _Out] = {}
        answers: asyncio.Queue[tuple[_Out, Update | Exception]] = asyncio.Queue()
        failed: dict[str, Failure] = {}
        busy: list[int] = []  # the ranks of those that are at work or have failed, in order
        version = self._journal.commits
        task: Task | None = None
        try:
            while True:
                one = None if self._clock is None else await _next_arrival(out, answers, self._clock, until_s=self._clock.now_s)
                if one is None:
                    if version != self._journal.commits:
                        version, task = self._journal.commits, None
                        failed.clear()
                        busy = sorted(one.rank for one in out.values())
                    task = task or self._sent(next_task())
                    while len(out) < concurrency and len(busy) < len(self.sites):
                        given = self._give(self._draw_idle(busy), task, answers, within_s)
                        out[given.site] = given
                        insort(busy, given.rank)
                    if not out:
                        reasons = {site: str(failure) for site, failure in sorted(failed.items())}
                        hint = "Mend these sites, and go on from the last commit."
                        raise TooFewUpdates(f"round {self._round + 1}: every site has failed.", reasons=reasons, hint=hint)
                    one = await _next_arrival(out, answers, self._clock, until_s=math.inf)
                assert one is not None
                del out[one.site]
                assert one.update is not None
                update = admit(one.update, one.ask.task, self._filters.server_in, self._seed)
                staleness = self._journal.commits - one.ask.key[1]
                if update.failure is None:
                    try:
                        taken = take(Arrival(update, one.ask.task, staleness))
                    except HanseError as error:
                        update = replace(update, model=FLModel(), failure=Failure.of(error))
                self._record(update, one.ask.task, staleness=staleness, **self._now())
                self._journal.progress(1, 1)
                if update.failure is None:
                    busy.remove(one.rank)
                    yield taken
                else:
                    failed[one.site] = update.failure
        finally:
            running = [one.running for one in reversed(out.values()) if one.running is not None]
            for each in running:
                each.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _draw_idle(self, busy: Sequence[int]) -> int:
        """The rank of a site drawn from those not in `busy`, which is in order: the same one in the same state of the job."""
        self._draws += 1
        idle = len(self.sites) - len(busy)
        drawn = int(generator(self._seed, "stream", self._journal.commits, self._draws).integers(idle))
        return drawn + bisect_right(range(len(busy)), drawn, key=lambda place: busy[place] - place)  # the busy ones before it

    def _give(self, rank: int, task: Task, answers: asyncio.Queue[tuple[_Out, Update | Exception]], within_s: float | None) -> _Out:
        """Have the site begin its next task. Its id depends on the commit and the site alone, so that a restarted job asks for it again."""
        site, commit = self.sites[rank], self._journal.commits
        index = STREAMED + self._streamed[site] * len(self.sites) + rank
        self._streamed[site] += 1
        ask = Ask(task, (self._job_id, commit, index), ((site,),), hurried=True)
        one = _Out(site, rank, ask)
        late = Update(site, ask.task_id(site), failure=too_late(f"{within_s} s"))
        if self._clock is not None:
            one.task_bytes, one.began_s = size_bytes(task.model.params), self._clock.now_s
            one.earliest_s = self._clock.earliest_s(site, task, task_bytes=one.task_bytes, began_s=one.began_s)
            one.deadline_s = one.began_s + (math.inf if within_s is None else within_s)
            one.late = late
            if one.earliest_s > one.deadline_s:  # its work would be for nothing
                one.update, one.arrival_s = late, one.deadline_s
                return one
        timeout_s = within_s if self._clock is None else None

        async def carry() -> None:
            try:
                async with asyncio.timeout(timeout_s), aclosing(self._courier.ask(ask)) as updates:
                    update = await anext(updates)
            except TimeoutError:
                update = late
            except Exception as error:
                answers.put_nowait((one, error))
                return
            answers.put_nowait((one, update))

        one.running = asyncio.create_task(carry(), name=f"task {ask.task_id(site)}")
        return one

    def skip(self) -> None:
        """Ask nothing, where a restarted job may have to ask: the tasks that follow have the same ids in both."""
        self._asks += 1

    async def keep_best(self, model: FLModel, metrics: Mapping[str, float], metric: str, *, lowest: bool = False) -> bool:
        """Keep `model` as the best so far if `metrics[metric]` is better than every one before; True if it was."""
        value, best = metrics.get(metric, math.nan), self._journal.best
        if math.isnan(value) or (best is not None and (value >= best.value if lowest else value <= best.value)):
            return False
        self._journal.keep_best(model, Best(metric, value, self._round))
        return True

    async def commit(self, model: FLModel, metrics: Mapping[str, float] | None = None) -> FLModel:
        """Keep `model`: a restarted job goes on from here. Returns it with round and metrics filled in."""
        good, asked = self._counts.get(TRAIN) or next(iter(self._counts.values()), (0, 0))
        committed = replace(model, metrics=dict(metrics or {}), current_round=self._round, total_rounds=self._total)
        self._journal.event(
            "round",
            round=self._round,
            seconds=time.perf_counter() - self._round_began,
            asked=asked,
            good=good,
            metrics=dict(committed.metrics),
            best=self._journal.best is not None and self._journal.best.round == self._round,
            **self._now(),
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
        total = len(self.sites)
        single = single or total <= FEW_SITES
        if not self._by_roster:
            ranks, total = {site: place for place, site in enumerate(sorted(ranks, key=ranks.__getitem__))}, len(ranks)
        groups = group_by_rank(ranks, total, single=single)
        return Ask(self._sent(task), key, groups, hurried, sized=self._clock is not None)

    def _sent(self, task: Task) -> Task:
        """The task as sites get it: through the server's filters, and with the round's number."""
        key = (self._job_id, self._journal.commits, self._asks)
        self._asks += 1
        model = replace(task.model, optimizer_params={})
        if self._total is not None:
            model = replace(model, current_round=self._round, total_rounds=self._total)
        sent = apply_filters(self._filters.server_out, model, reference=model, rng=lambda: generator(self._seed, "server_out", *key))
        return replace(task, model=sent)

    def _now(self) -> dict[str, float]:
        """The simulated time, for an event."""
        return {} if self._clock is None else {"virtual_s": self._clock.now_s}

    def _note(self, tally: Tally, group: tuple[Update, ...] | Columns, task: Task) -> None:
        tally.count(group)
        if isinstance(group, Columns):
            told = {"sites": group.sites, "seconds": group.seconds, "metrics": group.metrics, "weight": _weight(group.meta)}
            self._event("updates", task, len(group), len(group), **told)
        else:
            for update in group:
                self._record(update, task)
        self._journal.progress(tally.good + len(tally.failures), tally.asked)

    def _record(self, update: Update, task: Task, **facts: Any) -> None:
        if (failure := update.failure) is not None:
            said = {"code": failure.code, "message": failure.message, "hint": failure.hint}
            self._event("failure", task, 0, 1, site=update.site, **said, **facts)
        else:
            metrics, weight = dict(update.model.metrics), _weight(update.model.meta)
            self._event("update", task, 1, 1, site=update.site, seconds=update.seconds, metrics=metrics, weight=weight, **facts)
        for record in update.records:
            self._journal.event(
                "record", round=self._round, site=update.site, key=record.key, value=record.value, step=record.step, kind=record.kind
            )

    def _event(self, kind: str, task: Task, good: int, asked: int, **facts: Any) -> None:
        about = {"model_of": task.config["model_of"]} if "model_of" in task.config else {}  # a model other than the job's
        self._journal.event(kind, round=self._round, task=task.name, **facts, **about)
        if not about:
            counts = self._counts.setdefault(task.name, [0, 0])
            counts[0] += good
            counts[1] += asked


def _weight(meta: Mapping[str, Any]) -> Any:
    """What events tell as the weight: of an update a number, of columns one for each; None if there is none."""
    return meta.get("examples", meta.get("steps"))


@cache
def group_starts(sites: int) -> tuple[int, ...]:
    """The first rank of each group that so many sites are split into. A group is folded by itself: few leave little to merge, many keep
    many workers busy, and small ones at the end let all workers end together.

    64 sites make one, but no less than 1/256 and no more than 1/16 of all; towards the end a group is a quarter of those that are left.
    """
    widest, starts, rank = max(1, sites // min(max(16, sites // 64), 256)), [], 0
    while rank < sites:
        starts.append(rank)
        rank += max(1, min(widest, (sites - rank) // 4))
    return tuple(starts)


def group_of(rank: int, sites: int) -> int:
    """The number of the group that the site of this rank is in."""
    return bisect_right(group_starts(sites), rank) - 1


def group_by_rank(ranks: Mapping[str, int], sites: int, *, single: bool = False) -> tuple[tuple[str, ...], ...]:
    """The sites by rank, in groups that depend on their ranks, below `sites`, alone. `single`: one site a group."""
    groups: dict[int, list[str]] = {}
    for site, rank in sorted(ranks.items(), key=lambda item: item[1]):
        groups.setdefault(rank if single else group_of(rank, sites), []).append(site)
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
    """Fold one group's updates, each as it comes, so that a site's memory may be used again for the next; small ones are copied, and folded
    together at the end.

    Returns the partial sum (None if no update was good) and the updates without their parameters, rejected ones with a failure.
    """
    total = aggregator.fresh(task.model)
    light: list[Update] = []
    rejected: dict[str, UpdateRejected] = {}
    held: list[int] = []
    for arrived in updates:
        update = admit(arrived, task, filters, seed)
        if update.failure is None and size_bytes(update.model.params) <= HELD_BYTES:
            held.append(len(light))
            light.append(replace(update, model=bearing(update.model, _copied(update.model.params))))
        else:
            light.append(_add(update, total))
            rejected |= total.fold()
    for at in held:
        light[at] = _add(light[at], total)
    rejected |= total.fold()
    for at, update in enumerate(light):
        if update.site in rejected:
            light[at] = replace(update, model=FLModel(), failure=Failure.of(rejected[update.site]))
    good = any(update.failure is None for update in light)
    return (total.partial() if good else None), tuple(light)


def add_one(arrived: Update, total: Aggregator, task: Task, filters: Sequence[Filter], seed: int) -> Update:
    """Through the server's door and into `total`. Returns the update without its parameters; one that was rejected carries a failure."""
    update = _add(admit(arrived, task, filters, seed), total)
    if update.failure is None and (rejected := total.fold().get(update.site)) is not None:
        return replace(update, model=FLModel(), failure=Failure.of(rejected))
    return update


def _add(update: Update, total: Aggregator) -> Update:
    """Into `total`, not folded yet. Returns the update without its parameters; one that was rejected carries a failure."""
    failure = update.failure
    if failure is None:
        try:
            total.add(update)
        except UpdateRejected as error:
            failure = Failure.of(error)
    return replace(update, model=FLModel() if failure else bearing(update.model, None), failure=failure)


def _copied(params: Any) -> Any:
    """The same in memory of its own."""
    if isinstance(params, dict) and all(type(array) is np.ndarray for array in params.values()):
        return {name: array.copy() for name, array in params.items()}
    return copy.deepcopy(params)


@dataclass(eq=False)
class _Out:
    """An asynchronous task that is out. update: its answer, once it is there. The times are of a simulated clock."""

    site: str
    rank: int
    ask: Ask
    running: asyncio.Task[None] | None = None
    update: Update | None = None
    late: Update | None = None
    task_bytes: int = 0
    began_s: float = 0.0
    earliest_s: float = 0.0
    arrival_s: float = 0.0
    deadline_s: float = math.inf

    def answered(self, update: Update, clock: Clock) -> None:
        at_s = clock.arrival_s(update, self.ask.task, task_bytes=self.task_bytes, began_s=self.began_s)
        self.arrival_s = max(at_s, self.earliest_s)
        if self.arrival_s > self.deadline_s:
            assert self.late is not None
            update, self.arrival_s = self.late, self.deadline_s
        self.update = update


async def _next_arrival(
    out: Mapping[str, _Out], answers: asyncio.Queue[tuple[_Out, Update | Exception]], clock: Clock | None, *, until_s: float
) -> _Out | None:
    """The task whose answer is the next to arrive; with a clock, which it sets, None if that is after `until_s`. Raises what carrying a
    task raised."""
    while True:
        first = None
        if clock is not None:
            first = min((one for one in out.values() if one.update is not None), key=lambda one: (one.arrival_s, one.rank), default=None)
            bound_s = until_s if first is None else min(first.arrival_s, until_s)
            if not any(one.update is None and one.earliest_s <= bound_s for one in out.values()):  # nothing else can come before
                if first is None or first.arrival_s > until_s:
                    return None
                clock.now_s = max(clock.now_s, first.arrival_s)
                return first
        one, answer = await answers.get()
        if isinstance(answer, Exception):
            raise answer
        if clock is None:
            one.update = answer
            return one
        one.answered(answer, clock)
