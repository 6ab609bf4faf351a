"""A real federation server with real certificates and small sites in this process, and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from hanse.client.session import SiteInfo
from hanse.errors import Failure, HanseError
from hanse.identity.authority import Authority, new_key, new_signing_key, public_key, request
from hanse.identity.certificates import Credentials, Identity, Role
from hanse.identity.signatures import Signer
from hanse.jobs.archive import open_manifest, pack, unpack
from hanse.jobs.bundle import MODEL
from hanse.jobs.recipe import Recipe
from hanse.messages.codec import decode_task, encode_update
from hanse.messages.task import TaskId
from hanse.messages.wire import (
    INLINE_BYTES,
    Assignment,
    Delivery,
    End,
    FromServer,
    Hello,
    Offer,
    OfferReply,
    Payload,
    Received,
    Resources,
    TaskRef,
)
from hanse.server.service import FederationServer, Settings
from hanse.site.runner import SiteRunner
from hanse.transport.blobs import FolderBlobs
from hanse.transport.grpc import Client, Server, serve

FEDERATION = "test"
ORGANISATION = "lab"


@dataclass(frozen=True)
class Identities:
    """A root, the server's authority, and everybody's credentials."""

    root: Authority
    authority: Authority

    def of(self, role: Role, name: str, organisation: str = ORGANISATION) -> Credentials:
        key = new_key()
        addresses = ("localhost",) if role is Role.SERVER else ()
        chain = self.authority.issue(Identity(FEDERATION, role, name, organisation), request(key), days=1, addresses=addresses)
        return Credentials(key, chain, self.root.roots)

    def signer(self, role: Role, name: str, organisation: str = ORGANISATION) -> Signer:
        key = new_signing_key()
        return Signer(key, self.root.issue(Identity(FEDERATION, role, name, organisation), public_key(key), days=1))


@pytest.fixture(scope="session")
def identities() -> Identities:
    root = Authority.new_root(FEDERATION)
    return Identities(root, root.intermediate("server", 30))


Hook = Callable[["SmallSite", Assignment], Awaitable[bool]]


async def _do_it(site: SmallSite, assignment: Assignment) -> bool:
    return True


@dataclass(eq=False)
class SmallSite:
    """A site that does what it is asked, in this process, without a policy. `hook` is awaited before each task; False: leave it be.

    performed: each task as often as it ran. heard: all messages. refusal: what it answers to offers.
    """

    client: Client
    name: str
    recipe: Recipe
    folder: Path
    hook: Hook = _do_it
    refusal: Failure | None = None
    resources: Resources = field(default_factory=lambda: Resources(cores=4))
    performed: list[TaskRef] = field(default_factory=list)
    heard: list[FromServer] = field(default_factory=list)
    offers: dict[str, Offer] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    unacknowledged: dict[TaskRef, Delivery] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    stream: Any = None

    def __post_init__(self) -> None:
        self.blobs = FolderBlobs(self.folder / "blobs")
        self.runner = SiteRunner(self.recipe.sites_run(), filters=self.recipe.filters, framework=self.recipe.first_model()[1])
        self.states: dict[TaskRef, dict[str, Any]] = {}

    async def run(self) -> None:
        """Be connected until the server ends it, or this is cancelled."""
        self.stream = await self.client.control()
        await self.stream.send(Hello(version="1", resources=self.resources, accepted=sorted(self.offers)))
        async with asyncio.TaskGroup() as group:
            async for message in self.stream:
                self.heard.append(message)
                match message:
                    case Offer(job=job):
                        if self.refusal is None:
                            self.offers[job] = message
                        await self.stream.send(OfferReply(job=job, refusal=self.refusal))
                    case Assignment():
                        group.create_task(self._perform(message))
                    case Received(task=task):
                        self.unacknowledged.pop(task, None)
                    case End(job=job, status=status):
                        self.offers.pop(job, None)
                        self.ended[job] = status
                self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what this site has heard makes it true."""
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def _perform(self, assignment: Assignment) -> None:
        if not await self.hook(self, assignment):
            return
        if assignment.task not in self.unacknowledged:
            self.unacknowledged[assignment.task] = await self.delivery(assignment)
        await self.stream.send(self.unacknowledged[assignment.task])

    async def delivery(self, assignment: Assignment) -> Delivery:
        """The task's update, uploaded if it is large."""
        offer, ref, payload = self.offers[assignment.job], assignment.task, assignment.payload
        await self._check_archive(offer)
        self.performed.append(ref)
        if payload.inline is not None:
            frame: Any = payload.inline
        else:
            assert payload.blob is not None
            await self.client.download(payload.blob, self.blobs)
            frame = self.blobs.map(payload.blob)
        earlier = [task for task in self.states if task < ref]
        state = self.states[ref] = dict(self.states[max(earlier)]) if earlier else {}
        manifest, _ = open_manifest(offer.manifest, offer.signature, self.client._credentials.roots)
        config = {**self.recipe.config, **manifest.site_config.get(self.name, {})}
        info = SiteInfo(self.name, offer.rank, offer.sites, self.recipe.name, self.recipe.seed, config)
        update = self.runner.run(info, decode_task(frame), TaskId(self.recipe.name, ref.commit, ref.index, self.name), state)
        parts = encode_update(update)
        if sum(memoryview(part).nbytes for part in parts) <= INLINE_BYTES:
            return Delivery(job=assignment.job, task=ref, payload=Payload(inline=b"".join(parts)))
        blob = self.blobs.write(parts)
        view = self.blobs.map(blob)
        await self.client.upload(blob, lambda offset, size: view[offset : offset + size])
        return Delivery(job=assignment.job, task=ref, payload=Payload(blob=blob))

    async def _check_archive(self, offer: Offer) -> None:
        folder = self.folder / offer.job
        if not folder.exists():
            manifest, _ = open_manifest(offer.manifest, offer.signature, self.client._credentials.roots)
            unpack(await self.client.download(offer.archive, self.blobs), manifest, folder, may_lack=[MODEL])
            assert not (folder / MODEL).exists()


