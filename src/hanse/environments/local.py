"""A federation on this machine: a server and sites as processes of their own, provisioned, joined and connected as real ones are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hanse.errors import ConfigError, LinkBroken
from hanse.identity.certificates import Role
from hanse.identity.kit import read_kit, write_kit
from hanse.provision.kits import provision
from hanse.provision.project import Project

FEDERATION, ORGANISATION, SERVER, ADMIN = "poc", "poc", "poc-server", "poc-admin"
HOST = "127.0.0.1"
READY_WITHIN_S = 60.0
END_WITHIN_S = 15.0
_TAIL_BYTES = 2_000

OPEN_POLICY = """\
# A federation on one machine, for trying out: whatever a job asks is allowed, and what it prints is shown. Not for a real site.
meta:
  allow: ["*"]
logs: true
sandbox: "off"
"""


@dataclass(frozen=True)
class Member:
    """One process: the server, or a site. It writes its log to the file `log`."""

    name: str
    process: Process
    log: Path

    async def begin(self) -> None:
        """Let it begin, and wait until it is ready. Raises LinkBroken, with what it said last, if it does not get there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                with contextlib.suppress(ConnectionError):
                    self.process.stdin.write(b"begin\n")
                    await self.process.stdin.drain()
                if not (await self.process.stdout.readline()).startswith(b"ready"):
                    await self.process.wait()
                    raise self.ended()
        except TimeoutError as error:
            raise self._broken(f"is not ready after {READY_WITHIN_S:.0f} s") from error

    def ended(self) -> LinkBroken:
        """How it ended, and what it said last."""
        status = self.process.returncode or 0
        return self._broken(f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}")

    def _broken(self, how: str) -> LinkBroken:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            said = log.read().decode(errors="replace").strip()
        if (last := said.rpartition("\n")[2]).startswith("error: "):
            said = last.removeprefix("error: ")
        return LinkBroken(f"the process of {self.name} {how}{': ' + said if said else ''}")

    async def end(self) -> None:
        """Ask it to end, and see to it that it does."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            async with asyncio.timeout(END_WITHIN_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


@dataclass(frozen=True)
class LocalFederation:
    """What is running, and the folder with everybody's kits, states and logs."""

    folder: Path
    members: Sequence[Member]

    @property
    def admin_kit(self) -> Path:
        return admin_kit(self.folder)

    async def broken(self) -> None:
        """Wait until one of the processes ends, and raise LinkBroken, which says what it said last."""
        waits = {asyncio.create_task(member.process.wait()): member for member in self.members}
        try:
            ended, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        raise waits[ended.pop()].ended()


@asynccontextmanager
async def local_federation(folder: Path, sites: Sequence[str], *, policy: str = OPEN_POLICY) -> AsyncIterator[LocalFederation]:
    """Server and sites, all connected; they have ended when it is left, and die with this process.

    folder: where everybody's kit is, made now unless it was there; to be entered again with the same sites.
    Raises LinkBroken if a process ends before it is ready, or is not within a minute.
    """
    folder = folder.absolute()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    members: list[Member] = []
    try:
        members.append(await _start("server", SERVER, folder / "server", logs))
        members += await asyncio.gather(*(_start("site", site, folder / "sites" / site, logs) for site in sites))
        if not admin_kit(folder).is_dir():  # while they load what they need
            provision(local_project(sites, _free_port()), folder)
            kit = read_kit(folder / "server")  # the jobs are the user's own, and so is the machine
            write_kit(kit.folder, msgspec.structs.replace(kit, sandbox="off"))
        for site in sites:
            (folder / "sites" / site / "policy.yaml").write_text(policy)
        await members[0].begin()
        await asyncio.gather(*(member.begin() for member in members[1:]))
        yield LocalFederation(folder, tuple(members))
    finally:
        await asyncio.gather(*(member.end() for member in members))


def local_project(sites: Sequence[str], port: int) -> Project:
    """Who takes part. Raises ConfigError for names that no participant may have."""
    data = {
        "federation": FEDERATION,
        "server": {"name": SERVER, "organisation": ORGANISATION, "addresses": [HOST], "port": port, "listen": f"{HOST}:{port}"},
        "admins": [{"name": ADMIN, "organisation": ORGANISATION, "role": Role.PROJECT_ADMIN}],
        "sites": [{"name": site, "organisation": ORGANISATION} for site in sites],
    }
    try:
        return msgspec.convert(data, Project)
    except msgspec.ValidationError as error:
        raise ConfigError(f"sites is {list(sites)!r:.200}: {error}") from error


def admin_kit(folder: Path) -> Path:
    """The startup kit to use the federation with."""
    return folder / "admins" / ADMIN


def joined_sites(folder: Path) -> list[str]:
    """The sites of the federation in the folder, by name; none if there is no federation."""
    return sorted(path.name for path in (folder / "sites").glob("*") if not path.name.startswith("."))


async def _start(role: str, name: str, kit: Path, logs: Path) -> Member:
    log = logs / f"{name}.log"
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "hanse.environments.member", role, str(kit), str(os.getpid()),
            stdin=PIPE, stdout=PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
    return Member(name, process, log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
