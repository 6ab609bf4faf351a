"""Starts a job's training process, in a sandbox or without one, and ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hanse.app import MAX_STATE_ARRAY_BYTES, MAX_STATE_BYTES
from hanse.errors import LinkBroken
from hanse.sandbox import Sandbox, environment
from hanse.site import orders
from hanse.site.orders import Begin
from hanse.site.process import thread_settings
from hanse.transport.memory import MemoryLink

_SAID_BYTES = 2_000

MAX_MESSAGE_BYTES = MAX_STATE_ARRAY_BYTES + 4 * MAX_STATE_BYTES
"""Of one from a trainer, besides its body: the site's state has the most."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its status (negative: the signal's number), and the CPU seconds that it and its children took."""

    status: int
    cpu_s: float

    @property
    def signal(self) -> int | None:
        """The number of the signal that ended it, also if it ran in bubblewrap; None if it ended by itself."""
        if self.status < 0:
            return -self.status
        return self.status - 128 if 128 < self.status < 128 + signal.NSIG else None

    def __str__(self) -> str:
        return f"ended with status {self.status}" if self.signal is None else f"was killed by {signal.Signals(self.signal).name}"


@dataclass(frozen=True)
class Trainer:
    """A running training process, in a session of its own. output: the file with what it wrote outside of Python."""

    process: subprocess.Popen[bytes]
    link: MemoryLink
    output: Path

    def end(self) -> Ended:
        """Kill the process, if it lives, and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.link.close()
        return Ended(self.process.returncode, usage.ru_utime + usage.ru_stime)

    def last_words(self) -> str:
        """The end of what it wrote outside of Python, such as a crash's traceback."""
        with self.output.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _SAID_BYTES))
            return file.read().decode(errors="replace").strip()


def start(begin: Begin, work: Path, *, sandbox: Sandbox | None, python: str = sys.executable) -> Trainer:
    """Start a trainer and tell it to begin. work: where it may write, made if it is not there.

    It gets nothing of this process's environment but where programs and libraries are; no descriptor but the link's; no input.
    """
    scratch = work / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    here, there = MemoryLink.pair()
    here.max_message_bytes = MAX_MESSAGE_BYTES
    arguments = ["-P", "-m", "hanse.site.trainer", str(there.socket.fileno())]
    command = [python, *arguments] if sandbox is None else sandbox.command(arguments, job=Path(begin.folder), work=work)
    output = work.with_name(f"{work.name}.log")
    with output.open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**environment(scratch), **thread_settings(begin.threads)},
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[there.socket.fileno()],
            start_new_session=True,
        )
    there.close()
    with contextlib.suppress(LinkBroken):  # it has died at once, which whoever reads the link finds out
        here.send(orders.encode(begin))
    return Trainer(process, here, output)