@dataclass(eq=False)
class RealFederation:
    """A server on a port of this machine. `restart` ends it, as SIGTERM would, and starts a new one in its place."""

    identities: Identities
    settings: Settings
    folder: Path
    service: FederationServer = field(init=False)
    server: Server = field(init=False)
    port: int = 0
    clients: list[Client] = field(default_factory=list)
    tasks: dict[asyncio.Task[None], SmallSite] = field(default_factory=dict)
    credentials: dict[tuple[Role, str], Credentials] = field(default_factory=dict)

    async def start(self) -> None:
        mine = self.credentials.setdefault((Role.SERVER, "server"), self.identities.of(Role.SERVER, "server"))
        self.service = FederationServer(self.settings, mine, self.identities.authority)
        await self.service.start()
        self.server = await serve(self.service, mine, f"localhost:{self.port}")
        self.service.drop = self.server.drop
        self.port = self.server.port

    async def stop(self) -> None:
        await self.server.close()
        await self.service.close()

    def client(self, role: Role = Role.RESEARCHER, name: str = "ada", organisation: str = ORGANISATION) -> Client:
        mine = self.credentials.setdefault((role, name), self.identities.of(role, name, organisation))
        client = Client(f"localhost:{self.port}", mine)
        self.clients.append(client)
        return client

    async def site(self, name: str, recipe: Recipe, *, again: SmallSite | None = None, **settings: Any) -> SmallSite:
        """A connected site; `again`: one that was connected before, with all it knows."""
        client = self.client(Role.SITE, name)
        site = again or SmallSite(client, name, recipe, self.folder / "sites" / name, **settings)
        site.client = client
        site.heard.clear()
        self.tasks[asyncio.create_task(self._run(site))] = site
        await site.until(lambda: bool(site.heard))
        return site

    async def _run(self, site: SmallSite) -> None:
        with contextlib.suppress(HanseError):
            try:
                await site.run()
            except* HanseError as group:
                raise group.exceptions[0] from None

    async def disconnect(self, site: SmallSite) -> None:
        for task, of in list(self.tasks.items()):
            if of is site:
                task.cancel()
                await asyncio.wait([task])
                del self.tasks[task]
        await site.client.close()

    async def submit(self, recipe: Recipe, *, name: str = "ada", role: Role = Role.RESEARCHER, **placement: Any) -> dict[str, Any]:
        """What the server says to the submission."""
        number = len(list(self.folder.glob("exported-*")))
        job, archive = self.folder / f"exported-{number}", self.folder / f"job-{number}.zip"
        recipe.export(job)
        manifest, signature = pack(job, archive, signer=self.identities.signer(role, name), **placement)
        client = self.client(role, name)
        blobs = FolderBlobs(self.folder / "archives")
        blob = blobs.add_file(archive)
        view = blobs.map(blob)
        await client.upload(blob, lambda offset, size: view[offset : offset + size])
        answer = await client.call(
            "submit",
            manifest=base64.b64encode(manifest).decode(),
            signature=base64.b64encode(signature).decode(),
            archive=[blob.hex, blob.size],
        )
        return dict(answer)

    async def finished(self, job: str) -> dict[str, Any]:
        """Follow the job to its end; what is known of it then."""
        client = self.client()
        async with asyncio.timeout(60):
            async for _ in client.follow("logs", job=job, follow=True):
                pass
        return dict(await client.call("job", job=job))

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)
        for client in self.clients:
            await client.close()
        await self.stop()


