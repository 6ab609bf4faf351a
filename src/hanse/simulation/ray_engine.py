"""Workers that are actors on a Ray cluster: the same engine, messages and sites as with processes of this machine.

A task is put into the cluster's object store once, and read there by all workers of a node; answers come back the same way. What Ray itself
pickles between its processes are bytes, arrays of bytes, text and numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hanse.errors import ConfigError, LinkBroken, NotInstalled
from hanse.jobs.bundle import MODEL
from hanse.simulation.worker import Frame, Staff, Worker, decode_hello, encode_order, log_to
from hanse.site.process import settle_in
from hanse.transport.memory import Body, Buffer, Received

try:
    import ray
    from ray.exceptions import RayError
    from ray.util import get_node_ip_address
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise NotInstalled("engine='ray' needs the package ray.", hint="Install it with: pip install 'hanse[ray]'") from error

REACH_WITHIN_S = 5.0
START_WITHIN_S = 120.0
"""All workers are there within this time, or the job does not start."""
LEAVE_WITHIN_S = 5.0
_LOCK = ".lock"

Bytes: TypeAlias = npt.NDArray[np.uint8]


@contextlib.contextmanager
def connected(address: str | None, *, cpus: int | None = None) -> Iterator[int]:
    """Be connected to the cluster at `address`, or to one of its own on this machine, which has so many `cpus` and ends with it.

    address: "host:port" of the cluster's head, or "auto" for the one this machine is part of. A program that is connected to a cluster
        already stays so, and uses that.
    Gives the cluster's number of CPUs. Raises LinkBroken if it cannot be reached, and ConfigError for addresses of Ray's client.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # sites see this machine's GPUs, as they do without Ray
    joined = ray.is_initialized()
    try:
        if not joined:
            _connect(address, cpus)
        yield int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
    finally:
        if not joined:
            ray.shutdown()


