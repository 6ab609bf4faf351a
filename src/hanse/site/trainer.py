"""A site's training process: `python -m hanse.site.trainer DESCRIPTOR`, a socket on which the agent says Begin.

It runs one job's code for one site, in the same way as a simulation's worker does, so that updates have the same bits. It holds no keys and
opens no connection. A task that comes as a file is mapped, each part of it copied only when it is written; an update goes out through
memory that is used again for the next one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import resource
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hanse.app import App
from hanse.client.framework import load_adapter
from hanse.client.script import Script
from hanse.client.session import SiteInfo
from hanse.errors import ConfigError, Failure, HanseError, LinkBroken
from hanse.filters import Filters
from hanse.jobs.bundle import CODE, MODEL, JobFile, below, import_name, read_folder
from hanse.jobs.parts import part_of
from hanse.messages.codec import Buffer, decode, decode_task, encode, encode_update
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Update
from hanse.messages.wire import TaskRef
from hanse.process import die_with_parent
from hanse.site import orders
from hanse.site.failure import failure_of
from hanse.site.orders import Begin, Close, Closed, Lines, Perform, Performed, Restore, Unfit
from hanse.site.output import Output
from hanse.site.process import KEEP_ALL, settle_in
from hanse.site.runner import SiteRunner
from hanse.transport.memory import MemoryLink, Received, map_shared

MAX_LINE_CHARACTERS = 10_000


def main() -> None:
    """Be a trainer until the agent says Close, or is gone."""
    link = MemoryLink(socket.socket(fileno=int(sys.argv[1])))
    link.socket.set_inheritable(False)
    faulthandler.enable()
    status = 1
    try:
        with contextlib.suppress(LinkBroken):
            order = orders.decode_order(link.receive().message)
            assert isinstance(order, Begin)
            work(link, order)
            status = 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # whatever threads the job's code has left behind


def work(link: MemoryLink, begin: Begin) -> None:
    """Do what the agent says. Raises LinkBroken when it is gone."""
    die_with_parent()
    _check_link(link)
    _limit(begin)
    speak = _Speaker(link)
    output = Output(speak.line)
    try:
        with output.of(begin.site):
            job, code = load_code(Path(begin.folder))
            if job.framework:
                load_adapter(job.framework)  # and with it the framework, so that it is told how many threads to use
        settle_in(begin.threads, keep_bytes=KEEP_ALL)
        runner = SiteRunner(code, filters=filters_of(job), framework=job.framework, sink=speak.line)
    except (Exception, SystemExit) as error:
        failure, traceback = failure_of(error)
        output.close()
        speak.send(Unfit(failure=failure, traceback=str(traceback.value)))
        return
    output.close()
    info = SiteInfo(begin.site, begin.rank, begin.sites, job.name, job.seed, {**job.config, **begin.config})
    state: dict[str, Any] = {}
    while True:
        received = link.receive()
        match orders.decode_order(received.message):
            case Restore():
                frame = _own(received)
                state = dict(decode(frame)[0].params) if frame else {}
            case Perform(task=ref):
                _perform(speak, runner, info, ref, received, state)
            case Close():
                endings = runner.close()
                speak.send(Closed(problem=next((ending.failure for ending in endings if ending.failure), None)))
                return


def _perform(speak: _Speaker, runner: SiteRunner, info: SiteInfo, ref: TaskRef, received: Received, state: dict[str, Any]) -> None:
    task_id = TaskId(info.job_id, ref.commit, ref.index, info.name)
    shared = received.shared
    task = decode_task(map_shared(shared) if shared else _own(received))

    def private() -> FLModel:
        assert shared is not None
        return decode(map_shared(shared), writable=True)[0]

    try:
        update = runner.run(info, task, task_id, state, private=private if shared else None)
        try:
            frame = encode_update(update)
        except HanseError as error:  # what the code returned has no form in which it could travel
            frame = encode_update(Update(info.name, task_id, failure=Failure.of(error), seconds=update.seconds))
    finally:
        if shared:
            os.close(shared[0])
    kept = b"".join(encode(FLModel(params=state))) if state else None
    speak.send(Performed(task=ref, state=kept, cpu_s=_cpu_s()), frame)


def load_code(folder: Path) -> tuple[JobFile, App | Script]:
    """The job file and what the site runs. Raises ConfigError, and whatever importing the job's code raises."""
    job = read_folder(folder, may_lack={MODEL})
    code = (folder / CODE).resolve()
    if job.script is not None:
        return job, Script(below(code, job.script), tuple(job.argv))
    if job.app is None:
        raise ConfigError(f"job {job.name!r} names neither a script nor an app: there is nothing for a site to run")
    app = import_name(code, job.app)
    if not isinstance(app, App):
        raise ConfigError(f"{job.app.name!r} in {job.app.file} is a {type(app).__name__}: it must be a hanse.App")
    return job, app


def filters_of(job: JobFile) -> Filters:
    """The job's filters, at each edge."""
    return Filters(**{edge: tuple(part_of("filters", part) for part in parts) for edge, parts in job.filters.items()})


def _own(received: Received) -> bytes:
    """The body in memory of this process's own: code may keep a task's arrays for longer than the agent keeps its slot."""
    if received.body is None:
        return b""
    frame = bytes(received.body.buffer)
    received.body.release()
    return frame


def _check_link(link: MemoryLink) -> None:
    """Raises LinkBroken if the agent was gone before this process was bound to it: its orders may still lie here, to be read."""
    poll = select.poll()
    poll.register(link.socket, 0)
    if any(events & select.POLLHUP for _, events in poll.poll(0)):
        raise LinkBroken("the agent is gone")


def _limit(begin: Begin) -> None:
    """Set what the process may take, for good. RLIMIT_DATA counts private memory that can be written: the heap, and the task's mapping."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if begin.cpu_s is not None:
        used_s = math.ceil(begin.cpu_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used_s, used_s + 1))  # SIGXCPU, and a second later SIGKILL
    if begin.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (begin.memory_bytes, begin.memory_bytes))


def _cpu_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class _Speaker:
    """Sends messages one at a time: the job's code may print from several threads."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link
        self._lock = threading.Lock()

    def send(self, message: Performed | Lines | Unfit | Closed, body: list[Buffer] | None = None) -> None:
        with self._lock:
            self._link.send(orders.encode(message), body or [])

    def line(self, site: str, line: str) -> None:
        """A line that the code printed; see `Sink`."""
        self.send(Lines(lines=[line[:MAX_LINE_CHARACTERS]]))


if __name__ == "__main__":
    main()
