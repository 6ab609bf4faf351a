"""A federation of real processes that runs one job and can be hurt meanwhile: processes killed, connections broken, disks filled.

What it has done is read from what lies on disk (audit logs, the server's database, the run folder), so that whoever waits for a moment of
the job sees it whether or not somebody is alive to tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import socket
import sqlite3
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
from tests.pump import Pump

from hanse.environments.federation import Placement, connected, download, submit
from hanse.environments.local import HOST, Member, _start, admin_kit, local_federation
from hanse.errors import LinkBroken
from hanse.identity.kit import Kit, read_kit, write_kit
from hanse.server.run import Run
from hanse.transport.client import Client

SERVER = "server"
LOOK_EVERY_S = 0.004
WITHIN_S = 60.0
"""Whatever is waited for comes within this time, even on a machine with much else to do."""

Ref = tuple[int, int]
"""A task: its commit, and which of that commit's asks."""
Kept = tuple[str, Ref]
"""An update that the server has: whose, and of which task."""


async def until(condition: Callable[[], Any], what: str, *, within_s: float = WITHIN_S) -> None:
    """Wait for the condition. Raises TimeoutError that names what did not come."""
    try:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(LOOK_EVERY_S)
    except TimeoutError as error:
        raise TimeoutError(f"within {within_s:g} s this did not come: {what}") from error


async def make_template(folder: Path, sites: Sequence[str]) -> Path:
    """The folder of a federation whose sites have joined, to be copied for each test."""
    async with local_federation(folder, sites):
        pass
    shutil.rmtree(folder / "logs")
    return folder


@dataclass(frozen=True)
class Look:
    """What was known at one time: the updates that the server has kept, how often each task had been trained, the rounds done."""

    kept: frozenset[Kept]
    trained: Counter[Kept]
    rounds: int


@dataclass(eq=False)
class Federation:
    """Server and sites, each a process; each site connects through its own pump. Made by `federation`.

    looks: what was seen at each fault.
    """

    folder: Path
    pumps: dict[str, Pump]
    members: dict[str, Member] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    job: str = ""
    _keeping: list[asyncio.Task[None]] = field(default_factory=list)
    _may_start: dict[str, asyncio.Lock] = field(default_factory=dict)

    # processes

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.pumps)

    def kit(self, name: str) -> Path:
        return self.folder / SERVER if name == SERVER else self.folder / "sites" / name

    def state(self, name: str) -> Path:
        return self.kit(name) / "state"

    async def start(self, *names: str) -> None:
        """Start server or sites and wait until they are ready. One that ends is started again, as a service manager does."""
        ready = {name: asyncio.Event() for name in names}
        for name in names:
            self._keeping.append(asyncio.create_task(self._keep_running(name, ready[name])))
        async with asyncio.timeout(WITHIN_S):
            for name in names:
                await ready[name].wait()

    async def _keep_running(self, name: str, ready: asyncio.Event) -> None:
        self._may_start[name] = asyncio.Lock()
        while True:
            async with self._may_start[name]:
                member = await _start(SERVER if name == SERVER else "site", name, self.kit(name), self.folder / "logs")
                self.members[name] = member
            with contextlib.suppress(LinkBroken):
                await member.begin()
                ready.set()
            await member.process.wait()

    @asynccontextmanager
    async def killed(self, *names: str) -> AsyncIterator[None]:
        """kill -9 for these, all at the same time. They are dead meanwhile, and started again after."""
        async with AsyncExitStack() as stack:
            for name in sorted(names):
                await stack.enter_async_context(self._may_start[name])
            for name in names:
                with contextlib.suppress(ProcessLookupError):
                    self.members[name].process.kill()
            for name in names:
                await self.members[name].process.wait()
            yield

    async def end(self) -> None:
        """End all processes."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(member.end() for member in self.members.values()))

    def job_process(self) -> int | None:
        """The process that runs the workflow."""
        return self._child(SERVER, "hanse.server.job_process")

    def trainer(self, site: str) -> int | None:
        """The process that runs the site's training code."""
        return self._child(site, "hanse.site.trainer")

    def _child(self, name: str, module: str) -> int | None:
        with contextlib.suppress(psutil.Error):
            for child in reversed(psutil.Process(self.members[name].process.pid).children(recursive=True)):
                with contextlib.suppress(psutil.Error):  # the last one is inside of the sandbox
                    if module in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        return child.pid
        return None

    def processes(self) -> list[str]:
        """All processes that this federation has left on the machine."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                where = [process.cwd(), *process.cmdline()]
                if process.status() != psutil.STATUS_ZOMBIE and any(part.startswith(str(self.folder)) for part in where):
                    found.append(" ".join(where))
        return found

    # what it has done

    @property
    def run_folder(self) -> Path:
        return self.state(SERVER) / "jobs" / self.job

    @property
    def database(self) -> Path:
        return self.state(SERVER) / "server.sqlite"

    def ledger(self, site: str, *kinds: str) -> list[dict[str, Any]]:
        """The lines of the site's audit log of these kinds; a last line that is not whole yet is left out."""
        path = self.state(site) / "audit.jsonl"
        if not path.is_file():
            return []
        whole = path.read_bytes().rpartition(b"\n")[0]
        lines = (msgspec.json.decode(line) for line in whole.split(b"\n") if line)
        return [line for line in lines if line["kind"] in kinds and line.get("job") == self.job]

    def tasks(self, site: str, kind: str) -> list[Ref]:
        """The tasks of which the site's audit log has a line of this kind, once for each line."""
        return [(line["commit"], line["index"]) for line in self.ledger(site, kind)]

    def rounds_done(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return int(json.loads((self.run_folder / "run.json").read_text())["rounds"]["done"])
        return 0

    def ended(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.run_folder / "run.json").read_text()).get("status", "running") != "running"
        return False

    def kept(self) -> frozenset[Kept]:
        """The updates that the server has stored, of rounds that are not committed yet."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=WITHIN_S)) as database:
            rows = database.execute('SELECT site, "commit", "index" FROM updates WHERE job = ?', [self.job])
            return frozenset((site, (commit, index)) for site, commit, index in rows)

    def reached(self, site: str, moment: str, task: Ref) -> bool:
        """Whether that moment of the site's task is here, or past. moment: task, training, trained, update or stored."""
        if self.rounds_done() > task[0] or self.ended():
            return True
        if moment == "stored":
            return (site, task) in self.kept()
        return any(done >= task for done in self.tasks(site, moment))

    def look(self) -> None:
        """Note what the server has and what the sites have done."""
        kept = self.kept()
        trained = Counter((site, task) for site in self.sites for task in self.tasks(site, "training"))
        self.looks.append(Look(kept, trained, self.rounds_done()))

    def log(self, name: str) -> str:
        path = self.folder / "logs" / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # the job

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[tuple[Client, Kit]]:
        kit = read_kit(admin_kit(self.folder))
        async with connected(kit) as client:
            yield client, kit

    async def submit(self, job_folder: Path, **placement: Any) -> None:
        async with self.admin() as (client, kit):
            self.job = (await submit(client, kit, job_folder, Placement(sites=self.sites, **placement))).job

    async def end_of_job(self) -> dict[str, Any]:
        """Wait until the server says how the job has ended, and return that."""
        await until(self.ended, "the end of the job")
        async with self.admin() as (client, _):
            for _ in range(int(WITHIN_S / LOOK_EVERY_S)):
                with contextlib.suppress(LinkBroken):
                    job: dict[str, Any] = await client.call("job", job=self.job)
                    if job["status"] not in ("queued", "running"):
                        return job
                await asyncio.sleep(LOOK_EVERY_S)
        raise TimeoutError("the run folder is complete, and the server says the job runs")

    async def result(self, runs: Path) -> Run:
        """Fetch what came of the job."""
        async with self.admin() as (client, _):
            return Run(await download(client, self.job, runs))


