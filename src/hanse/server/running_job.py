"""A job that runs: its workflow's process, the tasks that are out, and the updates that came."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from hanse.errors import Failure, HanseError, LinkBroken, StorageFull, WireError
from hanse.messages.codec import Buffer, decode_update
from hanse.messages.task import TaskId
from hanse.messages.wire import Assignment, Blob, Delivery, FromServer, Payload, TaskRef, Withdraw
from hanse.messages.wire import Received as ReceivedUpdate
from hanse.sandbox import Sandbox, environment, remove_links
from hanse.server.blob_store import BlobStore
from hanse.server.job_events import JobEvents
from hanse.server.job_link import (
    NO_ROOM,
    Arrived,
    Ask,
    Committed,
    Finished,
    GiveUp,
    Noted,
    Start,
    Stop,
    ToJob,
    decode_from_job,
    encode,
    is_full,
)
from hanse.server.run_folder import RUN, RunFolder
from hanse.server.store import Job, Store, UpdateKey
from hanse.server.tracker import Tracker
from hanse.transport.memory import MemoryLink, Received

TRIES = 4
"""A process that dies so many times without a commit in between is given up."""
STOP_WITHIN_S = 20.0
GONE_WITHIN_S = 2.0
"""A process whose link has broken ends within this time, and says how, or is killed."""
MAX_HEADER_BYTES = 16 << 20
"""Of an update's frame."""

ROW_BYTES = 32 << 10
"""A larger update is kept as a blob: a database takes long to write, and longer to delete, what a file system does at once."""

