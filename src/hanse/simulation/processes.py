"""Workers that are processes of this machine, spoken to over shared memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial

from hanse.client.framework import may_fork
from hanse.errors import LinkBroken
from hanse.simulation.worker import Staff, encode_order, work
from hanse.site.process import preload
from hanse.transport.memory import Buffer, MemoryLink, Received, SharedBody


class WorkerProcess:
    """One of them, as the engine sees it; see `hanse.simulation.engine.WorkerLink`."""

    def __init__(self, pid: int, link: MemoryLink, ended: Callable[[WorkerProcess], None]) -> None:
        self.pid, self.link = pid, link
        self.name = f"worker process {pid}"
        self.send = link.send
        self.send_shared = link.send_shared
        self._ended = ended

    def receive_ready(self) -> list[Received]:
        try:
            return self.link.receive_ready()
        except LinkBroken:
            asyncio.get_running_loop().remove_reader(self.link.socket)  # an end can be read for ever
            raise

    def end(self) -> str:
        """Kill it, if it is not dead already. Returns how it ended."""
        asyncio.get_running_loop().remove_reader(self.link.socket)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.link.close()
        self._ended(self)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


class Processes:
    """Starts them: forked from this process, which takes no time and shares its memory; if they are to compute with several threads, or
    this process has a framework's that do not survive a fork, fresh interpreters. See `hanse.simulation.engine.Crew`."""

    def __init__(self, staff: Staff) -> None:
        self._staff = staff
        self._workers: set[WorkerProcess] = set()
        self._bodies: set[SharedBody] = set()

    async def open(self, workers: int) -> None:
        if self._staff.threads == 1:
            preload(self._staff.code, self._staff.framework)

    async def close(self) -> None:
        """Whoever leaves has ended its workers."""

    def share(self, parts: Iterable[Buffer]) -> SharedBody:
        body = SharedBody(parts)
        self._bodies.add(body)
        return body

    def drop(self, body: SharedBody) -> None:
        self._bodies.discard(body)
        body.close()

    def start(self, hear: Callable[[], None]) -> WorkerProcess:
        here, there = MemoryLink.pair()
        sys.stdout.flush()
        sys.stderr.flush()
        if self._staff.threads > 1 or not may_fork():
            there.socket.set_inheritable(True)
            command = [sys.executable, "-m", "hanse.simulation.worker", str(there.socket.fileno())]
            pid = os.posix_spawn(sys.executable, command, os.environ)
            here.send(encode_order(self._staff.hello()))
        elif (pid := os.fork()) == 0:
            work(there, partial(self._leave_to_worker, here), 1)
        there.close()
        asyncio.get_running_loop().add_reader(here.socket, hear)
        worker = WorkerProcess(pid, here, self._workers.discard)
        self._workers.add(worker)
        return worker

    def _leave_to_worker(self, here: MemoryLink) -> Staff:
        """In the forked process: let go of what is the engine's, so that it is gone when the engine lets go of it."""
        asyncio._set_running_loop(None)
        for link in (here, *(worker.link for worker in self._workers)):
            link.close()
        for body in self._bodies:
            body.close()
        return self._staff
