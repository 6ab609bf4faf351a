"""`idle`: 2,000 sites that are connected to one server and have nothing to do cost at most 100 KiB each, and 10 % of a core together.

The server is the real one, in a process of its own; the sites are control streams over mutual TLS from a few processes, each with its own
certificate. Beside it: a plain gRPC server with the same TLS, to which the same sites connect.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from claims import Claim, parser, run
from processes import _fields

from hanse.environments.local import HOST, local_federation, local_project
from hanse.identity.kit import read_kit
from hanse.provision.kits import provision

WORKLOADS = Path(__file__).parent / "workloads"
PROCESSES = 4
SITE_KIB, CPU_PERCENT = 100, 10
SETTLE_S = 10.0


@dataclass(frozen=True)
class Cost:
    """site_kib: what the server's memory grew by, for each site. cpu_percent: of a core, while nothing happens."""

    site_kib: float
    cpu_percent: float


def measure(options: Namespace) -> Iterator[Claim]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with tempfile.TemporaryDirectory() as folder:
        raw = _raw(Path(folder), options)
        print(f"raw    {raw}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        hanse = asyncio.run(_hanse(Path(folder), options))
        print(f"hanse  {hanse}", flush=True)
    what = f"idle: {options.sites:,} sites"
    yield Claim(
        what=f"{what}, memory each", hanse=f"{hanse.site_kib:.0f} KiB", bare=f"{raw.site_kib:.0f} KiB", figure=hanse.site_kib, unit="KiB",
        limit=SITE_KIB,
    )  # fmt: skip
    yield Claim(
        what=f"{what}, CPU of a core", hanse=f"{hanse.cpu_percent:.1f} %", bare=f"{raw.cpu_percent:.1f} %", figure=hanse.cpu_percent,
        unit="%", limit=CPU_PERCENT,
    )  # fmt: skip


async def _hanse(folder: Path, options: Namespace) -> Cost:
    async with local_federation(folder, ()) as federation:
        return await asyncio.to_thread(_cost, federation.members[0].process.pid, folder, options)


def _raw(folder: Path, options: Namespace) -> Cost:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    provision(local_project((), port), folder)
    server = subprocess.Popen([sys.executable, WORKLOADS / "raw_idle.py", folder / "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with server:
        assert server.stdout is not None
        server.stdout.readline()
        try:
            return _cost(server.pid, folder, options)
        finally:
            server.terminate()


def _cost(pid: int, folder: Path, options: Namespace) -> Cost:
    before = _resident(pid)
    with _sites(folder, options.sites):
        time.sleep(SETTLE_S)
        after, cpu_s = _resident(pid), _cpu_s(pid)
        time.sleep(options.seconds)
        return Cost((after - before) / options.sites / 1024, (_cpu_s(pid) - cpu_s) / options.seconds * 100)


@contextmanager
def _sites(folder: Path, count: int) -> Iterator[None]:
    """So many sites are connected; when this is left, they are gone."""
    address, each = read_kit(folder / "server").server, -(-count // PROCESSES)
    program = [sys.executable, WORKLOADS / "idle_sites.py", address, folder / "server" / "authority"]
    processes = [
        subprocess.Popen([*program, str(first), str(min(each, count - first))], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for first in range(0, count, each)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise subprocess.CalledProcessError(process.wait(), process.args)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _resident(pid: int) -> int:
    """In bytes, with all of the libraries: their part in PSS changes with whoever else has mapped them."""
    return _fields(Path(f"/proc/{pid}/status"))["VmRSS"]


def _cpu_s(pid: int) -> float:
    """The user and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--sites", type=int, default=2000)
    options.add_argument("--seconds", type=float, default=15, help="that nothing happens in")
    run(measure, options.parse_args())
