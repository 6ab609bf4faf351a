"""A federation on this machine that stays until it is stopped: one process in the background, with server and sites below it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hanse.environments.local import OPEN_POLICY, LocalFederation, joined_sites, local_federation
from hanse.environments.loop import run_async
from hanse.errors import ConfigError, LinkBroken

PID = "pid"
"""Locked by the process as long as it runs; holds its id."""

LOG = "federation.log"


def stand(folder: Path, sites: Sequence[str], *, policy: str = OPEN_POLICY, ready: Callable[[LocalFederation], None]) -> None:
    """Run a federation until SIGTERM or Ctrl-C. The folder keeps kits, jobs and results for the next time.

    Raises ConfigError if one runs there already or the folder has other sites, LinkBroken if one of its processes ends.
    """
    check_sites(folder, sites)

    async def main() -> None:
        async with local_federation(folder, sites, policy=policy) as federation:
            ready(federation)
            await federation.broken()

    with _held(folder), contextlib.suppress(KeyboardInterrupt):
        run_async(main())


def check_sites(folder: Path, sites: Sequence[str]) -> None:
    """Raises ConfigError if the folder has a federation of other sites."""
    if (there := joined_sites(folder)) and there != sorted(sites):
        raise ConfigError(f"{folder} holds a federation of {', '.join(there)}: give these as the sites, or choose another folder")


def start(arguments: Sequence[str], folder: Path) -> None:
    """Run `hanse` with these arguments, which lead to `stand`, in the background; return once it is ready.

    Raises LinkBroken, with what it said, if it does not get there.
    """
    log = folder / LOG
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hanse.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
    if not line:
        status = process.wait()
        text = log.read_text(errors="replace").strip() or f"it ended with status {status}"
        raise LinkBroken(f"the federation in {folder} did not start: {text.removeprefix('error: ')}")
    process.returncode = 0  # it goes on without us


def running(folder: Path) -> int | None:
    """The id of the process that runs the federation in the folder; None if none does."""
    try:
        with (folder / PID).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
    except FileNotFoundError:
        pass
    return None


def stop(folder: Path) -> bool:
    """End the federation in the folder, and wait for that. Returns whether one was running."""
    pid = running(folder)
    if pid is None:
        return False
    with (folder / PID).open() as file:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        fcntl.flock(file, fcntl.LOCK_SH)  # it ends its processes within a bounded time, and lets go of this
    return True


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / PID).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"a federation runs in {folder} already.", hint=f"Stop it with: hanse poc stop --folder {folder}") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)
