"""A federation in one folder: an authority, a site's kit, and a server that does only what the test tells it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest

from hanse.errors import Refused, StorageFull
from hanse.identity.authority import Authority, new_key, new_signing_key, public_key
from hanse.identity.certificates import Credentials, Identity, Role
from hanse.identity.kit import CREDENTIALS, Kit, write_kit
from hanse.identity.signatures import Signer
from hanse.jobs.archive import pack, trimmed
from hanse.jobs.bundle import MODEL
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.messages.codec import decode_update, encode_task
from hanse.messages.task import Task
from hanse.messages.update import Update
from hanse.messages.wire import (
    INLINE_BYTES,
    Assignment,
    Blob,
    Delivery,
    End,
    FromServer,
    FromSite,
    Hello,
    Offer,
    OfferReply,
    Payload,
    Received,
    Request,
    TaskRef,
    Welcome,
)
from hanse.transport.blobs import FolderBlobs, Incoming, open_file
from hanse.transport.grpc import Peer, Server, serve

FEDERATION, SITE = "test", "site-1"
WITHIN_S = 60.0
AGENT = """
import asyncio, logging, sys
from pathlib import Path
from hanse.identity.kit import read_kit
from hanse.site.agent import run_agent

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
asyncio.run(run_agent(read_kit(Path(sys.argv[1])), ready=lambda: print("ready", flush=True)))
"""
POLICY = "sandbox: 'off'\nlogs: true\n"
T = TypeVar("T")


@dataclass(eq=False)
class PlainServer:
    """A server that keeps what arrives, and sends what the test says."""

    authority: Authority
    blobs: FolderBlobs
    arrived: asyncio.Queue[FromSite] = field(default_factory=asyncio.Queue)
    sending: asyncio.Queue[FromServer] | None = None
    calls: list[Request] = field(default_factory=list)
    days: float = 1.0
    serials: list[int] = field(default_factory=list)
    full: int = 0
    """So many uploads are told that there is no room."""

    def admit(self, peer: Peer) -> None:
        pass

    async def control(self, peer: Peer, incoming: AsyncIterator[FromSite]) -> AsyncIterator[FromServer]:
        self.serials.append(peer.serial)
        sending: asyncio.Queue[FromServer] = asyncio.Queue()
        reading = asyncio.create_task(self._read(incoming, sending))
        try:
            yield Welcome(version="0")
            while True:
                yield await sending.get()
        finally:
            reading.cancel()

    async def _read(self, incoming: AsyncIterator[FromSite], sending: asyncio.Queue[FromServer]) -> None:
        async for message in incoming:
            if isinstance(message, Hello):
                self.sending = sending
            self.arrived.put_nowait(message)

    async def call(self, peer: Peer, request: Request) -> Any:
        self.calls.append(request)
        if request.name not in ("renew", "enrol"):
            raise Refused(f"no call {request.name}")
        identity = Identity(FEDERATION, Role.SITE, peer.identity.name, peer.identity.organisation)
        chain = self.authority.issue(identity, request.arguments["csr"].encode(), days=self.days)
        return {"certificate": chain.decode()}

    async def follow(self, peer: Peer, request: Request) -> AsyncIterator[Any]:
        raise Refused("nothing to follow")
        yield

    def open_blob(self, peer: Peer, blob: Blob) -> int:
        return open_file(self.blobs.path(blob))

    def incoming(self, peer: Peer, blob: Blob) -> Incoming:
        if self.full:
            self.full -= 1
            raise StorageFull("there is no room")
        return self.blobs.incoming(blob)

    # what a test does

    def send(self, message: FromServer) -> None:
        assert self.sending is not None
        self.sending.put_nowait(message)

    def assign(self, ref: tuple[int, int], task: Task, *, job: str = "j1") -> None:
        frame = b"".join(encode_task(task))
        payload = Payload(inline=frame) if len(frame) <= INLINE_BYTES else Payload(blob=self.blobs.write([frame]))
        self.send(Assignment(job=job, task=TaskRef(*ref), payload=payload))

    async def expect(self, kind: type[T]) -> T:
        """The next message of that kind; others are thrown away."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                if isinstance(message := await self.arrived.get(), kind):
                    return message

    async def update(self, ref: tuple[int, int], *, acknowledge: bool = True) -> Update:
        """The next delivery, which must be of this task."""
        delivery = await self.expect(Delivery)
        assert delivery.task == TaskRef(*ref)
        payload = delivery.payload
        update = decode_update(self.blobs.map(payload.blob) if payload.blob else payload.inline)
        if acknowledge:
            self.send(Received(job=delivery.job, task=delivery.task))
        return update