LOG = "server.log"
"""What the workflow's process prints, in the run folder."""
TASKS = "tasks"
"""Large tasks that are out, as blobs, in the run folder."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0  # for room on a full disk
_EARLY = 16  # updates a site may bring before the workflow, started again, has asked for them
_LAST_LINES = 20

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Sites(Protocol):
    """The sites, as a running job needs them."""

    def send(self, site: str, message: FromServer) -> bool:
        """Send it, if the site is connected; whether it is."""


@dataclass(eq=False)
class _Open:
    """A task that is out, for `sites`. waiting: whose update is still to come. failed: who was given up. timers: of those that are away.

    asked: by the process that runs now; it is told nothing of what only one before it has asked for.
    """

    payload: Payload
    sites: frozenset[str]
    waiting: set[str]
    asked: bool = True
    failed: set[str] = field(default_factory=set)
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)


class RunningJob:
    """Keeps a job's workflow running in a process of its own, and carries its tasks and updates.

    An update is handed on at once and kept meanwhile; only a kept one is acknowledged. So after a crash of the process, or of the server,
    the workflow gets those that were acknowledged from the store, and the sites bring the others again.

    ended: awaited with how the job ended, once. absence_s: a site that is away for longer is not waited for. sandbox: for the process; it
    has the run folder to write, and the blobs to read. tracker: started and closed with the job. arrived: told of each update that came,
    "accepted" or "refused", and its bytes.
    """

    def __init__(
        self,
        job: Job,
        roster: Sequence[str],
        folder: Path,
        *,
        store: Store,
        blobs: BlobStore,
        sites: Sites,
        events: JobEvents,
        ended: Callable[[Finished], Awaitable[None]],
        absence_s: float,
        sandbox: Sandbox | None = None,
        tracker: Tracker | None = None,
        arrived: Callable[[str, int], object] = lambda outcome, size: None,
    ) -> None:
        self.id, self.name, self.roster, self.folder = job.id, job.name, tuple(roster), folder
        self.commits, self.rounds = job.commits, job.rounds
        self._store, self._blobs, self._sites, self._events = store, blobs, sites, events
        self._ended, self._absence_s, self._sandbox, self._arrived = ended, absence_s, sandbox, arrived
        self._open: dict[TaskRef, _Open] = {}
        self._closed: set[TaskRef] = set()
        self._kept: set[UpdateKey] = set()
        self._arriving: dict[UpdateKey, asyncio.Task[Failure | None]] = {}
        self._early: Counter[str] = Counter()
        self._left: dict[str, Failure] = {}
        self._link: MemoryLink | None = None
        self._writable = select.poll()
        self._outbox: deque[tuple[ToJob, Sequence[Buffer]]] = deque()
        self._over: asyncio.Future[Finished | None] | None = None
        self._stopping = self._full = False
        self._background: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._tracker = tracker
        self.pid: int | None = None
        """Of the workflow's process, while it runs."""

    def start(self) -> None:
        """Start the workflow, from its last commit if there is one."""
        self._keeper = asyncio.create_task(self._keep_running(), name=f"job {self.id}")
        self._keeper.add_done_callback(self._log_failure)
        if (tracker := self._tracker) is not None:
            tracker.start(self._tracked)
            self._keeper.add_done_callback(lambda _: tracker.close())

    async def stop(self) -> None:
        """Stop the workflow for good; what it has committed is its result. Returns when the job has ended."""
        self._stopping = True
        self._send(Stop())
        assert self._keeper is not None
        await asyncio.wait([self._keeper], timeout=STOP_WITHIN_S)
        if self._over is not None:
            _give(self._over, None)  # a workflow that does not let itself be stopped is killed
        await asyncio.wait([self._keeper])

    async def suspend(self) -> None:
        """The server ends: kill the process. The job goes on from its last commit when the server is started again."""
        for task in (self._keeper, *self._background, *self._arriving.values()):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        for task_out in self._open.values():
            _cancel(task_out.timers)

    # what sites do

    def came(self, site: str) -> list[Assignment]:
        """The site is connected: the tasks that it owes an update."""
        assignments = []
        for task, out in self._open.items():
            if self._owes(site, task, out):
                if (timer := out.timers.pop(site, None)) is not None:
                    timer.cancel()
                assignments.append(Assignment(job=self.id, task=task, payload=out.payload))
        return assignments

    def went(self, site: str) -> None:
        """The site's connection is gone. It has some time to come again."""
        for task, out in self._open.items():
            if self._owes(site, task, out):
                self._await_return(task, out, site)

    def left(self, site: str, why: Failure) -> None:
        """The site takes no more part, until it is `back`."""
        self._left[site] = why
        for task, out in self._open.items():
            if self._owes(site, task, out):
                self._fail(task, out, site, why)

    def _owes(self, site: str, task: TaskRef, out: _Open) -> bool:
        """Whether its update is neither here nor given up; what is kept may be on its way to the workflow."""
        return site in out.waiting and UpdateKey(task, site) not in self._kept

    def back(self, site: str) -> None:
        """The site takes part."""
        self._left.pop(site, None)

    async def deliver(self, site: str, delivery: Delivery) -> ReceivedUpdate:
        """What to answer an update with, once it is kept. One that nobody waits for is not kept.

        Raises StorageFull if it cannot be kept; the site may bring it again.
        """
        key = UpdateKey(delivery.task, site)
        problem = None
        if key not in self._kept and site in self.roster and self._may_come(key):
            if key not in self._arriving:
                self._arriving[key] = asyncio.create_task(self._accept(key, delivery.payload))
                self._arriving[key].add_done_callback(lambda _: self._arriving.pop(key))
            problem = await asyncio.shield(self._arriving[key])
        return ReceivedUpdate(job=self.id, task=delivery.task, problem=problem)

    def has_task(self, blob: Blob, site: str) -> bool:
        """Whether the blob is a task that the site owes an update."""
        return any(out.payload.blob == blob and site in out.waiting for out in self._open.values())

    @property
    def task_folder(self) -> Path:
        return self.folder / TASKS

    def _may_come(self, key: UpdateKey) -> bool:
        """Whether an update is waited for, or will be once the workflow, which was started again, comes to ask for it."""
        task = key.task
        if (out := self._open.get(task)) is not None:
            return key.site in out.sites and key.site not in out.failed
        if task in self._closed or not self.commits <= task.commit <= self.commits + 1 or self._early[key.site] >= _EARLY:
            return False
        self._early[key.site] += 1
        return True

    async def _accept(self, key: UpdateKey, payload: Payload) -> Failure | None:
        """Hand an update on and keep it; or say what is wrong with it, which counts as the site's answer."""
        size = len(payload.inline or b"") if payload.blob is None else payload.blob.size
        problem = await self._problem(key, payload)
        self._arrived("refused" if problem else "accepted", size)
        if problem:
            logger.warning("job %s: the update of site %r for task %s is refused: %s", self.id, key.site, key.task, problem)
            if (out := self._open.get(key.task)) is not None and key.site in out.waiting:
                self._fail(key.task, out, key.site, problem)
            return problem
        self._hand_on(key, payload)
        if payload.inline is not None and len(payload.inline) > ROW_BYTES:
            payload = Payload(blob=await asyncio.to_thread(self._blobs.folder.write, [payload.inline]))
        if payload.blob is not None:
            await self._blobs.keep(payload.blob)
        await self._store.add_update(self.id, key, payload)
        self._kept.add(key)
        self._hand_on(key, payload)  # the workflow may have come to ask for it meanwhile, or died and asked again
        return None

    async def _problem(self, key: UpdateKey, payload: Payload) -> Failure | None:
        def check(frame: Buffer) -> None:
            update = decode_update(frame, max_header_bytes=MAX_HEADER_BYTES)
            expected = TaskId(self.name, key.task.commit, key.task.index, key.site)
            if update.site != key.site or update.task_id != expected:
                raise WireError(f"this is the update of {update.site!r} for {update.task_id}, and not for {expected}", offset=0)

        try:
            if payload.inline is not None:
                check(payload.inline)
            else:
                assert payload.blob is not None
                view = self._blobs.folder.map(payload.blob)
                await asyncio.to_thread(check, view)
        except HanseError as error:
            return Failure.of(error)
        return None

    def _hand_on(self, key: UpdateKey, payload: Payload) -> None:
        """To the workflow, if it waits for this update."""
        out = self._open.get(key.task)
        if out is None or not out.asked or key.site not in out.waiting:
            return
        out.waiting.discard(key.site)
        inline = [] if payload.inline is None else [payload.inline]
        self._send(Arrived(task=key.task, site=key.site, blob=payload.blob), inline)

    # what the workflow does

    def _asked(self, ask: Ask, inline: bytes | None) -> None:
        payload = Payload(inline=inline, blob=ask.blob)
        kept = {site for site in ask.sites if UpdateKey(ask.task, site) in self._kept}
        for task in [task for task, out in self._open.items() if task.commit < ask.task.commit and not out.asked]:
            self._give_up(task)  # asynchronous, and of a process that died: this one goes on from a later commit
        self._close(ask.task)
        self._closed.discard(ask.task)
        out = self._open[ask.task] = _Open(payload, frozenset(ask.sites), set(ask.sites))
        for site in ask.sites:
            if site in kept:
                self._spawn(self._hand_on_kept(UpdateKey(ask.task, site)))
            elif site in self._left:
                self._fail(ask.task, out, site, self._left[site])
            elif not self._sites.send(site, Assignment(job=self.id, task=ask.task, payload=payload)):
                self._await_return(ask.task, out, site)

    async def _hand_on_kept(self, key: UpdateKey) -> None:
        payload = await self._store.update(self.id, key)
        if payload.blob is not None:
            await self._blobs.fetch(payload.blob)
        self._hand_on(key, payload)

    def _give_up(self, task: TaskRef) -> None:
        if (out := self._close(task)) is not None:
            self._closed.add(task)
            for site in out.waiting | out.failed:
                self._sites.send(site, Withdraw(job=self.id, tasks=[task]))

    def _close(self, task: TaskRef) -> _Open | None:
        if (out := self._open.pop(task, None)) is not None:
            _cancel(out.timers)
        return out

    async def _committed(self, commits: int, rounds: int) -> None:
        for task, out in list(self._open.items()):
            if task.commit < commits and not out.asked:  # of a process that died, and not asked for again
                self._close(task)
        earlier = [task for task in self._open if task.commit < commits]  # asynchronous: their updates are still to be taken
        self._kept = {key for key in self._kept if key.task.commit >= commits or key.task in self._open}
        self._closed = {task for task in self._closed if task.commit >= commits}
        self._early.clear()
        for blob in await self._store.drop_updates(self.id, before_commit=commits, but=earlier, commits=commits, rounds=rounds):
            await self._blobs.remove(blob)

    def _await_return(self, task: TaskRef, out: _Open, site: str) -> None:
        failure = Failure("SiteAway", f"the site was not connected for {self._absence_s:g} s", "Is its agent running?")
        if site not in out.timers:
            loop = asyncio.get_running_loop()
            out.timers[site] = loop.call_later(self._absence_s, lambda: self._fail(task, out, site, failure))

    def _fail(self, task: TaskRef, out: _Open, site: str, failure: Failure) -> None:
        if not out.asked:
            return
        out.waiting.discard(site)
        out.failed.add(site)
        self._send(Arrived(task=task, site=site, failure=failure))

    # the workflow's process

    async def _keep_running(self) -> None:
        finished, deaths, commits = None, 0, self.commits
        try:
            self._kept = await self._store.update_keys(self.id)
            while finished is None:
                finished, status = await self._patiently(self._run_once)
                if finished is None:
                    deaths = 1 if self.commits > commits else deaths + 1
                    commits = self.commits
                    finished = self._after_death(status, deaths)
        except (HanseError, OSError) as error:
            logger.exception("job %s cannot go on", self.id)
            finished = Finished(status="failed", reason=f"the server cannot run it: {error}")
        await self._patiently(lambda: asyncio.to_thread(_complete, self.folder, finished))
        shutil.rmtree(self.task_folder, ignore_errors=True)
        for task in list(self._open):
            self._close(task)
        await self._patiently(lambda: self._ended(finished))

    async def _patiently(self, step: Callable[[], Awaitable[T]]) -> T:
        """What `step` gives, done again while the disk is full: a job is not lost by that."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return await step()
            except (HanseError, OSError) as error:
                if not is_full(error):
                    raise
                logger.error("job %s waits: %s", self.id, error)
                self._events.add({"event": "message", "level": "warning", "text": "the server's disk is full: the job waits for room"})
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _tracked(self, level: str, text: str) -> None:
        logger.log(logging.WARNING if level == "warning" else logging.INFO, "job %s: %s", self.id, text)
        if level == "warning":
            self._events.add({"event": "message", "level": level, "text": text})

    def _after_death(self, status: int, deaths: int) -> Finished | None:
        """How the job has ended, if it has, now that its process is gone."""
        if self._stopping:
            return Finished(status="stopped", reason=f"stopped after {self.rounds} rounds")
        killed_by = -status if status < 0 else status - 128  # bubblewrap says it as a shell does
        why = f"was killed by signal {killed_by}" if 0 < killed_by < signal.NSIG else f"ended with status {status}"
        logger.warning("job %s: its process %s, %d times since the last commit", self.id, why, deaths)
        if deaths < TRIES:
            self._events.add({"event": "message", "level": "warning", "text": f"the workflow's process {why}: it goes on in a new one"})
            return None
        last = "\n".join(_last_lines(self.folder / LOG, _LAST_LINES))
        reason = f"the workflow's process {why}, {deaths} times without a commit in between.\n{last}"
        return Finished(status="failed", reason=reason.rstrip())

    async def _run_once(self) -> tuple[Finished | None, int]:
        """Run the process until it says Finished or is gone: what it said, and its exit status. Raises StorageFull if that ended it."""
        loop = asyncio.get_running_loop()
        here, there = MemoryLink.pair()
        descriptor = there.socket.fileno()
        self._over = over = loop.create_future()
        process = None
        self._full = False
        for out in self._open.values():
            out.asked = False
        self._events.begin()
        await asyncio.to_thread(remove_links, self.folder)
        try:
            with (self.folder / LOG).open("ab") as log:
                arguments = ["-P", "-m", "hanse.server.job_process", str(descriptor)]
                folder = self.folder.resolve()
                command = [sys.executable, *arguments] if self._sandbox is None else self._sandbox.command(arguments, work=folder)
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(descriptor,),
                    env={**environment(Path("/tmp")), "PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
            there.close()
            self._link, self.pid = here, process.pid
            self._writable.register(here.socket, select.POLLOUT)
            loop.add_reader(here.socket, self._hear)
            updates = str(self._blobs.folder.folder.resolve())
            self._send(Start(folder=str(folder), updates=updates, tasks=str(folder / TASKS), sites=list(self.roster)))
            if self._stopping:
                self._send(Stop())
            finished = await over
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GONE_WITHIN_S if finished is None else STOP_WITHIN_S):
                    await process.wait()
        finally:
            self._link, self.pid, self._writable = None, None, select.poll()
            self._outbox.clear()
            loop.remove_reader(here.socket)
            loop.remove_writer(here.socket)
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            there.close()
            here.close()
            await asyncio.to_thread(remove_links, self.folder)
        assert process.returncode is not None
        if finished is None and not self._stopping and (self._full or process.returncode == NO_ROOM):
            raise StorageFull("the workflow's process found no room.", hint="Make room on the server's disk.")
        return finished, process.returncode

    def _send(self, message: ToJob, body: Sequence[Buffer] = ()) -> None:
        """To the process, if there is one; a new one will ask for what this one misses."""
        if self._link is not None:
            self._outbox.append((message, body))
            self._flush()

    def _flush(self) -> None:
        """Send what the socket takes: a workflow that computes, or hangs, must not make the server wait."""
        link, loop = self._link, asyncio.get_running_loop()
        if link is None:
            return
        try:
            while self._outbox and self._writable.poll(0):
                message, body = self._outbox.popleft()
                link.send(encode(message), body)
                if body:  # sending may have taken in messages that nobody would look at
                    loop.call_soon(self._hear)
        except LinkBroken:
            self._outbox.clear()  # its end will be noticed
        if self._outbox:
            loop.add_writer(link.socket, self._flush)
        else:
            loop.remove_writer(link.socket)

    def _hear(self) -> None:
        over = self._over
        if self._link is None or over is None:
            return
        try:
            for received in self._link.receive_ready():
                self._take(received)
        except LinkBroken:
            _give(over, None)
        except Exception:  # the job's own code is in that process: whatever comes from there, the server goes on
            logger.exception("job %s: its process sent what is no message", self.id)
            _give(over, None)

    def _take(self, received: Received) -> None:
        inline = None
        if received.body is not None:
            inline = bytes(received.body.buffer)
            received.body.release()
        match decode_from_job(received.message):
            case Ask() as ask:
                if not set(ask.sites) <= set(self.roster):
                    raise WireError("a site is asked that is not in the job", offset=0)
                self._asked(ask, inline)
            case GiveUp(task=task):
                self._give_up(task)
            case Noted(event=event):
                self._events.add(msgspec.json.decode(event, type=dict[str, Any]) if b"NaN" not in event else json.loads(event))
            case Committed(commits=commits, rounds=rounds, events_bytes=events_bytes):
                self.commits, self.rounds = commits, rounds
                self._events.committed(events_bytes)
                self._spawn(self._committed(commits, rounds))
            case Finished() as finished:
                if self._over is not None:
                    _give(self._over, finished)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it meanwhile. Should it fail, the workflow starts again, from what is kept."""
        over = self._over

        def done(task: asyncio.Task[None]) -> None:
            self._background.discard(task)
            if self._log_failure(task) and over is not None:
                self._full = self._full or is_full(task.exception() or Exception())
                _give(over, None)

        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(done)

    def _log_failure(self, task: asyncio.Task[None]) -> bool:
        if task.cancelled() or (error := task.exception()) is None:
            return False
        logger.error("job %s: %s", self.id, error, exc_info=error)
        return True


def _complete(path: Path, finished: Finished) -> None:
    """See to it that the run folder says how the job has ended, where its process could not."""
    if not (path / RUN).is_file():
        return
    folder = RunFolder(path, json.loads((path / RUN).read_text()), listen=lambda event: None, progress=lambda *_: None)
    if folder.facts["status"] == "running":
        folder.resume()
        folder.finish(finished.status, finished.reason)


def _give(future: asyncio.Future[Finished | None], value: Finished | None) -> None:
    if not future.done():
        future.set_result(value)


def _cancel(timers: dict[str, asyncio.TimerHandle]) -> None:
    for timer in timers.values():
        timer.cancel()
    timers.clear()


def _last_lines(path: Path, count: int) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 10_000))
        yield from file.read().decode(errors="replace").splitlines()[-count:]
