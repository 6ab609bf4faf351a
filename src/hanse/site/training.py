"""One job's training process as the agent sees it: started when there is a task, asked one task at a time, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from hanse.errors import Failure, LinkBroken, WireError
from hanse.messages.wire import TaskRef
from hanse.site import orders
from hanse.site.launcher import Ended, Trainer
from hanse.site.orders import Close, Closed, Lines, Perform, Performed, Restore, Unfit
from hanse.transport.memory import Body, MemoryLink, Received, SharedBody

_EXIT_WITHIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Done:
    """A task is done: the update's frame, valid until it is released, and what the trainer says besides."""

    said: Performed
    body: Body


@dataclass(frozen=True, slots=True)
class Died:
    """The trainer is gone. last_words: what it wrote last outside of Python."""

    ended: Ended
    why: str
    last_words: str


class Training:
    """The training process of one job.

    start: makes a new one. heard: takes the lines that the job's code prints, as they come.
    """

    def __init__(self, start: Callable[[], Trainer], heard: Callable[[list[str]], None]) -> None:
        self._start = start
        self._heard = heard
        self._trainer: Trainer | None = None
        self._exit: int | None = None
        self._state: bytes | None = None  # what the trainer keeps for the site, as far as it was told
        self._closing: asyncio.TimerHandle | None = None
        self._reported_cpu_s = 0.0
        self._cpu_s = 0.0
        self._asked: TaskRef | None = None
        self._answer: asyncio.Future[Done | Unfit | Died | Closed] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, or of its sandbox; None if there is none."""
        return None if self._trainer is None else self._trainer.process.pid

    async def perform(self, ref: TaskRef, frame: bytes | int, state: bytes | None) -> Done | Unfit | Died:
        """Have the task done. Cancelling this ends the process.

        frame: the task's, or a descriptor of a file that holds it, which this does not close. state: what the site keeps, a frame.
        """
        if self._trainer is None:
            self._begin()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self._answer, self._asked = loop.create_future(), ref
        try:
            self._tell(ref, frame, state)
            answer = await self._answer
        except asyncio.CancelledError:
            self.stop()
            self._cpu_s = max(self._cpu_s, loop.time() - began_s)  # of what was killed in a sandbox, the kernel does not tell
            raise
        finally:
            self._answer = self._asked = None
        assert not isinstance(answer, Closed)
        if isinstance(answer, Unfit):
            self.stop()
        return answer

    async def close(self, within_s: float) -> Failure | None:
        """Let the script run to its end, if there is one that waits; then the process ends. Returns what went wrong in that."""
        if self._trainer is None:
            return None
        self._answer = asyncio.get_running_loop().create_future()
        problem: Failure | None = Failure("SiteFailed", f"the script did not end within {within_s:g} s after the job's end.")
        with contextlib.suppress(TimeoutError, LinkBroken):
            self._trainer.link.send(orders.encode(Close()))
            async with asyncio.timeout(within_s):
                answer = await self._answer
            problem = answer.problem if isinstance(answer, Closed) else Failure("SiteFailed", "the training process died at its end.")
        self._answer = None
        self.stop()
        return problem

    def stop(self) -> Ended | None:
        """End the process, if there is one. Returns how it ended."""
        if self._trainer is None:
            return None
        trainer, self._trainer = self._trainer, None
        loop = asyncio.get_running_loop()
        loop.remove_reader(trainer.link.socket)
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        if self._exit is not None:
            loop.remove_reader(self._exit)
            os.close(self._exit)
            self._exit = None
        ended = trainer.end()
        self._count(ended.cpu_s)
        return ended

    def take_cpu_s(self) -> float:
        """The CPU seconds that the job's processes took since this was called the last time."""
        spent_s, self._cpu_s = self._cpu_s, 0.0
        return spent_s

    def _count(self, process_cpu_s: float) -> None:
        self._cpu_s += max(0.0, process_cpu_s - self._reported_cpu_s)
        self._reported_cpu_s = max(process_cpu_s, self._reported_cpu_s)

    def _begin(self) -> None:
        self._trainer = self._start()
        self._state, self._reported_cpu_s = None, 0.0
        loop = asyncio.get_running_loop()
        loop.add_reader(self._trainer.link.socket, self._hear)
        if hasattr(os, "pidfd_open"):  # its children may keep the link open when it is gone
            self._exit = os.pidfd_open(self._trainer.process.pid)
            loop.add_reader(self._exit, self._has_ended)

    def _tell(self, ref: TaskRef, frame: bytes | int, state: bytes | None) -> None:
        assert self._trainer is not None
        link = self._trainer.link
        with contextlib.suppress(LinkBroken):  # it has died: its end is noticed at once
            if state != self._state:
                link.send(orders.encode(Restore()), [state or b""])
                self._state = state
            order = orders.encode(Perform(task=ref))
            if isinstance(frame, int):
                link.send_shared(order, SharedBody.of(frame))
            else:
                link.send(order, [frame])

    def _hear(self) -> None:
        assert self._trainer is not None
        try:
            self._take_all(self._trainer.link)
        except WireError as error:
            self._died(str(error))
        except LinkBroken as error:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._trainer.link.socket)
            within_s = 0.0 if self._exit is None else _EXIT_WITHIN_S  # its end says more than that of the link
            self._closing = loop.call_later(within_s, self._died, str(error))

    def _take_all(self, link: MemoryLink) -> None:
        lines: list[str] = []
        try:
            for received in link.receive_ready():
                self._take(received, lines)
        finally:
            if lines:
                self._heard(lines)

    def _take(self, received: Received, lines: list[str]) -> None:
        if received.shared is not None:
            os.close(received.shared[0])
            raise WireError("the training process sent a descriptor that nobody asked for", offset=0)
        message = orders.decode_answer(received.message)
        if isinstance(message, Lines):
            lines.extend(message.lines)
            return
        if self._answer is None or self._answer.done():
            raise WireError(f"the training process sent a {type(message).__name__} that nobody asked for", offset=0)
        if isinstance(message, Performed):
            if message.task != self._asked or received.body is None:
                raise WireError("the training process answered another task, or without an update", offset=0)
            self._state = message.state
            self._count(message.cpu_s)
            self._answer.set_result(Done(message, received.body))
        else:
            self._answer.set_result(message)

    def _has_ended(self) -> None:
        """The process is gone; what it said before still counts."""
        why = ""
        with contextlib.suppress(LinkBroken, WireError):
            assert self._trainer is not None
            self._take_all(self._trainer.link)
        if self._trainer is not None:
            self._died(why)

    def _died(self, why: str) -> None:
        trainer = self._trainer
        assert trainer is not None
        ended = self.stop()
        assert ended is not None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Died(ended, why, trainer.last_words()))
