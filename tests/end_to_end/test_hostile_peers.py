"""Hostile peers against a real server and real agents, over real TLS: each is told why, each is in the log, and nothing changes by it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import sqlite3
import sys
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar

import grpc
import msgspec
import numpy as np
import pytest
import pytest_asyncio
from blake3 import blake3

from hanse import FedAvgRecipe, FLModel, SimEnv
from hanse.aggregation.mean import WeightedMean
from hanse.environments.federation import Placement, connected, submit
from hanse.environments.local import HOST, ORGANISATION, LocalFederation, local_federation, local_project
from hanse.errors import ConfigError, Failure, HanseError, IdentityError, LinkBroken, Refused, WireError
from hanse.identity.authority import Authority, new_key, new_signing_key, public_key, request
from hanse.identity.certificates import Credentials, Identity, Role
from hanse.identity.kit import CREDENTIALS, Kit, read_kit, write_kit
from hanse.identity.signatures import Signer
from hanse.identity.tokens import new_token, read_token
from hanse.jobs.archive import pack, trimmed
from hanse.jobs.bundle import MODEL
from hanse.messages.codec import decode_update, encode_task, encode_update
from hanse.messages.task import Task, TaskId
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
    Left,
    Offer,
    OfferReply,
    Output,
    Payload,
    Received,
    Request,
    TaskRef,
    Welcome,
    Withdraw,
    encode_message,
)
from hanse.provision.kits import provision
from hanse.server.run import Run
from hanse.site.ledger import read as read_ledger
from hanse.site.ledger import verify
from hanse.transport.blobs import FolderBlobs, Incoming, open_file
from hanse.transport.calls import SERVICE, Position
from hanse.transport.client import Client, ControlStream
from hanse.transport.grpc import Peer, serve

pytestmark = pytest.mark.asyncio(loop_scope="module")

WITHIN_S = 60.0
FEDERATION = "poc"
CODE = """
from hanse import App, FLModel

app = App()


@app.train
def train(model, site):
    if site.name == "mallory":
        raise ValueError("it has nothing good to say")
    w = model.params["w"] + site.rng.normal(size=4) * (1 + site.rank)
    return FLModel({"w": w.astype("f4")}, metrics={"loss": float(w[0])}, meta={"examples": 10 + site.rank})