@dataclass(eq=False)
class OneSite:
    """The federation: `server` runs in this process, `start` starts the agent in one of its own."""

    authority: Authority
    server: PlainServer
    listening: Server
    kit: Kit
    folder: Path
    agents: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def start(self) -> asyncio.subprocess.Process:
        """Start the agent; it is there when this returns."""
        log = (self.folder / f"agent-{len(self.agents)}.log").open("wb")
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AGENT, str(self.kit.folder), stdout=asyncio.subprocess.PIPE, stderr=log
        )
        log.close()
        self.agents.append(agent)
        assert agent.stdout is not None
        async with asyncio.timeout(WITHIN_S):
            assert await agent.stdout.readline() == b"ready\n", self.log()
        return agent

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("agent-*.log")))

    def policy(self, text: str) -> None:
        self.kit.policy_file.write_text(text)

    def offer(self, job: Path, *, signer: Signer | None = None, **packed: Any) -> Offer:
        """The job folder as an offer."""
        archive, slim = self.folder / f"{job.name}.zip", self.folder / f"{job.name}-slim.zip"
        manifest, signature = pack(job, archive, signer=signer or self.signer("rita"), **packed)
        trimmed(archive, slim, {MODEL})
        return Offer(job="j1", manifest=manifest, signature=signature, archive=self.server.blobs.add_file(slim), rank=0, sites=1)

    def credentials(self, *, days: float) -> Credentials:
        """Other ones of the site."""
        return credentials(self.authority, Role.SITE, SITE, days=days)

    def signer(self, name: str) -> Signer:
        key = new_signing_key()
        identity = Identity(FEDERATION, Role.RESEARCHER, name, "vendor")
        return Signer(key, self.authority.issue(identity, public_key(key), days=1))

    async def take(self, job: Path, **packed: Any) -> Offer:
        """Offer the job, and have it accepted."""
        offer = self.offer(job, **packed)
        await self.server.expect(Hello)
        self.server.send(offer)
        reply = await self.server.expect(OfferReply)
        assert reply.refusal is None, reply.refusal
        return offer

    def audit(self) -> list[dict[str, Any]]:
        from hanse.site.ledger import read

        return list(read(self.kit.state_folder / "audit.jsonl"))

    def end(self, status: str = "completed") -> None:
        self.server.send(End(job="j1", status=status))


def credentials(authority: Authority, role: Role, name: str, *, days: float = 1.0, addresses: tuple[str, ...] = ()) -> Credentials:
    key = new_key()
    chain = authority.issue(Identity(FEDERATION, role, name, "clinic"), public_key(key), days=days, addresses=addresses)
    return Credentials(key, chain, authority.roots)


@pytest.fixture
def authority() -> Authority:
    return Authority.new_root(FEDERATION)


@pytest.fixture
async def one_site(tmp_path: Path, authority: Authority) -> AsyncIterator[OneSite]:
    server = PlainServer(authority, FolderBlobs(tmp_path / "server"))
    listening = await serve(server, credentials(authority, Role.SERVER, "server", addresses=("localhost", "127.0.0.1")), "127.0.0.1:0")
    folder = tmp_path / "kit"
    kit = Kit(
        federation=FEDERATION,
        role=Role.SITE,
        name=SITE,
        organisation="clinic",
        server=f"localhost:{listening.port}",
        config={"secret_place": "here"},
        folder=folder,
    )
    credentials(authority, Role.SITE, SITE).save(folder / CREDENTIALS)
    write_kit(folder, kit)
    site = OneSite(authority, server, listening, kit, tmp_path)
    site.policy(POLICY)
    yield site
    for agent in site.agents:
        with contextlib.suppress(ProcessLookupError):
            agent.terminate()
        async with asyncio.timeout(WITHIN_S):
            await agent.wait()
    await listening.close()


@pytest.fixture
def job_folder(tmp_path: Path, load: Callable[[str], Any]) -> Callable[..., Path]:
    """Writes a job of code of an app, or of a script, to a folder."""

    def write(code: str | Path, *, model: Any = None, **recipe: Any) -> Path:
        runs = {"script": code} if isinstance(code, Path) else {"app": load(code).app}
        first = {"w": np.zeros(3, "f4")} if model is None else model
        described = FedAvgRecipe(name="job", model=first, rounds=3, **{**runs, **recipe})
        return described.export(tmp_path / f"job-{len(list(tmp_path.glob('job-*')))}")

    return write


@pytest.fixture
def training_processes() -> Callable[[asyncio.subprocess.Process], list[psutil.Process]]:
    """The training processes of an agent."""

    def find(agent: asyncio.subprocess.Process) -> list[psutil.Process]:
        return [
            process for process in psutil.Process(agent.pid).children(recursive=True) if "hanse.site.trainer" in " ".join(process.cmdline())
        ]

    return find


@pytest.fixture
def sandboxed() -> None:
    from hanse.sandbox import Sandbox

    if problem := Sandbox().problem():
        pytest.skip(problem)