def _connect(address: str | None, cpus: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    before = signal.getsignal(signal.SIGTERM)
    if address is not None:
        _check_reachable(address)
    try:
        if address is None:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        what = "a Ray cluster on this machine cannot be started" if address is None else f"the Ray cluster at {address!r} cannot be joined"
        raise LinkBroken(f"{what}: {_short(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's would end the program before the run folder says so


def _check_reachable(address: str) -> None:
    """Raises LinkBroken at once, where Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ConfigError(f"address is {address!r}: give the head of a Ray cluster as 'host:port', or 'auto' on one of its nodes")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_WITHIN_S).close()
    except OSError as error:
        hint = "Is `ray start --head` running there?"
        raise LinkBroken(f"no Ray cluster answers at {address}: {error.strerror or error}.", hint=hint) from error


class RayWorkers:
    """Starts them. See `hanse.simulation.engine.Crew`.

    Each takes as many CPUs as it has threads, so that they spread over the cluster. One that takes the place of another takes none, since
    it must find room although nodes are gone, and goes where fewest were lost: Ray takes a while to notice that a node is gone.
    """

    def __init__(self, staff: Staff) -> None:
        self._staff = staff
        self._log = log_to(Path(staff.logs))
        self._files: Any = None
        self._hired = 0
        self._spare: deque[RayWorker] = deque()
        self._workers: list[RayWorker] = []

    async def open(self, workers: int) -> None:
        self._files = ray.put(_files(Path(self._staff.job)))
        self._spare.extend(self._hire(self._staff.threads) for _ in range(workers))
        ready = [asyncio.ensure_future(worker.ready()) for worker in self._spare]
        try:
            _, late = await asyncio.wait(ready, timeout=START_WITHIN_S, return_when=asyncio.FIRST_EXCEPTION)
            for done in ready:
                if done.done():
                    done.result()
            if late:
                raise LinkBroken(
                    f"within {START_WITHIN_S:g} s the Ray cluster has given room to {workers - len(late)} of {workers} workers.",
                    hint="Somebody else may use its CPUs: ask for fewer workers, or see `ray status`.",
                )
        except BaseException:
            for start in ready:
                start.cancel()
            await asyncio.wait(ready)
            await self.close()
            raise

    async def close(self) -> None:
        for worker in self._spare:
            worker.end()
        self._spare.clear()
        leaving = [asyncio.ensure_future(worker.gone()) for worker in self._workers]
        if leaving:
            await asyncio.wait(leaving)
        self._workers.clear()

    def start(self, hear: Callable[[], None]) -> RayWorker:
        worker = self._spare.popleft() if self._spare else self._hire(0, self._refuge())
        worker.hear = hear
        return worker

    def share(self, parts: Iterable[Buffer]) -> Any:
        return ray.put(_joined(parts))

    def drop(self, body: Any) -> None:
        """Ray drops what nobody refers to any more."""

    def _refuge(self) -> str | None:
        """The node for one more worker; None if Ray knows of none."""
        lost = Counter(worker.node for worker in self._workers if worker.lost)
        busy = Counter(worker.node for worker in self._workers if not worker.ended)
        cpus = {node["NodeID"]: node["Resources"].get("CPU", 0) for node in _nodes() if node["Alive"]}
        return min((node for node in cpus if cpus[node]), key=lambda node: (lost[node], busy[node] / cpus[node]), default=None)

    def _hire(self, cpus: int, node: str | None = None) -> RayWorker:
        self._hired += 1
        where = "SPREAD" if node is None else NodeAffinitySchedulingStrategy(node, soft=True)
        hello = encode_order(self._staff.hello())
        # one byte: an actor that asks for nothing is placed by way of a random node, which may be the one that is gone
        actor = ray.remote(_Actor).options(num_cpus=cpus, memory=1, scheduling_strategy=where).remote(hello, self._files, _version())
        worker = RayWorker(actor, f"Ray worker {self._hired}", node, self._log)
        self._workers.append(worker)
        return worker


class RayWorker:
    """One of them, as the engine sees it; see `hanse.simulation.engine.WorkerLink`."""

    def __init__(self, actor: Any, name: str, node: str | None, log: Callable[[str, str], None]) -> None:
        self.name, self.pid = name, 0
        self.node, self.lost, self.ended = node, False, False
        self.hear: Callable[[], None] | None = None
        self._actor, self._log = actor, log
        self._loop = asyncio.get_running_loop()
        self._answers: deque[Future[Any]] = deque()
        self._how = "was stopped"
        self._leaving: Future[Any] | None = None

    async def ready(self) -> None:
        """Wait until it is there. Raises LinkBroken if it cannot be, with what its node says."""
        try:
            address, self.node, self.pid = await asyncio.wrap_future(self._actor.where.remote().future())
        except RayError as error:
            raise LinkBroken(f"{self.name} cannot start: {_short(error)}") from error
        self.name += f" on {address}"

    def send(self, message: bytes) -> None:
        self.send_shared(message, None)

    def send_shared(self, message: bytes, body: Any) -> None:
        try:
            answer = self._actor.take.remote(message, body).future()
        except RayError as error:
            raise LinkBroken(f"{self.name} is gone") from error
        self._answers.append(answer)
        answer.add_done_callback(self._came)

    def receive_ready(self) -> list[Received]:
        received: list[Received] = []
        while self._answers and self._answers[0].done():
            if (error := self._answers[0].exception()) is not None:
                if received:
                    self._loop.call_soon(self._hear)
                    break
                self.lost, self._how = True, f"was lost: {_short(error)}"
                raise LinkBroken(f"{self.name} {self._how}") from error
            if (answer := self._answers.popleft().result()) is not None:
                message, body, lines = answer
                for site, line in lines:
                    self._log(site, line)
                received.append(Received(message, None if body is None else Body(memoryview(body), _nothing)))
        return received

    def end(self) -> str:
        self.hear, self.ended = None, True
        idle = all(answer.done() and answer.exception() is None for answer in self._answers)
        if idle and self._leaving is None:
            with contextlib.suppress(RayError):
                self._leaving = self._actor.leave.remote().future()
        else:
            self._kill()
        return self._how

    async def gone(self) -> None:
        """Wait for one that was idle when it was ended, so that it leaves nothing behind on its node."""
        if self._leaving is not None:
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(self._leaving), LEAVE_WITHIN_S)
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self._actor, no_restart=True)

    def _came(self, _: Future[Any]) -> None:
        """In a thread of Ray's."""
        with contextlib.suppress(RuntimeError):  # the loop may have been closed
            self._loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        if self.hear is not None:
            self.hear()


class _Actor:
    """A worker at its node."""

    def __init__(self, hello: bytes, files: Mapping[str, bytes], version: str) -> None:
        if version != _version():
            raise ConfigError(f"this node has Hanse {_version()}, and the program that runs the job has {version}: install the same")
        self._folder, self._lock = own_folder()
        try:
            for name, content in files.items():
                path = self._folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._lines: list[tuple[str, str]] = []
            staff = decode_hello(hello).staff(self._folder)
            settle_in(staff.threads)
            self._worker = Worker(staff, lambda site, line: self._lines.append((site, line)))
        except BaseException:
            self.leave()
            raise

    def where(self) -> tuple[str, str, int]:
        """The node's address and Ray's name for it, and the process id."""
        return str(get_node_ip_address()), ray.get_runtime_context().get_node_id(), os.getpid()  # type: ignore[no-untyped-call]

    def take(self, message: bytes, task: Bytes | None) -> tuple[bytes, Bytes | None, list[tuple[str, str]]] | None:
        frame = None if task is None else Frame(task.data, partial(_copy, task), _nothing)
        answer = self._worker.take(message, frame)
        if answer is None:
            return None
        lines, self._lines[:] = list(self._lines), []
        return answer.message, _joined(answer.body) if answer.body else None, lines

    def leave(self) -> None:
        """Leave nothing behind on the node."""
        shutil.rmtree(self._folder, ignore_errors=True)


def own_folder() -> tuple[Path, IO[str]]:
    """A new folder for as long as the file that comes with it is open. Those of processes that were killed are removed."""
    for old in Path(tempfile.gettempdir()).glob("hanse-job-*"):
        with contextlib.suppress(OSError), (old / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="hanse-job-"))
    mine = (folder / "new").open("w")
    fcntl.flock(mine, fcntl.LOCK_EX)
    (folder / "new").rename(folder / _LOCK)  # it is never there without being held
    return folder, mine


def _files(job: Path) -> dict[str, bytes]:
    """What a worker needs of the job's folder: all but the first model, by name."""
    paths = [path for path in sorted(job.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return {name: path.read_bytes() for path in paths if (name := path.relative_to(job).as_posix()) != MODEL}


def _joined(parts: Iterable[Buffer]) -> Bytes:
    views = [np.frombuffer(part, np.uint8) for part in parts if memoryview(part).nbytes]
    return np.concatenate(views)


def _copy(task: Bytes) -> memoryview:
    return task.copy().data


def _nodes() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def _version() -> str:
    return importlib.metadata.version("hanse")


def _short(error: BaseException) -> str:
    """What Ray says in a page of text, as one sentence: why an actor is dead, or the last line of a traceback."""
    text = str(error).strip()
    _, found, reason = text.partition("The actor is dead because ")
    line = " ".join(reason.split()) if found else next(iter(text.splitlines()[-1:]), type(error).__name__)
    return line[:300]


def _nothing() -> None:
    """Ray counts who refers to a piece of its memory."""