"""
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------------------- the honest ones


@dataclass(frozen=True)
class Job:
    """A job folder, and how the job ends undisturbed."""

    folder: Path
    undisturbed: Run


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Job]:
    """`honest`, for north and south; `lies`, also for mallory, who fails in each round of the undisturbed run."""
    folder = tmp_path_factory.mktemp("jobs")
    path = folder / "training.py"
    path.write_text(CODE)
    spec = spec_from_file_location("hostile_training", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    made = {}
    for name, rounds, sites in (("honest", 5, ["north", "south"]), ("lies", len(LIES), ["mallory", "north", "south"])):
        recipe = FedAvgRecipe(
            name=name,
            app=module.app,
            model={"w": np.zeros(4, "f4")},
            rounds=rounds,
            min_updates=2,
            aggregator=WeightedMean(by="examples"),  # else the first site says what all are weighed by
        )
        undisturbed = recipe.execute(SimEnv(sites=sites, workers=1, runs=folder / "runs", console="quiet"))
        made[name] = Job(recipe.export(folder / name), undisturbed)
    return made


@dataclass(frozen=True)
class World:
    """The server and the agents of north and south as processes, and the keys to make anybody up."""

    running: LocalFederation
    root: Authority
    enrolling: Authority
    address: str

    @property
    def state(self) -> Path:
        return self.running.folder / "server" / "state"

    def credentials(
        self, role: Role, name: str, *, by: Authority | None = None, federation: str = FEDERATION, **issued: Any
    ) -> Credentials:
        key = new_key()
        identity = Identity(federation, role, name, ORGANISATION)
        return Credentials(key, (by or self.enrolling).issue(identity, request(key), **{"days": 1.0, **issued}), self.root.roots)

    @asynccontextmanager
    async def client(self, who: Credentials) -> AsyncIterator[Client]:
        client = Client(self.address, who)
        try:
            yield client
        finally:
            await client.close()

    @asynccontextmanager
    async def person(self, role: Role, name: str) -> AsyncIterator[Client]:
        async with self.client(self.credentials(role, name)) as client:
            yield client

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[tuple[Client, Kit]]:
        kit = read_kit(self.running.admin_kit)
        async with connected(kit) as client:
            yield client, kit

    def log(self, name: str = "poc-server") -> str:
        return (self.running.folder / "logs" / f"{name}.log").read_text()

    def kept(self) -> dict[str, Any]:
        """All that the server keeps: its tables (but when it last saw a site), jobs' folders and whole blobs."""
        with contextlib.closing(sqlite3.connect(f"file:{self.state / 'server.sqlite'}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            tables = [row["name"] for row in database.execute("select name from sqlite_master where type = 'table'")]
            rows = {table: [{**row, "seen": 0} for row in database.execute(f"select * from {table}")] for table in tables}
        jobs = sorted(str(path.relative_to(self.state)) for path in (self.state / "jobs").glob("*/*"))
        return {**rows, "files": jobs, "blobs": sorted(path.name for path in (self.state / "blobs").glob("??/*"))}

    @contextlib.contextmanager
    def unchanged(self, logged: str = "") -> Iterator[None]:
        """Nothing that the server keeps changes meanwhile, and its log says so much (a pattern, over lines)."""
        kept, begin = self.kept(), len(self.log())
        yield
        assert self.kept() == kept
        said = self.log()[begin:]
        assert re.search(logged, said, re.DOTALL), said
        assert "Traceback" not in said

    async def run(self, job: Job, sites: Sequence[str]) -> Run:
        """Submit the job and follow it to its end."""
        async with self.admin() as (client, kit):
            submitted = await submit(client, kit, job.folder, Placement(sites=sites))
            async with asyncio.timeout(WITHIN_S):
                async for _ in client.follow("logs", job=submitted.job, follow=True):
                    pass
            assert (await client.call("job", job=submitted.job))["status"] == "completed"
        return Run(self.state / "jobs" / submitted.job)


def check_same(run: Run, job: Job) -> None:
    """The run has the bits of the undisturbed one."""
    model, undisturbed = run.get_result().params["w"], job.undisturbed.get_result().params["w"]
    assert np.asarray(model).tobytes() == np.asarray(undisturbed).tobytes()
    assert run.metrics == job.undisturbed.metrics


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory, jobs: object) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("hostile")
    with contextlib.closing(await asyncio.start_server(lambda reader, writer: None, HOST, 0)) as probe:
        port = probe.sockets[0].getsockname()[1]
    provision(local_project(["north", "south"], port), folder)
    kit = read_kit(folder / "server")
    write_kit(kit.folder, msgspec.structs.replace(kit, sandbox="preferred"))
    async with local_federation(folder, ["north", "south"]) as running:
        kit = read_kit(folder / "server")
        world = World(running, Authority.load(folder / "authority"), kit.authority(), kit.server)
        async with mallory_in(world):  # from now on the server knows that site
            pass
        yield world


@dataclass(eq=False)
class Mallory:
    """A site of the federation, with a true certificate and no good intentions. answer: what it sends for an assignment."""

    client: Client
    stream: ControlStream
    answer: Callable[[Mallory, Assignment], Any]
    heard: asyncio.Queue[FromServer | HanseError] = field(default_factory=asyncio.Queue)

    async def listen(self) -> None:
        try:
            async for message in self.stream:
                if isinstance(message, Offer):
                    await self.stream.send(OfferReply(job=message.job))
                elif isinstance(message, Assignment):
                    await self.answer(self, message)
                self.heard.put_nowait(message)
        except HanseError as error:
            self.heard.put_nowait(error)

    async def expect(self, kind: type[T]) -> T:
        """The next of that kind that it hears; an error is what ended its stream."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                message = await self.heard.get()
                if isinstance(message, kind):
                    return message
                assert not isinstance(message, HanseError), message


async def say_hello(client: Client) -> FromServer:
    """What the server first says to that."""
    stream = await client.control()
    await stream.send(Hello(version="1"))
    return await anext(aiter(stream))


async def say_nothing(mallory: Mallory, assignment: Assignment) -> None:
    pass


@asynccontextmanager
async def mallory_in(world: World, answer: Any = say_nothing, who: Credentials | None = None) -> AsyncIterator[Mallory]:
    async with world.client(who or world.credentials(Role.SITE, "mallory")) as client:
        stream = await client.control()
        await stream.send(Hello(version="1"))
        mallory = Mallory(client, stream, answer)
        listening = asyncio.create_task(mallory.listen())
        await mallory.expect(Welcome)
        yield mallory
        listening.cancel()


# ----------------------------------------------------------------------------------------------------------------------- who gets in


async def test_who_has_no_certificate_of_this_authority_does_not_get_in(world: World) -> None:
    stranger = Authority.new_root(FEDERATION)
    cases = {
        "another authority": world.credentials(Role.SITE, "north", by=stranger),
        "expired": world.credentials(Role.SITE, "north", days=-1 / 1440),
    }
    with world.unchanged("Handshake failed.*get local issuer.*Handshake failed.*has expired.*Handshake failed.*WRONG_VERSION"):
        for case, who in cases.items():
            async with world.client(who) as client:
                with pytest.raises(LinkBroken) as caught:
                    await client.call("jobs")
                assert ("own certificate expired" in caught.value.hint) == (case == "expired")
                with pytest.raises(LinkBroken):
                    await say_hello(client)
        for channel in (
            grpc.aio.secure_channel(world.address, grpc.ssl_channel_credentials(world.root.roots)),
            grpc.aio.insecure_channel(world.address),
        ):
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary(f"/{SERVICE}/Call")(encode_message(Request(name="jobs")))


async def test_a_certificate_is_good_for_its_own_federation_and_role(world: World) -> None:
    with world.unchanged("researcher 'rita'.*is of the federation 'other'"):
        async with world.client(world.credentials(Role.RESEARCHER, "rita", by=world.root, federation="other")) as client:
            with pytest.raises(IdentityError, match="federation"):
                await client.call("jobs")
    with world.unchanged("server 'poc-server'.*may not call"):
        async with world.client(world.credentials(Role.SERVER, "poc-server", by=world.root)) as client:
            with pytest.raises(Refused, match="may not call"):
                await client.call("jobs")


async def insist(client: Client) -> None:
    """Say Hello until there is a reason why not: gRPC loses it where the server ends the call while the Hello is still on its way."""
    for _ in range(50):
        with contextlib.suppress(LinkBroken):
            await say_hello(client)


async def test_a_person_opens_no_control_stream(world: World) -> None:
    with world.unchanged("researcher 'rita'.*may not call 'Control'"):
        async with world.person(Role.RESEARCHER, "rita") as client:
            with pytest.raises(Refused, match="it is for site"):
                await insist(client)


WRONG_ROLES = {
    Role.SITE: ("submit", "abort", "resume", "result", "jobs", "job", "sites", "site", "disable", "enable", "revoke", "token", "enrol"),
    Role.AUDITOR: ("submit", "abort", "resume", "result", "disable", "enable", "revoke", "token", "enrol"),
    Role.RESEARCHER: ("disable", "enable", "revoke", "token", "enrol"),
    Role.ORG_ADMIN: ("revoke", "enrol"),
    Role.JOINING: ("submit", "jobs", "sites", "revoke", "token", "renew"),
}


@pytest.mark.parametrize("role", WRONG_ROLES)
async def test_calls_of_other_roles_are_refused(world: World, role: Role) -> None:
    async with world.person(role, "mallory") as client:
        for name in WRONG_ROLES[role]:
            with world.unchanged(f"{role} 'mallory'.*, {name}: .*may not call '{name}'"), pytest.raises(Refused, match="may not call"):
                await client.call(name, job="honest-0001", site="north", name="north")
        if Role.SITE is not role is not Role.JOINING:
            return
        with world.unchanged(f"{role} 'mallory'.*may not call 'logs'"), pytest.raises(Refused):
            await anext(client.follow("logs", job="honest-0001"))


async def test_an_org_admin_speaks_for_no_other_organisation(world: World) -> None:
    who = Identity(FEDERATION, Role.ORG_ADMIN, "olga", "elsewhere")
    key = new_key()
    olga = Credentials(key, world.enrolling.issue(who, request(key), days=1), world.root.roots)
    async with world.client(olga) as client:
        for name, arguments in {
            "disable": {"site": "north"},
            "token": {"site": "north", "organisation": ORGANISATION, "hours": 1.0},
        }.items():
            with world.unchanged(f"olga.*{name}: .*its own organisation only"), pytest.raises(Refused):
                await client.call(name, **arguments)


async def test_a_token_is_good_once_and_for_nothing_else(world: World) -> None:
    text = new_token(world.enrolling, site="newcomer", organisation=ORGANISATION, federation=FEDERATION, address=world.address, hours=1)
    token = read_token(text)
    async with world.client(token.credentials) as client:
        with world.unchanged("joining 'newcomer'.*may not call"), pytest.raises(Refused):
            await client.call("sites")
        with world.unchanged("joining 'newcomer'.*neither a public key"), pytest.raises(IdentityError):
            await client.call("enrol", csr="nothing of the kind")
        await client.call("enrol", csr=request(new_key()).decode())
        with (
            world.unchanged("joining 'newcomer'.*enrol: this join token was used before"),
            pytest.raises(IdentityError, match="used before"),
        ):
            await client.call("enrol", csr=request(new_key()).decode())


async def test_a_revoked_site_is_out_at_once(world: World) -> None:
    who = world.credentials(Role.SITE, "revoked")
    async with mallory_in(world, who=who) as gone, world.admin() as (client, _):
        await client.call("revoke", name="revoked")
        assert "not accepted any more" in str(await gone.expect(IdentityError))
    with world.unchanged("site 'revoked'.*are revoked"):
        async with world.client(who) as client:
            with pytest.raises(IdentityError, match="revoked"):
                await say_hello(client)
            with pytest.raises(IdentityError, match="revoked"):
                await client.call("renew", csr=request(new_key()).decode())


# ---------------------------------------------------------------------------------------------------------------- malformed messages

MALFORMED = {
    "noise": bytes(range(256)),
    "nothing": b"",
    "another type": encode_message(Welcome(version="1")),
    "an unknown field": msgspec.msgpack.encode({"type": "Hello", "version": "1", "admin": True}),
    "nested deep": b"\x91" * 100_000,
    "a length that lies": b"\xdd\xff\xff\xff\xff",
    "a name with a slash": msgspec.msgpack.encode({"type": "OfferReply", "job": "../../etc"}),
    "a task before nothing": msgspec.msgpack.encode({"type": "Delivery", "job": "a", "task": [-1, 0], "payload": {"inline": b""}}),
}


@asynccontextmanager
async def raw(world: World, role: Role = Role.SITE) -> AsyncIterator[grpc.aio.Channel]:
    """A bare channel with a true certificate, which sends whatever it is told."""
    who = world.credentials(role, "mallory")
    tls = grpc.ssl_channel_credentials(who.roots, who.key, who.certificate)
    async with grpc.aio.secure_channel(world.address, tls, options=[("grpc.max_send_message_length", -1)]) as channel:
        yield channel


async def status_of(stream: Any, *pieces: bytes) -> grpc.StatusCode:
    """How the server ends a stream that sends these."""
    with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
        for piece in pieces:
            await stream.write(piece)
        await stream.done_writing()
        while await stream.read() is not grpc.aio.EOF:
            pass
    async with asyncio.timeout(WITHIN_S):
        return await stream.code()


@pytest.mark.parametrize("what", MALFORMED)
async def test_malformed_messages_end_their_call(world: World, what: str) -> None:
    data = MALFORMED[what]
    async with raw(world) as channel:
        for method in ("Control", "Upload"):
            with world.unchanged("site 'mallory' of 'poc' at .*: at byte 0: "):
                assert await status_of(channel.stream_stream(f"/{SERVICE}/{method}")(), data) is grpc.StatusCode.INVALID_ARGUMENT
        with world.unchanged("site 'mallory' of 'poc' at .*: at byte 0: "):
            second = await status_of(channel.stream_stream(f"/{SERVICE}/Control")(), encode_message(Hello(version="1")), data)
            assert second is grpc.StatusCode.INVALID_ARGUMENT
        for method in ("Call", "Follow", "Download"):
            call = channel.unary_unary if method == "Call" else channel.unary_stream
            with world.unchanged("site 'mallory' of 'poc' at .*: at byte 0: "):
                assert await call(f"/{SERVICE}/{method}")(data).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_oversized_messages_end_their_call(world: World) -> None:
    data = bytes(5 << 20)
    async with raw(world) as channel:
        for pieces in ([data], [encode_message(Hello(version="1")), data]):
            with world.unchanged("site 'mallory' of 'poc' at .*: a message of 5,242,880 bytes came"):
                assert await status_of(channel.stream_stream(f"/{SERVICE}/Control")(), *pieces) is grpc.StatusCode.INVALID_ARGUMENT
        with world.unchanged("site 'mallory' of 'poc' at .*: a message of 5,242,880 bytes came"):
            assert await channel.unary_unary(f"/{SERVICE}/Call")(data).code() is grpc.StatusCode.INVALID_ARGUMENT
        with world.unchanged():  # one that is far too long is not even let in
            assert await channel.unary_unary(f"/{SERVICE}/Call")(2 * data).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# -------------------------------------------------------------------------------------------------------------------------------- blobs


def named(data: bytes) -> Blob:
    return Blob(blake3(data).digest(), len(data))


async def test_blobs_that_are_not_what_they_say_are_thrown_away(world: World) -> None:
    data = os.urandom(300_000)
    blob = named(data)
    begin = encode_message(Position(blob))
    with world.unchanged("researcher 'mallory'.*their digest is another one"):
        async with world.person(Role.RESEARCHER, "mallory") as client:
            with pytest.raises(WireError, match="digest"):
                await client.upload(blob, lambda offset, size: bytes(size))
    assert list((world.state / "blobs" / "incoming").glob(f"{blob.hex}*")) == []
    async with raw(world, Role.RESEARCHER) as channel:
        with world.unchanged("researcher 'mallory'.*and more came"):
            assert await status_of(channel.stream_stream(f"/{SERVICE}/Upload")(), begin, data + b"!") is grpc.StatusCode.INVALID_ARGUMENT
        with world.unchanged("researcher 'mallory'.*has no bytes"):
            assert await status_of(channel.stream_stream(f"/{SERVICE}/Upload")(), begin, b"") is grpc.StatusCode.INVALID_ARGUMENT
        with world.unchanged("researcher 'mallory'.*the stream ended before all had come"):
            await status_of(channel.stream_stream(f"/{SERVICE}/Upload")(), begin, data[:1000])
        with world.unchanged("researcher 'mallory'.*no room|the disk has"):
            vast = encode_message(Position(Blob(blob.digest, 1 << 61)))
            assert await status_of(channel.stream_stream(f"/{SERVICE}/Upload")(), vast) is grpc.StatusCode.ABORTED


async def test_a_site_of_no_job_neither_sends_nor_gets_blobs(world: World) -> None:
    archive = next((world.state / "blobs").glob("??/*"), None)
    async with world.person(Role.SITE, "stranger") as client:
        with world.unchanged("site 'stranger'.*has nothing to send"), pytest.raises(Refused, match="nothing to send"):
            await client.upload(named(b"abc"), lambda offset, size: b"abc")
        blob = named(b"abc") if archive is None else Blob(bytes.fromhex(archive.name), archive.stat().st_size)
        with world.unchanged("site 'stranger'.*is not for site 'stranger'"), pytest.raises(Refused, match="not for"):
            await client.download(blob, FolderBlobs(world.running.folder / "stolen"))


# -------------------------------------------------------------------------------------------------------------------------- submissions


@dataclass(frozen=True)
class Bundle:
    manifest: bytes
    signature: bytes
    archive: bytes


def signer_of(authority: Authority, role: Role = Role.PROJECT_ADMIN, name: str = "poc-admin") -> Signer:
    key = new_signing_key()
    return Signer(key, authority.issue(Identity(FEDERATION, role, name, ORGANISATION), public_key(key), days=1))


async def submit_bundle(client: Client, bundle: Bundle) -> Any:
    blob = named(bundle.archive)
    await client.upload(blob, lambda offset, size: bundle.archive[offset : offset + size])
    texts = {name: base64.b64encode(getattr(bundle, name)).decode() for name in ("manifest", "signature")}
    return await client.call("submit", **texts, archive=[blob.hex, blob.size])


def rewritten(data: bytes, signer: Signer, **changes: Any) -> tuple[bytes, bytes]:
    """The manifest with other values, signed."""
    manifest = json.dumps({**json.loads(data), **changes}).encode()
    return manifest, signer.sign(manifest)


def zipped(path: Path, add: Callable[[zipfile.ZipFile], None]) -> bytes:
    """The archive after `add`."""
    with zipfile.ZipFile(path, "a") as archive:
        add(archive)
    return path.read_bytes()


def bomb(name: str, says: int) -> bytes:
    """An archive of one file that says it has so many bytes, and unpacks to 64 MiB."""
    path = Path(name)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("job.yaml", bytes(64 << 20))
    data = path.read_bytes()
    return data.replace((64 << 20).to_bytes(4, "little"), says.to_bytes(4, "little"))


async def test_a_submission_that_is_not_in_order_is_refused(world: World, jobs: Mapping[str, Job], tmp_path: Path) -> None:
    kit = read_kit(world.running.admin_kit)
    good = kit.signer()
    path = tmp_path / "archive"
    manifest, signature = pack(jobs["honest"].folder, path, signer=good, sites=["north", "south"])
    archive = path.read_bytes()
    connection = kit.credentials()
    digests = json.loads(manifest)["digests"]
    altered = manifest.replace(b'"rounds":5', b'"rounds":6')
    assert altered != manifest

    def escape(zip: zipfile.ZipFile) -> None:
        zip.writestr("../../evil.py", "")

    def link(zip: zipfile.ZipFile) -> None:
        entry = zipfile.ZipInfo("code")
        entry.external_attr = 0o120777 << 16
        zip.writestr(entry, "/etc")

    def bundle(signer: Signer = good, archive: bytes = archive, **changes: Any) -> Bundle:
        return Bundle(*rewritten(manifest, signer, **changes), archive)

    def copy(add: Callable[[zipfile.ZipFile], None]) -> bytes:
        target = tmp_path / "copy"
        target.write_bytes(archive)
        return zipped(target, add)

    evil = {name: {**digests, name: next(iter(digests.values()))} for name in ("../evil.py", "/etc/passwd", "a/../../b", "con\0", "a\\b")}
    cases: list[tuple[Bundle, type[HanseError], str]] = [
        (Bundle(altered, signature, archive), IdentityError, "was altered"),
        (Bundle(manifest, signature[:-1], archive), IdentityError, "no signature"),
        (Bundle(manifest, b"", archive), IdentityError, "no signature"),
        (bundle(signer_of(Authority.new_root(FEDERATION))), IdentityError, "does not lead to this federation"),
        (bundle(signer_of(world.root, Role.SITE, "north")), IdentityError, "'north' has signed it"),
        (bundle(signer_of(world.root, Role.RESEARCHER, "rita")), IdentityError, "'rita' has signed it"),
        (Bundle(b"{}", good.sign(b"{}"), archive), WireError, "no manifest"),
        (Bundle(b"\x80\xff", good.sign(b"\x80\xff"), archive), WireError, "no manifest"),
        (
            bundle(signer_of(world.root, Role.RESEARCHER, "rita"), submitter="rita"),
            IdentityError,
            "that researcher 'rita' of 'poc' has signed",
        ),
        (bundle(signer_of(world.root, Role.SITE, "poc-admin")), IdentityError, "that site 'poc-admin' of 'poc' has signed"),
        (bundle(format=99), ConfigError, "format 99"),
        (bundle(name="../../evil"), WireError, "name"),
        (bundle(name=".."), HanseError, "."),
        (bundle(sites=["nobody"]), Refused, "not in this federation"),
        (bundle(sites=["../north"]), WireError, "sites"),
        (bundle(min_sites=99), Refused, "99 sites"),
        (bundle(archive=copy(escape)), WireError, "not in the manifest"),
        (bundle(archive=copy(link)), WireError, "not in the manifest"),
        (bundle(archive=archive[: len(archive) // 2]), WireError, "cannot be read"),
        (bundle(archive=b""), WireError, "cannot be read"),
        (bundle(archive=bomb(str(tmp_path / "bomb"), 100), digests={"job.yaml": ["0" * 64, 100]}), WireError, "job.yaml"),
        *((bundle(digests=names), HanseError, ".") for names in evil.values()),
    ]
    async with world.admin() as (client, _):
        for hostile, kind, words in cases:
            before, begin = world.kept(), len(world.log())
            with pytest.raises(kind, match=words):
                await submit_bundle(client, hostile)
            after = world.kept()
            before.pop("blobs"), after.pop("blobs")  # an archive that came to nothing is deleted after a day
            assert after == before
            assert re.search(r"project-admin 'poc-admin'.*, submit: ", world.log()[begin:])
        with pytest.raises(IdentityError, match="not an Ed25519 key"):
            Signer(connection.key, connection.certificate).sign(manifest)
        forged = Signer(good.key, connection.certificate).sign(manifest)
        with pytest.raises(IdentityError, match=r"not for|codeSigning|may not"):
            await submit_bundle(client, Bundle(manifest, forged, archive))
    assert not list(world.running.folder.rglob("evil*"))


# ------------------------------------------------------------------------------------------------------------------- updates that lie


def update_of(assignment: Assignment, *, site: str = "mallory", job: str = "lies", index: int = 0, **model: Any) -> bytes:
    """An update of this task, in form; `model` says what is wrong with it."""
    fields = {"params": {"w": np.ones(4, "f4")}, "meta": {"examples": 1000}, **model}
    task_id = TaskId(job, assignment.task.commit, assignment.task.index + index, site)
    return b"".join(encode_update(Update(site, task_id, FLModel(**fields))))


def lie(**model: Any) -> Callable[[Assignment], bytes]:
    return lambda assignment: update_of(assignment, **model)


def task_frame(assignment: Assignment) -> bytes:
    assert assignment.payload.inline is not None
    return assignment.payload.inline


# What mallory sends, one a round, and what the failure of that round says.
LIES: list[tuple[Callable[[Assignment], bytes | Blob], str]] = [
    (lie(params={"w": np.array([1, np.nan, 1, 1], "f4")}), "not finite|NaN"),
    (lie(params={"w": np.array([1, np.inf, 1, 1], "f4")}), "not finite|inf"),
    (lie(params={"w": np.ones(5, "f4")}), "shape"),
    (lie(params={"w": np.ones((2, 2), "f4")}), "shape"),
    (lie(params={"w": np.ones(0, "f4")}), "shape"),
    (lie(params={"w": np.ones(4, "c8")}), "dtype|complex"),
    (lie(params={"w": np.ones(4, "i8")}), "dtype|int64"),
    (lie(params={"v": np.ones(4, "f4")}), "'v'|'w'"),
    (lie(params={"w": np.ones(4, "f4"), "../../etc/passwd": np.ones(4, "f4")}), "passwd"),
    (lie(params={}), "'w'|no "),
    (lie(params={"w": {"w": np.ones(4, "f4")}}), "w"),
    (lie(meta={"examples": -5}), "weight|examples"),
    (lie(meta={"examples": float("nan")}), "weight|examples"),
    (lie(meta={"examples": 1e308}), "weight|examples|finite"),
    (lie(meta={}), "its meta has no 'examples'"),
    (lie(site="north"), "this is the update of 'north'"),
    (lie(index=1), "and not for"),
    (lie(job="honest"), "and not for"),
    (lambda assignment: b"", "WireError|frame|byte"),
    (lambda assignment: os.urandom(1000), "WireError|frame|byte"),
    (lambda assignment: update_of(assignment)[:-3], "WireError|frame|byte"),
    (lambda assignment: update_of(assignment) + b"more", "WireError|frame|byte"),
    (task_frame, "WireError|task|update"),
    (lambda assignment: named(b"never sent"), "not here"),
    (lambda assignment: Blob(bytes(32), 1 << 60), "not here"),
]


async def test_a_site_that_lies_changes_nothing_for_the_others(world: World, jobs: Mapping[str, Job]) -> None:
    async def answer(mallory: Mallory, assignment: Assignment) -> None:
        said = LIES[assignment.task.commit][0](assignment)
        payload = Payload(blob=said) if isinstance(said, Blob) else Payload(inline=said)
        await mallory.stream.send(Delivery(job=assignment.job, task=assignment.task, payload=payload))

    begin = len(world.log())
    async with mallory_in(world, answer) as mallory:
        run = await world.run(jobs["lies"], ["mallory", "north", "south"])
        await mallory.expect(End)
    check_same(run, jobs["lies"])
    failures = {event["round"]: f"{event['site']} {event['code']}: {event['message']}" for event in run.events("failure")}
    assert sorted(failures) == list(range(len(LIES)))
    for number, (_, words) in enumerate(LIES):
        assert re.search(f"^mallory .*({words})", failures[number]), (number, failures[number])
    said = world.log()[begin:]
    assert len(re.findall("the update of site 'mallory' for task .* is refused", said)) == len(LIES) - 15
    assert "Traceback" not in said


async def test_what_is_not_mallorys_to_send_ends_its_stream(world: World, jobs: Mapping[str, Job]) -> None:
    """While a job of north and south runs: deliveries for it, lines of output, and a Left."""
    task = TaskRef(0, 0)

    async def disturb(job: str) -> None:
        assignment = Assignment(job=job, task=task, payload=Payload(inline=b""))
        for message in (
            Delivery(job=job, task=task, payload=Payload(inline=update_of(assignment, site="north", job="honest"))),
            Output(job=job, lines=["all is lost"]),
            Left(job=job, why=Failure("Gone", "north is gone")),
            OfferReply(job=job),
        ):
            async with mallory_in(world) as mallory:
                await mallory.stream.send(message)
                assert "is not for site 'mallory'" in str(await mallory.expect(Refused))

    begin = len(world.log())
    async with world.admin() as (client, kit):
        submitted = await submit(client, kit, jobs["honest"].folder, Placement(sites=["north", "south"]))
        await disturb(submitted.job)
        async with asyncio.timeout(WITHIN_S):
            async for event in client.follow("logs", job=submitted.job, follow=True):
                assert event.get("line") != "all is lost"
    check_same(Run(world.state / "jobs" / submitted.job), jobs["honest"])
    assert len(re.findall("site 'mallory' of 'poc' at .* is not for site 'mallory'", world.log()[begin:])) == 4


async def test_replayed_updates_are_acknowledged_and_count_for_nothing(world: World, jobs: Mapping[str, Job]) -> None:
    """In each round mallory sends all it has ever sent once more, and updates of rounds to come."""
    sent: list[Delivery] = []

    async def answer(mallory: Mallory, assignment: Assignment) -> None:
        commit = assignment.task.commit
        for far in (commit + 2, commit + 1000, 1 << 61):
            ref = TaskRef(far, 0)
            frame = update_of(Assignment(job=assignment.job, task=ref, payload=assignment.payload))
            await mallory.stream.send(Delivery(job=assignment.job, task=ref, payload=Payload(inline=frame)))
        refusal = b"".join(encode_update(Update("mallory", TaskId("lies", assignment.task.commit, assignment.task.index, "mallory"),
                                                failure=Failure("No", "no"))))  # fmt: skip
        sent.append(Delivery(job=assignment.job, task=assignment.task, payload=Payload(inline=refusal)))
        for delivery in sent:
            await mallory.stream.send(delivery)

    async with mallory_in(world, answer) as mallory:
        run = await world.run(jobs["lies"], ["mallory", "north", "south"])
        await mallory.expect(End)
        with world.unchanged():  # the job is over
            await mallory.stream.send(sent[0])
            assert await mallory.expect(Received) == Received(job=sent[0].job, task=sent[0].task)
    check_same(run, jobs["lies"])
    with contextlib.closing(sqlite3.connect(f"file:{world.state / 'server.sqlite'}?mode=ro", uri=True)) as database:
        assert database.execute("select count(*) from updates").fetchone() == (0,)


# ------------------------------------------------------------------------------------------------------------------------------ crowds


async def test_a_job_runs_through_a_thousand_connections_and_slow_streams(world: World, jobs: Mapping[str, Job]) -> None:
    port = int(world.address.rpartition(":")[2])
    begin = len(world.log())

    async def one_byte_at_a_time(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            for byte in b"\x16\x03\x01\x02\x00\x01" + os.urandom(500):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)

    async with raw(world) as channel, raw(world) as other:
        waiting = channel.stream_stream(f"/{SERVICE}/Control")()
        uploading = other.stream_stream(f"/{SERVICE}/Upload")()
        await asyncio.gather(waiting.wait_for_connection(), uploading.wait_for_connection())
        silent = [await asyncio.open_connection(HOST, port) for _ in range(1_000)]
        for _, writer in silent[:300]:
            writer.write(os.urandom(200))
        slow = [asyncio.create_task(one_byte_at_a_time(writer)) for _, writer in silent[300:320]]
        run = await world.run(jobs["honest"], ["north", "south"])
        check_same(run, jobs["honest"])
        async with asyncio.timeout(WITHIN_S):  # none of them is kept for longer than a handshake may take
            for reader, _ in silent:
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            assert await status_of(waiting) is grpc.StatusCode.PERMISSION_DENIED
            assert await status_of(uploading) is grpc.StatusCode.PERMISSION_DENIED
        for task in slow:
            task.cancel()
        for _, writer in silent:
            writer.transport.abort()
    said = world.log()[begin:]
    assert len(re.findall("site 'mallory' of 'poc' at .*: nothing came for 10 s: the stream is ended", said)) == 2


async def test_a_thousand_sites_at_once_are_served_and_a_job_completes(world: World, jobs: Mapping[str, Job]) -> None:
    """A thousand calls over a hundred connections of true peers, while a job runs."""
    run = asyncio.create_task(world.run(jobs["honest"], ["north", "south"]))
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(world.person(Role.AUDITOR, f"auditor-{number}")) for number in range(100)]
        answers = await asyncio.gather(*(client.call("jobs") for client in clients for _ in range(10)))
        assert all(isinstance(answer, list) for answer in answers)
        check_same(await run, jobs["honest"])


# --------------------------------------------------------------------------------------------------------------------- a hostile server


@dataclass(eq=False)
class HostileServer:
    """Says what the test says. blobs: what it gives for a blob, whatever that is."""

    folder: Path
    sending: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    arrived: asyncio.Queue[FromSite] = field(default_factory=asyncio.Queue)
    blobs: dict[Blob, bytes] = field(default_factory=dict)

    def admit(self, peer: Peer) -> None:
        pass

    async def control(self, peer: Peer, incoming: AsyncIterator[FromSite]) -> AsyncIterator[FromServer]:
        async def read() -> None:
            async for message in incoming:
                self.arrived.put_nowait(message)

        reading = asyncio.create_task(read())
        try:
            yield Welcome(version="1")
            while True:
                yield await self.sending.get()
        finally:
            reading.cancel()

    async def call(self, peer: Peer, request: Request) -> Any:
        raise Refused("no")

    async def follow(self, peer: Peer, request: Request) -> AsyncIterator[Any]:
        raise Refused("no")
        yield

    def open_blob(self, peer: Peer, blob: Blob) -> int:
        path = self.folder / blob.hex
        path.write_bytes(self.blobs[blob])
        return open_file(path)

    def incoming(self, peer: Peer, blob: Blob) -> Incoming:
        raise Refused("no")

    async def expect(self, kind: type[T]) -> T:
        async with asyncio.timeout(WITHIN_S):
            while not isinstance(message := await self.arrived.get(), kind):
                pass
        return message

    async def reply(self, offer: Offer) -> Failure | None:
        """What the site says to the offer."""
        self.sending.put_nowait(offer)
        return (await self.expect(OfferReply)).refusal

    async def update(self, job: str, frame: bytes | Blob, ref: TaskRef) -> Update:
        """The site's update for a task that is this frame."""
        payload = Payload(blob=frame) if isinstance(frame, Blob) else Payload(inline=frame)
        self.sending.put_nowait(Assignment(job=job, task=ref, payload=payload))
        delivery = await self.expect(Delivery)
        assert (delivery.job, delivery.task) == (job, ref)
        assert delivery.payload.inline is not None
        self.sending.put_nowait(Received(job=job, task=ref))
        return decode_update(delivery.payload.inline)


async def test_an_agent_goes_on_whatever_its_server_says(world: World, jobs: Mapping[str, Job], tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    server = HostileServer(blobs)
    listening = await serve(server, world.credentials(Role.SERVER, "poc-server", by=world.root, addresses=[HOST]), f"{HOST}:0")
    kit = Kit(
        federation=FEDERATION, role=Role.SITE, name="victim", organisation=ORGANISATION, server=f"{HOST}:{listening.port}",
        folder=tmp_path / "kit",
    )  # fmt: skip
    world.credentials(Role.SITE, "victim").save(kit.folder / CREDENTIALS)
    write_kit(kit.folder, kit)
    kit.policy_file.write_text("sandbox: 'off'\n")
    log = tmp_path / "agent.log"
    with log.open("wb") as errors:
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "hanse.environments.member", "site", str(kit.folder), str(os.getpid()),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
    try:
        assert agent.stdin is not None
        agent.stdin.write(b"begin\n")
        await server.expect(Hello)
        await _torment(server, world, jobs["honest"], tmp_path, log)
        assert agent.returncode is None
        assert verify(kit.state_folder / "audit.jsonl") > 10
        told = [line["why"] for line in read_ledger(kit.state_folder / "audit.jsonl") if line.get("decision") == "refused"]
        assert len(told) == 2  # those whose signature was good
    finally:
        agent.terminate()
        await agent.wait()
        await listening.close()
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    assert "Traceback" not in log.read_text()


async def _torment(server: HostileServer, world: World, job: Job, folder: Path, log: Path) -> None:
    good = signer_of(world.root)
    path, slim = folder / "archive", folder / "slim"
    manifest, signature = pack(job.folder, path, signer=good)
    trimmed(path, slim, {MODEL})
    archive = slim.read_bytes()

    seconds = iter(range(60))

    def offer(name: str, archive: bytes = archive, signed: tuple[bytes, bytes] | None = None, gives: bytes | None = None) -> Offer:
        """An offer that is in order, but for what is given. Each has a manifest of its own: a signed job runs once."""
        signed = signed or rewritten(manifest, good, created=f"2026-01-01T00:00:{next(seconds):02}Z")
        blob = named(archive)
        server.blobs[blob] = archive if gives is None else gives
        return Offer(job=name, manifest=signed[0], signature=signed[1], archive=blob, rank=0, sites=1)

    def copy(add: Callable[[zipfile.ZipFile], None]) -> bytes:
        (folder / "copy").write_bytes(archive)
        return zipped(folder / "copy", add)

    # offers that are refused
    connection = read_kit(world.running.folder / "sites" / "north").credentials()
    altered = manifest.replace(b'"rounds":5', b'"rounds":6')
    stranger = signer_of(Authority.new_root(FEDERATION))
    for refused, code, words in (
        (offer("a", signed=(altered, signature)), "IdentityError", "was altered"),
        (offer("a", signed=(manifest, b"nonsense")), "IdentityError", "no signature"),
        (offer("a", signed=rewritten(manifest, stranger)), "IdentityError", "does not lead to this federation"),
        (offer("a", signed=(manifest, Signer(good.key, connection.certificate).sign(manifest))), "IdentityError", ""),
        (offer("a", signed=(b"{}", good.sign(b"{}"))), "WireError", "no manifest"),
        (offer("a", signed=rewritten(manifest, good, sites=["north"])), "Refused", "not for 'victim'"),
        (offer("..evil"), "Refused", "no name for a folder"),
    ):
        refusal = await server.reply(refused)
        assert refusal is not None, words
        assert (refusal.code, bool(re.search(words, refusal.message))) == (code, True), refusal
        assert f"job {refused.job} is refused: {refusal.message}" in log.read_text()

    # archives that are not what the manifest says; the task comes back with why
    frame = b"".join(encode_task(Task("train", FLModel({"w": np.zeros(4, "f4")}))))
    for number, (hostile, words) in enumerate(
        (
            (offer("b-0", copy(lambda zip: zip.writestr("../../evil.py", ""))), "'../../evil.py' in the archive is not in the manifest"),
            (offer("b-1", copy(lambda zip: zip.writestr("/tmp/evil.py", ""))), "is not in the manifest"),
            (offer("b-2", archive[:-30]), "cannot be read"),
            (offer("b-3", archive + b"!", gives=archive + b"?"), "digest"),
            (offer("b-4", archive, gives=archive[:100]), "came|digest"),
            (
                offer("b-5", bomb(str(folder / "bomb"), 100), signed=rewritten(manifest, good, digests={"job.yaml": ["0" * 64, 100]})),
                "is not what the manifest says|cannot be read",
            ),
        )
    ):
        assert await server.reply(hostile) is None
        update = await server.update(f"b-{number}", frame, TaskRef(0, 0))
        assert update.failure is not None
        assert re.search(words, update.failure.message), (number, update.failure)
        assert update.failure.message in log.read_text()

    # tasks that are none
    assert await server.reply(offer("c")) is None
    garbage = os.urandom(INLINE_BYTES + 1)
    broken, lying = named(garbage), named(garbage + b"!")
    server.blobs |= {broken: garbage, lying: garbage + b"?"}
    no_task = b"".join(encode_update(Update("victim", TaskId("honest", 0, 0, "victim"))))
    for index, (task, words) in enumerate(
        ((b"", ""), (os.urandom(99), ""), (frame[:-5], ""), (no_task, ""), (broken, ""), (lying, "digest"))
    ):
        answer = await server.update("c", task, TaskRef(0, index))
        assert answer.failure is not None
        assert answer.failure.code == "WireError", answer.failure
        assert re.search(words, answer.failure.message), answer.failure

    # what it never heard of, and what is no message at all: it says so, and comes again
    for message in (
        End(job="unknown", status="completed"),
        Received(job="unknown", task=TaskRef(0, 0)),
        Received(job="c", task=TaskRef(7, 7), problem=Failure("No", "no")),
        Withdraw(job="unknown", tasks=[TaskRef(0, 0)]),
        Assignment(job="unknown", task=TaskRef(0, 0), payload=Payload(inline=frame)),
    ):
        server.sending.put_nowait(message)
    for noise in ([1, 2, 3], {"type": "Hello"}, b"x" * 1_000_000, Hello(version="1"), None):
        server.sending.put_nowait(noise)
        await server.expect(Hello)  # it ended the stream and came again
    said = log.read_text()
    for kind in ("Received", "Withdraw", "Assignment"):
        assert f"the server sent a {kind} of job unknown, which this site does not have" in said
    assert len(re.findall("this is no valid message", said)) == 5

    # an honest task is done all the same; done again, it has the same bits, and the next one does not notice
    first, again = [await server.update("c", frame, TaskRef(1, 0)) for _ in range(2)]
    assert first.failure is None
    assert again.model.params["w"].tobytes() == first.model.params["w"].tobytes()
    assert again.task_id == first.task_id
