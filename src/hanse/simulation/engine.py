"""The simulator's courier: a few workers that run all sites, replaced when they die."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from hanse.aggregation.aggregator import Aggregator
from hanse.client.script import Script
from hanse.cohort import fold_group, group_of
from hanse.errors import Failure, LinkBroken
from hanse.jobs.parts import describe_part
from hanse.messages.codec import decode, decode_update, encode_task
from hanse.messages.task import Task
from hanse.messages.update import Columns, Update
from hanse.simulation.processes import Processes
from hanse.simulation.together import joined
from hanse.simulation.worker import Begin, Close, Closed, End, Run, Staff, decode_answer, encode_order
from hanse.site.script import Ending
from hanse.transport.courier import Ask, Folded
from hanse.transport.memory import Body, Buffer, Received, map_shared

TRIES = 3
"""So many times a group of sites is run whose worker dies before it is given up."""
AHEAD = 4
"""Partial sums that wait for an earlier group: at most this many for each worker."""
CLOSE_WITHIN_S = 10.0


class WorkerLink(Protocol):
    """A running worker, as the engine sees it. What it is told it does in that order, and so its answers come.

    name: for messages, such as "worker process 4711". pid: where it runs; 0 while it is not known.
    """

    name: str
    pid: int

    def send(self, message: bytes) -> None:
        """Tell it something. Raises LinkBroken if it is known to be gone."""

    def send_shared(self, message: bytes, body: Any) -> None:
        """Tell it something, with a body that its crew shares."""

    def receive_ready(self) -> list[Received]:
        """The answers that are there. Raises LinkBroken once it is gone and nothing is left."""

    def end(self) -> str:
        """See to it that it has ended; nothing is heard of it any more. Returns how: "was killed by SIGKILL"."""


class Crew(Protocol):
    """Where workers come from: processes of this machine, or actors of a Ray cluster."""

    async def open(self, workers: int) -> None:
        """Make ready for so many. Raises a HanseError if they cannot be had."""

    async def close(self) -> None:
        """All workers have been ended."""

    def start(self, hear: Callable[[], None]) -> WorkerLink:
        """A new worker. `hear` is called on the event loop when there may be something to receive."""

    def share(self, parts: Iterable[Buffer]) -> Any:
        """A body that all workers can be sent, written once; `drop` it when none will be sent it any more."""

    def drop(self, body: Any) -> None: ...


@dataclass(eq=False)
class _Order:
    """One piece of work: a group of one ask. `lane` is the only worker that may do it, where sites live in their worker."""

    asking: _Asking
    group: int
    sites: tuple[str, ...]
    lane: int | None
    tries: int = 0


@dataclass(eq=False)
class _Asking:
    """One ask under way: what came back and waits to be taken, and which groups are through."""

    ask: Ask
    number: int
    body: Any
    fold: dict[str, Any] | None
    results: asyncio.Queue[tuple[int, tuple[Update, ...] | Columns, Body | None]] = field(default_factory=asyncio.Queue)
    told: set[int] = field(default_factory=set)
    through: set[int] = field(default_factory=set)
    head: int = 0

    def done_with(self, group: int) -> None:
        self.through.add(group)
        while self.head in self.through:
            self.head += 1


@dataclass(eq=False)
class _Worker:
    link: WorkerLink
    orders: deque[_Order] = field(default_factory=deque)
    closed: asyncio.Future[tuple[Ending, ...]] | None = None


class SimulatedSites:
    """Carries tasks to sites that live in so many `workers`. Enter it, and its workers are there; leave it, and they are gone.

    crew: where the workers come from; None: they are processes of this machine.
    A worker that dies is replaced and its sites' tasks run again, from the state the sites had before, so the result has the same bits.
    Scripts stay in their worker, since their variables live there; functions run wherever there is room.
    """

    def __init__(
        self,
        staff: Staff,
        *,
        workers: int,
        crew: Crew | None = None,
        states: Mapping[str, bytes] | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.roster = staff.roster
        self._staff = staff
        self._crew = Processes(staff) if crew is None else crew
        self._count = workers
        self._warn = warn
        self._lanes = isinstance(staff.code, Script)
        self._workers: list[_Worker | None] = [None] * workers
        self._orders: list[deque[_Order]] = [deque() for _ in range(workers + 1)]  # by lane, the last for any worker
        self._asks = 0
        self._active: set[_Asking] = set()
        self._bodies: dict[int, tuple[Any, int]] = {}  # by the identity of a task that is out: its body, and how many asks have it
        self.states: dict[str, bytes] = dict(states or {})
        """What each site keeps across rounds, as frames, after the last task it did."""

    async def __aenter__(self) -> SimulatedSites:
        await self._crew.open(self._count)
        for slot in range(self._count):
            self._workers[slot] = self._start(slot)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                await self._close_gently()
        finally:
            for worker in self._living:
                worker.link.end()
            self._workers = [None] * self._count
            await self._crew.close()

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.link.pid for worker in self._living]

    @property
    def _living(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker is not None]

    async def ask(self, ask: Ask) -> AsyncGenerator[Update, None]:
        """See `Courier.ask`. Each update's arrays are shared memory of their own, freed with them."""
        asking = self._begin(ask, [(site,) for site in ask.sites], fold=None)
        try:
            for _ in ask.sites:
                _group, updates, _body = await asking.results.get()
                asking.head += 1  # in any order: nothing waits for an earlier one
                self._dispatch()
                yield next(iter(updates))
        finally:
            self._finish(asking)

    async def fold(self, ask: Ask, aggregator: Aggregator) -> AsyncGenerator[Folded, None]:
        """See `Courier.fold`. Aggregators that are registered run in the workers; any other one gets its updates here."""
        description = describe_part("aggregators", aggregator)
        if description is None:
            async for folded in self._fold_here(ask, aggregator):
                yield folded
            return
        groups = list(ask.groups)
        if not ask.hurried and not ask.sized and self._staff.trains_together(ask.task):
            groups = joined(groups)
        asking = self._begin(ask, groups, fold=description)
        try:
            for _ in groups:
                group, updates, body = await asking.results.get()
                total = None if body is None else decode(body.buffer)[0]
                yield Folded(group, total, updates, partial(self._through, asking, group, body))
        finally:
            self._finish(asking)

    async def _fold_here(self, ask: Ask, aggregator: Aggregator) -> AsyncGenerator[Folded, None]:
        group_of = {site: number for number, group in enumerate(ask.groups) for site in group}
        arrived: dict[int, dict[str, Update]] = {}
        async for update in self.ask(ask):
            number = group_of[update.site]
            group = arrived.setdefault(number, {})
            group[update.site] = update
            if len(group) == len(ask.groups[number]):
                del arrived[number]
                ranked = [group[site] for site in ask.groups[number]]
                total, light = fold_group(ranked, aggregator, ask.task, self._staff.filters.server_in, self._staff.seed)
                yield Folded(number, total, light, lambda: None)

    # the asks

    def _begin(self, ask: Ask, groups: list[tuple[str, ...]], fold: dict[str, Any] | None) -> _Asking:
        self._asks += 1
        asking = _Asking(ask, self._asks, self._share(ask.task), fold)
        self._active.add(asking)
        for number, sites in enumerate(groups):
            lane = self._lane(sites[0]) if self._lanes else None
            self._orders[self._count if lane is None else lane].append(_Order(asking, number, sites, lane))
        self._dispatch()
        return asking

    def _share(self, task: Task) -> Any:
        """The task's body; asynchronous asks of one version have the same task, and its memory once."""
        body, asks = self._bodies.get(id(task)) or (self._crew.share(encode_task(task)), 0)
        self._bodies[id(task)] = body, asks + 1
        return body

    def _drop(self, task: Task) -> None:
        body, asks = self._bodies.pop(id(task))
        if asks > 1:
            self._bodies[id(task)] = body, asks - 1
        else:
            self._crew.drop(body)

    def _lane(self, site: str) -> int:
        """The worker a scripted site lives in: by its group in the roster, so that none is split; to and fro, since groups shrink."""
        there_and_back = group_of(self.roster.index(site), len(self.roster)) % (2 * self._count)
        return min(there_and_back, 2 * self._count - 1 - there_and_back)

    def _through(self, asking: _Asking, group: int, body: Body | None) -> None:
        if body is not None:
            body.release()
        asking.done_with(group)
        self._dispatch()

    def _finish(self, asking: _Asking) -> None:
        """Give up what is still out, by ending the workers that are at it, and let the workers forget the task."""
        self._active.discard(asking)
        self._orders = [deque(order for order in orders if order.asking is not asking) for orders in self._orders]
        for slot, worker in enumerate(self._workers):
            if worker is not None and any(order.asking is asking for order in worker.orders):
                self._bury(slot, but=asking)
            elif slot in asking.told:
                self._send(slot, End(asking.number))
        self._drop(asking.ask.task)
        self._dispatch()

    def _dispatch(self) -> None:
        """Give every worker something to do, and one thing more while there is plenty, so that none waits for this process."""
        for depth in (1, 2):
            for slot, worker in enumerate(self._workers):
                busy = 0 if worker is None else len(worker.orders)
                for _ in range(busy, depth):
                    if (order := self._next_order(slot, depth)) is not None:
                        self._give(slot, order)

    def _next_order(self, slot: int, depth: int) -> _Order | None:
        """What this worker does next; nothing if all that is left is better kept for others, or lies too far ahead."""
        anyones = self._orders[-1]
        queue = self._orders[slot] or (anyones if depth == 1 or len(anyones) > self._count else None)
        if not queue:
            return None
        asking = queue[0].asking
        if asking.ask.hurried:  # nothing may wait behind a site that never answers
            return queue.popleft() if depth == 1 else None
        return queue.popleft() if queue[0].group < asking.head + AHEAD * self._count else None

    def _give(self, slot: int, order: _Order) -> None:
        """Hand an order to a worker, started for it if there is none: one that dies as it starts is given up with its orders."""
        asking = order.asking
        worker = self._workers[slot] = self._workers[slot] or self._start(slot)
        worker.orders.append(order)
        states = {site: self.states[site] for site in order.sites if site in self.states}
        if slot not in asking.told:
            asking.told.add(slot)
            self._send(slot, Begin(asking.number, asking.fold, asking.ask.sized), asking.body)
        self._send(slot, Run(asking.number, order.group, asking.ask.key, list(order.sites), states))

    def _send(self, slot: int, message: Begin | Run | End | Close, body: Any = None) -> None:
        """To a worker that is alive; if it has just died, its link's end will be noticed and its orders given again."""
        if (worker := self._workers[slot]) is None:
            return
        with contextlib.suppress(LinkBroken):
            if body is None:
                worker.link.send(encode_order(message))
            else:
                worker.link.send_shared(encode_order(message), body)

    # the answers

    def _hear(self, slot: int) -> None:
        worker = self._workers[slot]
        assert worker is not None
        try:
            for received in worker.link.receive_ready():
                self._take(worker, received)
        except LinkBroken:
            if worker.closed is not None:
                self._has_ended(worker)
                return
            self._bury(slot)
        self._dispatch()

    def _take(self, worker: _Worker, received: Received) -> None:
        answer = decode_answer(received.message)
        if isinstance(answer, Closed):
            if worker.closed is not None:
                worker.closed.set_result(answer.endings)
            return
        order = worker.orders.popleft()
        self.states |= answer.states
        updates, body = answer.updates, received.body
        if order.asking.fold is None:
            updates, body = (_own_update(received),), None
        order.asking.results.put_nowait((order.group, updates, body))

    # the workers

    def _start(self, slot: int) -> _Worker:
        return _Worker(self._crew.start(partial(self._hear, slot)))

    def _bury(self, slot: int, *, but: _Asking | None = None) -> None:
        """Clear up after a dead worker: its orders wait for a new one, save those of the ask `but`, which has been given up."""
        worker = self._workers[slot]
        assert worker is not None
        why = worker.link.end()
        self._workers[slot] = None
        if but is None:
            self._warn(f"{worker.link.name} {why}: a new one takes its place, and what it was at runs again")
        for asking in self._active:
            asking.told.discard(slot)
        for number, order in enumerate(reversed(worker.orders)):
            if order.asking is but:
                continue
            order.tries += but is None and number == len(worker.orders) - 1
            if order.tries >= TRIES:
                hint = "Look for what ends the process: memory, a crash in native code, os._exit."
                failure = Failure("WorkerDied", f"the worker {why}, {TRIES} times, while this site's group ran.", hint)
                updates = tuple(Update(site, order.asking.ask.task_id(site), failure=failure) for site in order.sites)
                order.asking.results.put_nowait((order.group, updates, None))
            else:
                self._orders[-1 if order.lane is None else order.lane].appendleft(order)

    def _has_ended(self, worker: _Worker) -> None:
        """A worker that was told to close is gone; one that died before its scripts had ended is not waited for."""
        if worker.closed is not None and not worker.closed.done():
            worker.closed.set_result(())
            self._warn(f"{worker.link.name} died while its scripts ran to their end")

    async def _close_gently(self) -> None:
        """Let scripts run to their end, for a while."""
        if not self._lanes:
            return
        loop = asyncio.get_running_loop()
        for slot, worker in enumerate(self._workers):
            if worker is not None:
                worker.closed = loop.create_future()
                self._send(slot, Close())
        futures = [worker.closed for worker in self._living if worker.closed is not None]
        if not futures:
            return
        _, late = await asyncio.wait(futures, timeout=CLOSE_WITHIN_S)
        for future in futures:
            for ending in () if future in late else future.result():
                if ending.failure is not None:
                    self._warn(f"{ending.site}, after the job's end: {ending.failure}")
        if late:
            self._warn(f"{len(late)} workers did not end their scripts within {CLOSE_WITHIN_S:g} s and were killed")


def _own_update(received: Received) -> Update:
    """A single update, out of memory of its own."""
    if received.shared is not None:
        update = decode_update(map_shared(received.shared))
        os.close(received.shared[0])
        return update
    assert received.body is not None
    return decode_update(received.body.buffer)