@asynccontextmanager
async def federation(
    template: Path, folder: Path, sites: Sequence[str], *, disks: Sequence[str] = (), **server: Any
) -> AsyncIterator[Federation]:
    """A copy of the federation at `template`, all of it running; at the end every process is gone.

    disks: whose state lies on a small disk of its own. server: fields of the server's kit.
    """
    folder = folder.resolve()
    shutil.copytree(template, folder)
    (folder / "logs").mkdir()
    port = _free_port()
    address = f"{HOST}:{port}"
    _change_kit(folder / SERVER, server=address, listen=address, **server)
    _change_kit(admin_kit(folder), server=address)
    async with AsyncExitStack() as stack:
        pumps = {site: await stack.enter_async_context(Pump(port)) for site in sites}
        for site, pump in pumps.items():
            _change_kit(folder / "sites" / site, server=f"{HOST}:{pump.port}")
        running = Federation(folder, pumps)
        for name in disks:
            stack.enter_context(small_disk(running.state(name)))
        try:
            await running.start(SERVER)
            await running.start(*sites)
            yield running
        finally:
            await running.end()


def _change_kit(folder: Path, **changes: Any) -> None:
    write_kit(folder, msgspec.structs.replace(read_kit(folder), **changes))


def _free_port() -> int:
    """One that no outgoing connection takes while its server is being started again."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            return port


# ------------------------------------------------------------------------------------------------------------------------------ small disks

DISK_BYTES = 96 << 20


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError), small_disk(folder):
        return True
    return False


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """The folder, with what it holds, on a file system of DISK_BYTES. Raises CalledProcessError if that is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    before = folder.with_name(f"{folder.name}-before")
    shutil.copytree(folder, before)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        shutil.copytree(before, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)
        shutil.rmtree(before)


@asynccontextmanager
async def full(folder: Path) -> AsyncIterator[None]:
    """The disk of the folder is full meanwhile, whatever is deleted there."""

    async def fill() -> None:
        with (folder / "ballast").open("ab", buffering=0) as ballast:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while ballast.write(bytes(size)):
                        pass

    async def keep_full() -> None:
        while True:
            await fill()
            await asyncio.sleep(LOOK_EVERY_S)

    await fill()
    filling = asyncio.create_task(keep_full())
    try:
        yield
    finally:
        filling.cancel()
        (folder / "ballast").unlink()
