"""One job at one site: its tasks one after another, each through the policy and the training process to an update that may leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from blake3 import blake3

from hanse.errors import Failure, HanseError, LinkBroken, PolicyRefused, Refused, StorageFull, WireError
from hanse.identity.kit import Kit
from hanse.jobs.archive import Manifest, unpack
from hanse.jobs.bundle import MODEL
from hanse.messages.codec import Buffer, decode_task, decode_update, encode_update
from hanse.messages.task import TRAIN, Task, TaskId
from hanse.messages.update import Update
from hanse.messages.wire import Blob, Delivery, FromSite, Left, Offer, Output, Payload, TaskRef
from hanse.sandbox import Sandbox
from hanse.site import launcher
from hanse.site.disclosure import check_task, told
from hanse.site.kept import Counted, Kept
from hanse.site.launcher import Trainer
from hanse.site.ledger import Ledger
from hanse.site.orders import Begin, Unfit
from hanse.site.outgoing import Outgoing
from hanse.site.policy import Meter, Policy, check_update
from hanse.site.training import Died, Done, Training
from hanse.transport.blobs import FolderBlobs, open_file

TRIES = 3
"""So many times a task is run whose training process dies."""

COMPLETED = "completed"
"""The status of a job that ended well."""

CLOSE_WITHIN_S = 10.0
MAX_LOG_BYTES = 64 << 20
MAX_UPDATE_HEADER_BYTES = 32 << 20
_LINES_A_MESSAGE = 1_000
_LISTED_TENSORS = 10_000
_FOR_THE_WHOLE_JOB = ("caps.rounds", "caps.upload_bytes", "caps.download_bytes", "caps.cpu_seconds")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Transfers(Protocol):
    """What a job needs of the connection: `hanse.transport.client.Client`, or what stands for it where there is none."""

    async def download(self, blob: Blob, blobs: FolderBlobs) -> Path:
        """Fetch a blob into a folder, verified."""

    async def upload(self, blob: Blob, read: Callable[[int, int], Buffer]) -> None:
        """Send a blob; `read` gives the bytes at (offset, size)."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """What an agent's jobs share. sandbox: None if training code runs without one. post: sends a message, if the server can be reached.

    client: the connection, as soon as there is one. open: returns when a task may begin.
    """

    kit: Kit
    state: Path
    policy: Policy
    ledger: Ledger
    sandbox: Sandbox | None
    post: Callable[[FromSite], None]
    client: Callable[[], Awaitable[Transfers]]
    open: Callable[[], Awaitable[None]]


class HeldJob:
    """A job that the site has taken. `assign`, `received` and `withdraw` return at once; what they start runs in `group`."""

    def __init__(self, site: Site, offer: Offer, manifest: Manifest, kept: Kept, group: asyncio.TaskGroup) -> None:
        self.offer, self.manifest = offer, manifest
        self.left: Failure | None = None
        self._site, self._kept, self._group = site, kept, group
        self._training = Training(self._start_trainer, self._heard)
        self._counted = kept.counted()
        self._meter = Meter(site.policy.caps, self._counted.spent)
        self._pending: dict[TaskRef, Payload] = {}
        self._doing: tuple[TaskRef, asyncio.Task[None]] | None = None
        self._again: Payload | None = None  # what it is at was assigned once more
        self._finished: dict[TaskRef, Outgoing] = {}
        self._sending: dict[TaskRef, asyncio.Task[None]] = {}
        self._to_keep: dict[TaskRef, bytes | None] = {}
        self._keeping: asyncio.Task[None] | None = None
        self._commit = 0
        self._listed = b""

    @property
    def id(self) -> str:
        return self.offer.job

    @property
    def trainer_pid(self) -> int | None:
        """Of the job's training process, or of its sandbox; None if there is none."""
        return self._training.pid

    # what the server says

    def offered_again(self, offer: Offer) -> None:
        """The same job, for a place among its sites that may be another one: it is settled only when the job starts."""
        if offer != self.offer:
            self._kept.save_offer(offer)
            self.offer = offer
            if self._doing is None:
                self._training.stop()  # it was told the old place

    def assign(self, ref: TaskRef, payload: Payload) -> None:
        """Do the task; once, however often it is assigned. A finished one's update is sent again."""
        if self._doing is not None and self._doing[0] == ref:
            self._again = payload
            return
        if ref in self._pending or ref in self._sending:
            return
        if ref not in self._finished and (frame := self._kept.update(ref)) is not None:
            self._finished[ref] = Outgoing([frame])
        if ref in self._finished:
            self._deliver(ref, again=True)
            return
        self._pending[ref] = payload
        self._next()

    def received(self, ref: TaskRef, problem: Failure | None) -> None:
        """The server has the update, or has thrown it away: either way it need not be kept here."""
        if problem is not None:
            logger.warning("job %s, task %s: the server rejected the update: %s", self.id, _text(ref), problem)
            self._note("update rejected", ref, why=str(problem))
        self._forget(ref)

    def withdraw(self, refs: list[TaskRef]) -> None:
        """Forget these tasks. One that runs is stopped, and with it the training process: a script then begins anew."""
        for ref in refs:
            self._pending.pop(ref, None)
            if self._doing is not None and self._doing[0] == ref:
                self._doing[1].cancel()
            self._forget(ref)

    async def end(self, status: str) -> None:
        """The job is over: let its script end if all went well, stop whatever runs, and delete the job's folder."""
        idle = self._doing is None
        self._stop_tasks()
        try:
            if status == COMPLETED and idle and (problem := await self._training.close(CLOSE_WITHIN_S)):
                logger.warning("job %s, after its end: %s", self.id, problem)
        finally:
            self.stop()
        self._kept.remove()

    async def written(self) -> None:
        """Wait until all that a new agent would need is on disk."""
        while self._keeping is not None and not self._keeping.done():
            await asyncio.wait([self._keeping])

    def stop(self) -> None:
        """Stop whatever runs; what is on disk stays."""
        self._stop_tasks()
        self._training.stop()

    # one task after another

    def _next(self) -> None:
        if self._doing is None and self._pending:
            ref = next(iter(self._pending))
            self._again = None
            self._doing = ref, self._group.create_task(self._do(ref, self._pending.pop(ref)))

    async def _do(self, ref: TaskRef, payload: Payload) -> None:
        try:
            await self._patiently(self._site.open)
            self._finished[ref] = outgoing = await self._patiently(lambda: self._outgoing(ref, payload))
            self._deliver(ref)
            self._keep(ref, outgoing)
        except _NotGiven as error:
            logger.info("job %s, task %s: %s", self.id, _text(ref), error)
            if self._again is not None:
                self._pending[ref] = self._again
        finally:
            self._doing = None
            if payload.blob is not None:
                FolderBlobs(self._kept.blobs).remove(payload.blob)
            self._next()

    async def _patiently(self, step: Callable[[], Awaitable[T]]) -> T:
        """What `step` gives, done again while there is no room on the disk: a task is not lost by that."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return await step()
            except StorageFull as error:
                logger.error("job %s waits: %s", self.id, error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def _outgoing(self, ref: TaskRef, payload: Payload) -> Outgoing:
        """The update as it leaves, noted in the audit log, and the state that the site keeps saved. Raises StorageFull."""
        names: list[str] = []
        try:
            if self.left is not None:
                outgoing = self._failed(ref, self.left)
            else:
                update, outgoing = await self._update(ref, payload)
                names = _names(update)
        except (StorageFull, _NotGiven):
            raise
        except PolicyRefused as error:
            logger.warning("job %s, task %s: %s", self.id, _text(ref), error)
            outgoing = self._failed(ref, Failure.of(error))
            if error.clause in _FOR_THE_WHOLE_JOB:
                self._leave(Failure.of(error))
        except (HanseError, OSError) as error:
            logger.warning("job %s, task %s: %s", self.id, _text(ref), error)
            outgoing = self._failed(ref, Failure.of(error))
        except Exception as error:  # one of our own: the job must not wait for an answer that never comes
            logger.exception("job %s, task %s", self.id, _text(ref))
            outgoing = self._failed(ref, Failure.of(error))
        blob = await asyncio.to_thread(outgoing.hash) if outgoing.blob is None else outgoing.blob
        listed = blake3("\n".join(names).encode()).digest()
        new = {} if listed == self._listed else {"names": names[:_LISTED_TENSORS]}
        self._note("update", ref, bytes=blob.size, digest=blob.hex, tensors=len(names), **new)
        self._listed = listed
        return outgoing

    def _keep(self, ref: TaskRef, outgoing: Outgoing) -> None:
        """Have written down what a new agent would need, while the update is on its way and the next task runs: this agent needs none of
        it. What was acknowledged or counted anew before its turn came is left out."""
        self._counted = msgspec.structs.replace(self._counted, spent=self._meter.spent)
        self._to_keep[ref] = outgoing.inline
        if self._keeping is None or self._keeping.done():
            self._keeping = self._group.create_task(self._keep_all())

    async def _keep_all(self) -> None:
        while self._to_keep:
            ref = next(iter(self._to_keep))
            frame, counted = self._to_keep.pop(ref), self._counted
            if ref not in self._finished and self._to_keep:
                continue
            try:
                await asyncio.to_thread(self._write_down, ref, frame, counted)
            except StorageFull as error:
                logger.error("job %s, task %s is not kept on disk: %s", self.id, _text(ref), error)
            if ref not in self._finished:  # the server was faster
                self._kept.forget_update(ref)

    def _write_down(self, ref: TaskRef, frame: bytes | None, counted: Counted) -> None:
        self._kept.save_counted(counted)
        if frame is not None and ref in self._finished:
            self._kept.save_update(ref, frame)

    async def _update(self, ref: TaskRef, payload: Payload) -> tuple[Update, Outgoing]:
        if ref.commit > self._commit:
            self._commit = ref.commit
            self._kept.forget_before(ref.commit)
            for old in [old for old in self._finished if old.commit < ref.commit]:
                self._forget(old)
        blob = payload.blob or Blob(blake3(payload.inline or b"").digest(), len(payload.inline or b""))
        self._note("task", ref, bytes=blob.size, digest=blob.hex)
        is_new = self._counted.newest is None or ref > self._counted.newest
        if is_new:
            self._meter.charge(download_bytes=blob.size)
        await self._unpack()
        rules = self._site.policy.statistics
        with await self._frame(payload) as (frame, task):
            if rules is not None:
                check_task(rules.rules(), self.manifest.workflow, task)
            if is_new:
                self._count_task(ref, task)
            done = await self._train(ref, frame)
            if isinstance(done, Failure):
                failed = Update(self._site.kit.name, self._task_id(ref), failure=done)
                return failed, Outgoing(encode_update(failed))
            try:
                update, outgoing = self._checked(ref, task, done)
            except BaseException:
                done.body.release()
                raise
        try:
            self._meter.charge(upload_bytes=outgoing.size)
            if done.said.state is not None:
                self._kept.save_state(ref, done.said.state)
        except BaseException:
            outgoing.close()
            raise
        return update, outgoing

    async def _unpack(self) -> None:
        """Fetch the job's files, if they are not here, and unpack those that the manifest names."""
        if self._kept.job.is_dir():
            return
        blobs = FolderBlobs(self._kept.blobs)
        archive = await self._download(self.offer.archive, blobs)
        await asyncio.to_thread(unpack, archive, self.manifest, self._kept.job, may_lack={MODEL})
        blobs.remove(self.offer.archive)
        self._site.ledger.append("code", job=self.id, digest=self.offer.archive.hex, files=len(self.manifest.digests))

    async def _frame(self, payload: Payload) -> contextlib.AbstractContextManager[tuple[bytes | int, Task]]:
        """The task's frame, fetched if it is large: its bytes, or a descriptor of its file; and what it says."""
        if payload.inline is not None:
            return contextlib.nullcontext((payload.inline, decode_task(payload.inline)))
        assert payload.blob is not None
        return _opened(await self._download(payload.blob, FolderBlobs(self._kept.blobs)))

    async def _download(self, blob: Blob, blobs: FolderBlobs) -> Path:
        while True:
            client = await self._site.client()
            try:
                return await client.download(blob, blobs)
            except LinkBroken as error:
                logger.warning("job %s: %s It is tried again.", self.id, error)
                await asyncio.sleep(_FIRST_WAIT_S)
            except Refused as error:
                raise _NotGiven(error.message, hint=error.hint) from error

    async def _train(self, ref: TaskRef, frame: bytes | int) -> Done | Failure:
        """The training process's answer, or why there is none. Raises PolicyRefused where it takes too much."""
        state, within_s = self._kept.state_before(ref), self._site.policy.caps.wall_seconds_per_task
        died: Died | None = None
        for _ in range(TRIES):
            self._note("training", ref)
            try:
                async with asyncio.timeout(within_s):
                    answer = await self._training.perform(ref, frame, state)
            except TimeoutError as error:
                raise PolicyRefused(
                    f"the task took longer than the {within_s:g} s of wall time that this site gives it",
                    clause="caps.wall_seconds_per_task",
                ) from error
            finally:
                cpu_s = self._training.take_cpu_s()
                self._note("trained", ref, cpu_seconds=round(cpu_s, 3))
            if isinstance(answer, Died) and answer.ended.signal == signal.SIGXCPU:
                cpu_s = max(cpu_s, (self._cpu_left_s() or 0.0) + 0.001)  # it has used what was left, and was ended for it
            self._meter.charge(cpu_seconds=cpu_s)
            if isinstance(answer, Done):
                return answer
            if isinstance(answer, Unfit):
                logger.warning("job %s: its code cannot be run: %s\n%s", self.id, answer.failure, answer.traceback)
                return answer.failure if self._site.policy.logs else _UNFIT
            died = answer
            words = f" It wrote:\n{died.last_words}" if died.last_words else ""
            logger.warning("job %s, task %s: the training process %s. %s%s", self.id, _text(ref), died.ended, died.why, words)
        assert died is not None
        hint = "Look for what ends the process: memory, a crash in native code, os._exit; the agent's log has its last words."
        return Failure("TrainerDied", f"the training process {died.ended}, {TRIES} times, while it did this task.", hint)

    def _checked(self, ref: TaskRef, task: Task, done: Done) -> tuple[Update, Outgoing]:
        """The update as it may leave. Raises PolicyRefused, and WireError for what is no update of this task."""
        update = decode_update(done.body.buffer, max_header_bytes=MAX_UPDATE_HEADER_BYTES)
        if (update.site, update.task_id) != (self._site.kit.name, self._task_id(ref)):
            raise WireError(f"the training process sent an update of {update.task_id}", offset=0)
        if update.failure is not None:
            traceback = next((str(record.value) for record in update.records if record.key == "traceback"), "")
            logger.warning("job %s, task %s failed: %s\n%s", self.id, _text(ref), update.failure, traceback)
        checked = check_update(self._site.policy, update, task=task)
        mapping = done.body.buffer.obj
        return checked, Outgoing(encode_update(checked), mapping if isinstance(mapping, mmap.mmap) else None, done.body.release)

    def _failed(self, ref: TaskRef, failure: Failure) -> Outgoing:
        return Outgoing(encode_update(Update(self._site.kit.name, self._task_id(ref), failure=failure)))

    def _leave(self, why: Failure) -> None:
        logger.warning("job %s: this site leaves it: %s", self.id, why)
        self.left = why
        self._training.stop()
        self._site.ledger.append("left", job=self.id, why=str(why))
        self._site.post(Left(job=self.id, why=why))

    # what leaves

    def _deliver(self, ref: TaskRef, *, again: bool = False) -> None:
        outgoing = self._finished[ref]
        if outgoing.inline is not None:
            if again:
                self._note("sent again", ref)
            self._site.post(Delivery(job=self.id, task=ref, payload=outgoing.payload))
        elif ref not in self._sending:
            self._sending[ref] = self._group.create_task(self._upload(ref, outgoing))

    async def _upload(self, ref: TaskRef, outgoing: Outgoing) -> None:
        """Send a large update and say so; again and again, while the server has no room or cannot be reached."""
        wait_s = _FIRST_WAIT_S
        try:
            while True:
                try:
                    client = await self._site.client()
                    await client.upload(outgoing.hash(), outgoing.read)
                    break
                except (StorageFull, LinkBroken) as error:
                    logger.warning("job %s, task %s: the update could not be sent: %s It is tried again.", self.id, _text(ref), error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            self._site.post(Delivery(job=self.id, task=ref, payload=outgoing.payload))
        except HanseError as error:  # the server assigns the task again, on the next connection, if it wants the update after all
            logger.error("job %s, task %s: the server does not take the update: %s", self.id, _text(ref), error)
        finally:
            self._sending.pop(ref, None)

    def _forget(self, ref: TaskRef) -> None:
        if (sending := self._sending.pop(ref, None)) is not None:
            sending.cancel()
        if (outgoing := self._finished.pop(ref, None)) is not None:
            outgoing.close()
        self._kept.forget_update(ref)

    def _stop_tasks(self) -> None:
        self._pending.clear()
        self._to_keep.clear()
        for task in (*self._sending.values(), *([self._doing[1]] if self._doing else [])):
            task.cancel()
        for outgoing in self._finished.values():
            outgoing.close()
        self._finished.clear()

    # the training process

    def _start_trainer(self) -> Trainer:
        resources, caps, kit = self.manifest.resources, self._site.policy.caps, self._site.kit
        signed, rules = self.manifest.site_config.get(kit.name, {}), self._site.policy.statistics
        begin = Begin(
            folder=str(self._kept.job),
            site=kit.name,
            rank=self.offer.rank,
            sites=self.offer.sites,
            config={**signed, **kit.config, **(told(rules.rules()) if rules is not None else {})},
            threads=max(1, int(resources.cores)),
            cpu_s=self._cpu_left_s(),
            memory_bytes=caps.memory_bytes,
        )
        return launcher.start(begin, self._kept.work, sandbox=self._site.sandbox, python=kit.python or sys.executable)

    def _cpu_left_s(self) -> float | None:
        cap = self._site.policy.caps.cpu_seconds
        return None if cap is None else max(0.0, cap - self._meter.spent.cpu_seconds)

    def _heard(self, lines: list[str]) -> None:
        """Lines that the job's code printed: to a file, and to the submitter if the policy lets them."""
        path = self._site.state / "logs" / f"{self.id}.log"
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8", errors="replace") as file:
                if file.tell() < MAX_LOG_BYTES:
                    file.writelines(line + "\n" for line in lines)
        except OSError as error:
            logger.error("job %s: what it printed is lost: %s", self.id, error)
        if self._site.policy.logs:
            for begin in range(0, len(lines), _LINES_A_MESSAGE):
                self._site.post(Output(job=self.id, lines=lines[begin : begin + _LINES_A_MESSAGE]))

    # what is counted and written down

    def _count_task(self, ref: TaskRef, task: Task) -> None:
        """A round is a commit, or a training task if there are more of those. Raises PolicyRefused."""
        before = self._counted
        commits = before.commits + (before.newest is None or ref.commit > before.newest.commit)
        trained = before.trained + (task.name == TRAIN)
        if (rounds := max(commits, trained) - self._meter.spent.rounds) > 0:
            self._meter.charge(rounds=rounds)
        self._counted = Counted(trained=trained, commits=commits, newest=ref, spent=self._meter.spent)

    def _task_id(self, ref: TaskRef) -> TaskId:
        return TaskId(self.manifest.name, ref.commit, ref.index, self._site.kit.name)

    def _note(self, kind: str, ref: TaskRef, **facts: Any) -> None:
        self._site.ledger.append(kind, job=self.id, commit=ref.commit, index=ref.index, **facts)


class _NotGiven(Refused):
    """The server does not give out a task now: nobody waits for it, or a server that was started again will assign it once more."""


_UNFIT = Failure("SiteFailed", "the job's code cannot be run at this site, and its policy keeps the words of errors there [logs]")


def _names(update: Update) -> list[str]:
    """The names of what leaves, at the top level of the parameters."""
    params = update.model.params
    return [str(name) for name in params] if isinstance(params, Mapping) else [] if params is None else ["params"]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[bytes | int, Task]]:
    """A descriptor of a task's file, and the task, whose arrays are mapped from it."""
    descriptor = open_file(path)
    try:
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        yield descriptor, decode_task(mapping)
    finally:
        os.close(descriptor)


def _text(ref: TaskRef) -> str:
    return f"{ref.commit}/{ref.index}"