Federates = Callable[..., contextlib.AbstractAsyncContextManager[RealFederation]]


@pytest.fixture
def real_federation(identities: Identities, tmp_path: Path) -> Federates:
    """Enter it to have a server; arguments are those of `Settings`."""

    @asynccontextmanager
    async def enter(**settings: Any) -> AsyncIterator[RealFederation]:
        about = Settings(**{"state": tmp_path / "state", "address": "localhost:0", "sandbox": "preferred", **settings})
        federation = RealFederation(identities, about, tmp_path)
        await federation.start()
        try:
            yield federation
        finally:
            await federation.close()

    return enter


@pytest.fixture
async def postgres(postgres_server: str) -> str:
    """The URL of a new database in a real PostgreSQL."""
    name = f"test_{os.urandom(6).hex()}"
    engine = create_async_engine(sa.make_url(postgres_server).set(drivername="postgresql+asyncpg"), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(sa.text(f"CREATE DATABASE {name}"))
    await engine.dispose()
    return postgres_server.replace("/postgres?", f"/{name}?")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a real PostgreSQL, on a Unix socket in a folder of its own."""
    found = shutil.which("initdb") or next(iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), reverse=True)), None)
    if found is None:
        pytest.skip("PostgreSQL's initdb is neither in PATH nor in /usr/lib/postgresql")
    binaries = Path(found).parent
    as_user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
    folder = Path("/tmp") / f"hanse-postgres-{os.getpid()}"  # short, for the socket's path, and within nobody's reach
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    data, log = folder / "data", folder / "log"

    def run(*command: str | Path) -> None:
        done = subprocess.run([*as_user, *map(str, command)], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    try:
        run(binaries / "initdb", "-D", data, "-U", "hanse", "-A", "trust", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=on -c max_connections=30"
        run(binaries / "pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start")
        try:
            yield f"postgresql://hanse@/postgres?host={folder}"
        finally:
            run(binaries / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer  # which takes long to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a place in a bucket of its own; the environment says how to get there."""
    import boto3

    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    name = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    return f"s3://{name}/hanse"
