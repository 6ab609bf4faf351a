"""Whole processes: how long they take, and how much memory they and their children hold."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 0.02
MIB = 1 << 20


@dataclass(frozen=True)
class Finished:
    """A process that has ended well. cpu_s: user and system time, with that of its children that it waited for."""

    wall_s: float
    cpu_s: float
    output: str


def run(argv: Sequence[str | Path], *, cwd: Path | None = None, watch: Callable[[int], None] | None = None) -> Finished:
    """Run a program to its end. `watch` is called with its process id every EVERY_S seconds meanwhile.

    Raises CalledProcessError, after passing its output on, if it does not end with status 0.
    """
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in argv], cwd=cwd, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if watch is not None:
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            watch(process.pid)
            time.sleep(EVERY_S)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode != 0:
        sys.stderr.write(output)
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Finished(wall_s, usage.ru_utime + usage.ru_stime, output)


class TreeMemory:
    """The peak memory of a process and all its descendants, summed over the tree at each look. In bytes.

    pss: a page that n processes share counts 1/n in each, so the sum counts it once: what the machine really gives. It is what is judged.
    rss: the same page counts n times, so forked processes seem to hold far more than there is.
    """

    def __init__(self) -> None:
        self.pss = self.rss = 0

    def __call__(self, pid: int) -> None:
        pss = rss = 0
        for member in _tree(pid):
            with suppress(OSError):  # it has just ended
                sizes = _fields(Path(f"/proc/{member}/smaps_rollup"))
                pss, rss = pss + sizes["Pss"], rss + sizes["Rss"]
        self.pss, self.rss = max(self.pss, pss), max(self.rss, rss)


class AnonymousMemory:
    """The peak anonymous memory of one process: what it allocated, without the files it maps. In bytes."""

    def __init__(self) -> None:
        self.peak = 0

    def __call__(self, pid: int) -> None:
        with suppress(OSError, KeyError):
            self.peak = max(self.peak, _fields(Path(f"/proc/{pid}/status"))["RssAnon"])


def _tree(pid: int) -> list[int]:
    members = [pid]
    for member in members:
        with suppress(OSError):
            for thread in Path(f"/proc/{member}/task").iterdir():
                members += map(int, (thread / "children").read_text().split())
    return members


def _fields(path: Path) -> dict[str, int]:
    """The sizes that a file of /proc tells, in bytes."""
    words = (line.split() for line in path.read_text().splitlines())
    return {word[0].rstrip(":"): int(word[1]) << 10 for word in words if word[-1] == "kB"}
