"""The courier of a real federation: lives in a job's process and has the server carry tasks and updates."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from hanse.aggregation.aggregator import Aggregator
from hanse.cohort import fold_group
from hanse.errors import Failure, HanseError, LinkBroken
from hanse.filters import Filters
from hanse.messages.codec import Buffer, decode_update, encode_task
from hanse.messages.update import Update
from hanse.messages.wire import INLINE_BYTES, Blob, TaskRef
from hanse.server.job_link import Arrived, Ask, FromJob, GiveUp, Noted, Start, Stop, decode_to_job, encode
from hanse.transport.blobs import FolderBlobs, blob_path, map_file
from hanse.transport.courier import Ask as CourierAsk
from hanse.transport.courier import Folded, Roster
from hanse.transport.memory import Body, MemoryLink, Received

Arrival = tuple[Arrived, Body | None]
logger = logging.getLogger(__name__)


class RemoteSites:
    """Carries tasks to real sites, through the server at the other end of `link`, while it is `listening`.

    A large task is written once, as a blob for all its sites; a large update is a blob that is mapped, never read into memory.
    """

    def __init__(
        self,
        link: MemoryLink,
        roster: Roster,
        updates: Path,
        tasks: FolderBlobs,
        *,
        filters: Filters,
        seed: int,
        gone: Callable[[], object],
    ) -> None:
        """updates: the folder of blobs with the large ones; it is only read. tasks: where this job's large ones go. gone: called when the
        server is gone."""
        self.roster = roster
        self._link = link
        self._updates, self._tasks = updates, tasks
        self._written: Counter[Blob] = Counter()  # asks under way, by their task's blob
        self._filters = filters
        self._seed = seed
        self._arrivals: dict[TaskRef, asyncio.Queue[Arrival]] = {}
        self._stop: Callable[[], object] = lambda: None
        self._gone = gone
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def listening(self, *, stop: Callable[[], object]) -> Iterator[None]:
        """Hear the server meanwhile, on the running loop. stop: called when it says Stop."""
        self._stop, self._loop = stop, asyncio.get_running_loop()
        self._loop.add_reader(self._link.socket, self._hear)
        self._loop.call_soon(self._hear)
        try:
            yield
        finally:
            self._loop.remove_reader(self._link.socket)
            self._loop = None

    def tell(self, message: FromJob, body: Sequence[Buffer] = ()) -> None:
        """Send the server a message."""
        try:
            self._link.send(encode(message), body)
        except LinkBroken:
            self._gone()
        if self._loop is not None and (body or isinstance(message, Noted)):  # a large one may have taken in messages: look at them
            self._loop.call_soon(self._hear)

    async def ask(self, ask: CourierAsk) -> AsyncGenerator[Update, None]:
        """See `Courier.ask`. A large update's arrays are views of its blob, which stays as it is as long as they live."""
        async with self._asking(ask) as arrivals:
            for _ in ask.sites:
                arrived, body = await arrivals.get()
                if body is not None:
                    buffer = bytes(body.buffer)
                    body.release()
                    yield self._update(ask, arrived, buffer)
                else:
                    yield self._update(ask, arrived, None)

    async def fold(self, ask: CourierAsk, aggregator: Aggregator) -> AsyncGenerator[Folded, None]:
        """See `Courier.fold`. A group of a single site comes unfolded, a larger one is folded here once all of it is there."""
        group_of = {site: number for number, group in enumerate(ask.groups) for site in group}
        waiting: dict[int, dict[str, Arrival]] = {}
        async with self._asking(ask) as arrivals:
            for _ in ask.sites:
                arrived, body = await arrivals.get()
                number = group_of[arrived.site]
                group = ask.groups[number]
                if len(group) == 1:
                    update = self._update(ask, arrived, None if body is None else body.buffer)
                    yield Folded(number, None, (update,), _nothing if body is None else body.release)
                    continue
                there = waiting.setdefault(number, {})
                there[arrived.site] = arrived, body
                if len(there) == len(group):
                    yield self._folded(ask, number, [there[site] for site in group], aggregator)
                    del waiting[number]

    def _folded(self, ask: CourierAsk, number: int, group: list[Arrival], aggregator: Aggregator) -> Folded:
        updates = [self._update(ask, arrived, None if body is None else body.buffer) for arrived, body in group]
        partial, light = fold_group(updates, aggregator, ask.task, self._filters.server_in, self._seed)
        for _, body in group:
            if body is not None:
                body.release()
        return Folded(number, partial, light, _nothing)

    def _update(self, ask: CourierAsk, arrived: Arrived, inline: Buffer | None) -> Update:
        task_id = ask.task_id(arrived.site)
        if arrived.failure is not None:
            return Update(arrived.site, task_id, failure=arrived.failure)
        try:
            if inline is None:
                assert arrived.blob is not None
                inline = map_file(blob_path(self._updates, arrived.blob))
            update = decode_update(inline)
        except HanseError as error:
            return Update(arrived.site, task_id, failure=Failure.of(error))
        assert update.task_id == task_id, "the server lets no other update in"
        return update

    @asynccontextmanager
    async def _asking(self, ask: CourierAsk) -> AsyncIterator[asyncio.Queue[Arrival]]:
        task, blob = TaskRef(ask.key[1], ask.key[2]), None
        arrivals = self._arrivals[task] = asyncio.Queue()
        try:
            frame = encode_task(ask.task)
            if sum(memoryview(part).nbytes for part in frame) > INLINE_BYTES:
                blob = self._tasks.write(frame)
                self._written[blob] += 1
                self.tell(Ask(task=task, sites=list(ask.sites), blob=blob))
            else:
                self.tell(Ask(task=task, sites=list(ask.sites)), frame)
            del frame
            yield arrivals
        finally:
            del self._arrivals[task]
            self.tell(GiveUp(task=task))
            if blob is not None:
                self._written[blob] -= 1
                if not self._written[blob]:
                    self._tasks.remove(blob)

    def _hear(self) -> None:
        if self._loop is None:
            return
        try:
            for received in self._link.receive_ready():
                self._take(received)
        except LinkBroken:
            self._gone()

    def _take(self, received: Received) -> None:
        match decode_to_job(received.message):
            case Arrived(task=task) as arrived:
                if task in self._arrivals:
                    self._arrivals[task].put_nowait((arrived, received.body))
                elif received.body is not None:
                    received.body.release()
            case Stop():
                self._stop()
            case Start():
                logger.error("the server said Start twice; the second is ignored")


def _nothing() -> None:
    """An update that is no body of a message has nothing to give back."""
