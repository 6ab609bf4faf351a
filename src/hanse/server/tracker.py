"""A process that hands on a run's values while its job runs. What becomes of it does not touch the job."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hanse.server.track import END_WITHIN_S, Say, Target

LOG = "tracking.log"
"""What the process, and the receiver's package, print."""
FINISH_WITHIN_S = END_WITHIN_S + 5
TRIES = 3
"""So often the process of a job is started; one that ends too early is replaced, and goes on where that one got to."""


class Tracker:
    """`start` it when the job starts. When nothing more will be in the run folder, `close` it, or `finish` it.

    track: where to, as `Target.of` has it. run: the run folder; its files need not be there yet. folder: where it is noted how far that
    got, and for the receiver's own files; None: the run folder.
    """

    def __init__(self, track: str, run: Path, folder: Path | None = None) -> None:
        self._target, self._run, self._folder = Target.of(track), run.absolute(), (folder or run).absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._tries = TRIES
        self._closed = False
        self._heard = b""

    @property
    def pid(self) -> int | None:
        """Of the process, while it runs."""
        return None if self._process is None else self._process.pid

    def start(self, say: Say) -> None:
        """Start the process. `say` is told on the running event loop what it says, and how it ends if that is too early."""
        self._say, self._loop = say, asyncio.get_running_loop()
        self._spawn()

    def close(self) -> None:
        """Let the process hand on what is left, which it does within half a minute or ends."""
        self._closed = True
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def finish(self) -> list[tuple[str, str]]:
        """`close`, and wait until the process has ended: what it says meanwhile. For when the event loop has ended."""
        process, self._process, self._closed = self._process, None, True
        if process is None:
            return []
        try:
            said = process.communicate(timeout=FINISH_WITHIN_S)[0]
        except subprocess.TimeoutExpired:  # it is stopped, perhaps
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0]
        return [*_messages(self._heard + said), *self._end(process.returncode)]

    def _spawn(self) -> None:
        self._tries -= 1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / LOG).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "hanse.server.track"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is not for it
                )
        except OSError as error:
            self._say("warning", f"the run's values are not written to {self._target.to}: {error}")
            return
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        order = {"run": str(self._run), "to": self._target.to, "at": self._target.at, "folder": str(self._folder)}
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        self._loop.add_reader(process.stdout.fileno(), self._hear, process)

    def _hear(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        said = os.read(process.stdout.fileno(), 65_536)
        whole, _, self._heard = (self._heard + said).rpartition(b"\n")
        for level, text in _messages(whole):
            self._say(level, text)
        if said:
            return
        self._loop.remove_reader(process.stdout.fileno())
        process.stdout.close()
        self._process = None
        for level, text in self._end(process.wait()):
            self._say(level, text)
        if not self._closed and self._tries:
            self._spawn()

    def _end(self, status: int) -> Iterator[tuple[str, str]]:
        """What there is to say of a process that has ended so."""
        if status == 0 and self._closed:
            return
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        text = f"the process that writes the run's values to {self._target.to} {how}; {self._folder / LOG} may say why."
        if not self._closed:
            text += " It is started again." if self._tries else " It is not started again; the job goes on without it."
        yield "warning", text


def _messages(lines: bytes) -> Iterator[tuple[str, str]]:
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            level, text = json.loads(line)
            yield level, text
