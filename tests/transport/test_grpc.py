from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pump import Pump

from hanse.errors import ConfigError, Failure, HanseError, IdentityError, LinkBroken, PolicyRefused, Refused, StorageFull, WireError
from hanse.identity.authority import Authority, new_key, public_key
from hanse.identity.certificates import Credentials, Identity, Role
from hanse.messages.wire import Blob, FromServer, FromSite, Hello, Left, Request, Welcome, encode_message
from hanse.transport.blobs import FolderBlobs, Incoming, open_file
from hanse.transport.calls import MAX_MESSAGE_BYTES, SERVICE, Position
from hanse.transport.grpc import Client, Limits, Peer, Server, serve

MIB = 1 << 20
HERE = ("localhost", "127.0.0.1", "::1")
ROOT = Authority.new_root("north")
AUTHORITY = ROOT.intermediate("server", days=10)
QUICK = Limits(hello_within_s=0.2, stall_s=0.3, call_within_s=10, patience_s=1)


def credentials(
    role: Role, name: str, *, by: Authority = AUTHORITY, days: float = 1, federation: str = "north", addresses: tuple[str, ...] = ()
) -> Credentials:
    key = new_key()
    return Credentials(key, by.issue(Identity(federation, role, name, "org"), public_key(key), days=days, addresses=addresses), ROOT.roots)


SERVER = credentials(Role.SERVER, "server", addresses=HERE)
SITE = credentials(Role.SITE, "site")
OTHER = credentials(Role.SITE, "other")


class Desk:
    """A server that echoes, and keeps blobs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.blobs = FolderBlobs(folder)
        self.refuses: dict[str, HanseError] = {}
        self.peers: list[Peer] = []
        self.received: list[FromSite] = []
        self.ended = asyncio.Event()
        self.rotten: Blob | None = None

    def admit(self, peer: Peer) -> None:
        self.peers.append(peer)
        if peer.identity.name in self.refuses:
            raise self.refuses[peer.identity.name]

    async def control(self, peer: Peer, incoming: AsyncIterator[FromSite]) -> AsyncIterator[FromServer]:
        try:
            async for message in incoming:
                self.received.append(message)
                yield Welcome(version=peer.identity.name)
        finally:
            self.ended.set()

    async def call(self, peer: Peer, request: Request) -> Any:
        match request.name:
            case "echo":
                return request.arguments
            case "large":
                return "x" * (MAX_MESSAGE_BYTES + 1)
            case "bug":
                raise ZeroDivisionError("secret")
            case "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._refuse())
        raise ERRORS[request.name]

    async def follow(self, peer: Peer, request: Request) -> AsyncIterator[Any]:
        try:
            for number in range(request.arguments["count"]):
                yield number
            if request.name == "refuse":
                raise Refused("no more", hint="Stop here. " + "y" * 5_000)
            if request.name == "wait":
                await asyncio.Event().wait()
        finally:
            self.ended.set()

    def open_blob(self, peer: Peer, blob: Blob) -> int:
        return open_file(self.blobs.path(self.rotten or blob))

    def incoming(self, peer: Peer, blob: Blob) -> Incoming:
        return self.blobs.incoming(blob)

    async def _refuse(self) -> None:
        raise Refused("from a task")


ERRORS = {
    "refused": Refused("no", hint="Ask another."),
    "identity": IdentityError("who?"),
    "config": ConfigError("bad"),
    "full": StorageFull("full"),
    "wire": WireError("odd", offset=7, hint="Look."),
    "policy": PolicyRefused("not here", clause="code.digests", hint="Ask the site."),
}


@contextlib.asynccontextmanager
async def running(folder: Path, *, listen: str = "127.0.0.1:0", limits: Limits = Limits()) -> AsyncIterator[tuple[Server, Desk]]:  # noqa: B008
    desk = Desk(folder / "server")
    server = await serve(desk, SERVER, listen, limits=limits)
    try:
        yield server, desk
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def connected(port: int, who: Credentials = SITE, *, host: str = "localhost", **settings: Any) -> AsyncIterator[Client]:
    client = Client(f"{host}:{port}", who, **settings)
    try:
        yield client
    finally:
        await client.close()


def named(data: bytes) -> Blob:
    return Blob(blake3(data).digest(), len(data))


def reader(data: bytes) -> Callable[[int, int], memoryview]:
    return lambda offset, size: memoryview(data)[offset : offset + size]


@contextlib.asynccontextmanager
async def raw(port: int, who: Credentials = SITE) -> AsyncIterator[grpc.aio.Channel]:
    """A channel without our limits, for what our own client does not send."""
    tls = grpc.ssl_channel_credentials(who.roots, who.key, who.certificate)
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{port}", tls, options=options) as channel:
        yield channel


# ---------------------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("listen", "host"), [("[::]:0", "[::1]"), ("[::]:0", "127.0.0.1"), ("[::1]:0", "[::1]"), ("127.0.0.1:0", "localhost")]
)
async def test_a_call_is_answered_over_ipv4_and_ipv6(tmp_path: Path, listen: str, host: str) -> None:
    async with running(tmp_path, listen=listen) as (server, desk), connected(server.port, host=host) as client:
        assert await client.call("echo", name="x", list=[1, 2.5, None]) == {"name": "x", "list": [1, 2.5, None]}
        (peer,) = desk.peers
        assert peer.identity == Identity("north", Role.SITE, "site", "org")
        assert peer.serial == SITE.serial
        assert re.fullmatch(r"\[::1\]:\d+" if host == "[::1]" else r"(\[::ffff:)?127.0.0.1\]?:\d+", peer.address)


@pytest.mark.parametrize("name", ERRORS)
async def test_an_error_is_raised_again_as_it_was(tmp_path: Path, name: str) -> None:
    async with running(tmp_path) as (server, _), connected(server.port) as client:
        with pytest.raises(type(ERRORS[name])) as caught:
            await client.call(name)
        assert str(caught.value) == str(ERRORS[name])
        assert caught.value.__dict__ == ERRORS[name].__dict__


async def test_an_error_of_the_server_is_in_its_log_and_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as (server, _), connected(server.port) as client:
        with pytest.raises(Refused, match="ZeroDivisionError") as caught:
            await client.call("bug")
        assert "secret" not in str(caught.value)
        assert "secret" in caplog.text
        with pytest.raises(Refused, match="from a task"):
            await client.call("group")


async def test_messages_have_a_limit_both_ways(tmp_path: Path) -> None:
    async with running(tmp_path) as (server, desk), connected(server.port) as client:
        with pytest.raises(WireError, match="may have"):
            await client.call("echo", long="x" * MAX_MESSAGE_BYTES)
        assert not desk.peers
        with pytest.raises(WireError, match="may have"):
            await client.call("large")
        async with raw(server.port) as channel:
            for size, status in (
                (MAX_MESSAGE_BYTES + 1, grpc.StatusCode.INVALID_ARGUMENT),  # let in to be named in the log
                (2 * MAX_MESSAGE_BYTES + 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ):
                assert await channel.unary_unary(f"/{SERVICE}/Call")(bytes(size)).code() is status
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(f"/{SERVICE}/Call")(b"", metadata=[("long", "x" * (64 << 10))])
        assert await client.call("echo") == {}


async def test_values_are_followed_as_they_come(tmp_path: Path) -> None:
    async with running(tmp_path) as (server, desk), connected(server.port) as client:
        assert [value async for value in client.follow("logs", count=3)] == [0, 1, 2]
        refused = client.follow("refuse", count=2)
        assert [await anext(refused), await anext(refused)] == [0, 1]
        with pytest.raises(Refused, match="no more Stop here"):
            await anext(refused)
        desk.ended.clear()
        following = client.follow("wait", count=1)
        assert await anext(following) == 0
        await following.aclose()
        async with asyncio.timeout(10):
            await desk.ended.wait()


async def test_two_servers_do_not_share_a_port(tmp_path: Path) -> None:
    async with running(tmp_path) as (server, desk):
        with pytest.raises(ConfigError, match=f"127.0.0.1:{server.port}"):
            await serve(desk, SERVER, f"127.0.0.1:{server.port}")


# -------------------------------------------------------------------------------------------------------------------- the control stream


async def test_the_control_stream_runs_both_ways(tmp_path: Path) -> None:
    async with running(tmp_path) as (server, desk), connected(server.port) as client:
        stream = await client.control()
        arriving = aiter(stream)
        sent: list[FromSite] = [Hello(version=str(number)) for number in range(50)]
        async with asyncio.TaskGroup() as group:
            for message in sent:
                group.create_task(stream.send(message))
        for _ in sent:
            assert await anext(arriving) == Welcome(version="site")
        assert desk.received == sent
        await stream.close()
        async with asyncio.timeout(10):
            await desk.ended.wait()


async def test_a_stream_without_a_hello_is_ended(tmp_path: Path) -> None:
    async with running(tmp_path, limits=QUICK) as (server, desk), connected(server.port) as client:
        stream = await client.control()
        with pytest.raises(Refused, match=r"nothing came for 0\.2 s"):
            await anext(aiter(stream))
        with pytest.raises(HanseError):
            await stream.send(Hello(version="late"))
        stream = await client.control()
        await stream.send(Left(job="x", why=Failure("a", "b")))
        with pytest.raises(WireError, match="has to be a Hello"):
            await anext(aiter(stream))
        assert not desk.received


async def test_a_revoked_peer_is_dropped_at_once_and_others_stay(tmp_path: Path) -> None:
    async with running(tmp_path) as (server, desk), connected(server.port) as client, connected(server.port, OTHER) as other:
        streams = []
        for one in (client, other):
            stream = await one.control()
            await stream.send(Hello(version="1"))
            arriving = aiter(stream)
            await anext(arriving)
            streams.append((stream, arriving))
        desk.refuses["site"] = IdentityError("revoked")
        assert server.drop(lambda peer: peer.identity.name == "site") == 1
        with pytest.raises(IdentityError, match="not accepted any more"):
            await anext(streams[0][1])
        with pytest.raises(IdentityError, match="revoked"):
            await client.call("echo")
        with pytest.raises(IdentityError, match="revoked"):  # where the refusal meets us, at the opening or at the first read, is a race
            await anext(aiter(await client.control()))
        await streams[1][0].send(Hello(version="2"))
        assert await anext(streams[1][1]) == Welcome(version="other")


async def test_drop_ends_transfers_too(tmp_path: Path) -> None:
    data = os.urandom(64 * MIB)
    async with running(tmp_path) as (server, desk), Pump(server.port) as pump, connected(pump.port) as client:
        blob = desk.blobs.write([data])
        pump.delay_s = 0.05
        fetching = asyncio.create_task(client.download(blob, FolderBlobs(tmp_path / "site")))
        while not server._running:
            await asyncio.sleep(0)
        desk.refuses["site"] = IdentityError("revoked")
        server.drop(lambda peer: True)
        pump.delay_s = 0
        with pytest.raises(IdentityError):
            await fetching
        assert not server._running
        assert pump.pumped["down"] < 32 * MIB


async def test_a_certificate_that_expires_ends_its_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanse.transport.grpc._SWEEP_S", 0.05)
    brief = credentials(Role.SITE, "brief", days=3 / 86400)
    async with running(tmp_path) as (server, _), connected(server.port, brief) as client:
        stream = await client.control()
        await stream.send(Hello(version="1"))
        arriving = aiter(stream)
        await anext(arriving)
        with pytest.raises(IdentityError, match="expired"):
            await anext(arriving)
        with pytest.raises(IdentityError, match="expired"):
            await client.call("echo")


# --------------------------------------------------------------------------------------------------------------------------- identities


async def test_who_is_not_of_this_authority_does_not_get_in(tmp_path: Path) -> None:
    stranger = Authority.new_root("north")
    cases = {
        "expired": credentials(Role.SITE, "site", days=-1 / 1440),
        "another authority": credentials(Role.SITE, "site", by=stranger),
    }
    async with running(tmp_path) as (server, desk):
        for case, who in cases.items():
            async with connected(server.port, who) as client:
                with pytest.raises(LinkBroken, match=f"localhost:{server.port}") as caught:
                    await client.call("echo")
                assert ("own certificate expired" in caught.value.hint) == (case == "expired")
                assert caught.value.hint
        tls = grpc.ssl_channel_credentials(SITE.roots)
        async with grpc.aio.secure_channel(f"localhost:{server.port}", tls) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(f"/{SERVICE}/Call")(encode_message(Request(name="echo")))
        async with grpc.aio.insecure_channel(f"localhost:{server.port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(f"/{SERVICE}/Call")(encode_message(Request(name="echo")))
        assert not desk.peers
        async with connected(server.port) as client:
            assert await client.call("echo") == {}


async def test_another_federation_is_named_even_by_the_same_authority(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as (server, desk), connected(server.port, credentials(Role.SITE, "site", federation="south")) as client:
        with pytest.raises(IdentityError, match=r"'south'.*'north'"):
            await client.call("echo")
        with pytest.raises(IdentityError, match="'south'"):
            await anext(client.follow("logs", count=1))
        assert not desk.peers
        assert "'south'" in caplog.text
        assert "127.0.0.1:" in caplog.text


async def test_a_client_believes_no_false_server(tmp_path: Path) -> None:
    stranger = Authority.new_root("north")
    false = {
        "CERTIFICATE_VERIFY_FAILED": Credentials(*_pair(credentials(Role.SERVER, "server", by=stranger, addresses=HERE)), ROOT.roots),
        "certificate has expired": credentials(Role.SERVER, "server", addresses=HERE, days=-1 / 1440),
        "purpose|CERTIFICATE_VERIFY_FAILED": credentials(Role.SITE, "localhost", addresses=HERE),
        "localhost|ALPN|[Hh]ost": credentials(Role.SERVER, "server", addresses=("elsewhere.example",)),
    }
    for sign, who in false.items():
        server = await serve(Desk(tmp_path), who, "127.0.0.1:0")
        async with connected(server.port) as client:
            with pytest.raises(LinkBroken, match=sign) as caught:
                await client.call("echo")
            assert caught.value.hint
        await server.close()


def _pair(who: Credentials) -> tuple[bytes, bytes]:
    return who.key, who.certificate


async def test_trouble_names_the_address_and_what_to_do() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with connected(port) as client:
        with pytest.raises(LinkBroken, match=rf"localhost:{port}: .*Connection refused.*is it running"):
            await client.call("echo")
    async with connected(1, host="nowhere.invalid") as client:
        with pytest.raises(LinkBroken, match=r"nowhere\.invalid:1.*The name is unknown here"):
            await client.control()


# -------------------------------------------------------------------------------------------------------------------- hostile messages


@pytest.mark.parametrize("method", ["Call", "Follow", "Download", "Upload", "Control"])
async def test_malformed_messages_end_the_call_and_change_nothing(tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with running(tmp_path) as (server, desk), raw(server.port) as channel, connected(server.port) as client:

        async def send(data: bytes) -> None:
            if method in ("Control", "Upload"):
                stream = channel.stream_stream(f"/{SERVICE}/{method}")()
                await stream.write(data)
                await stream.done_writing()
                await stream.read()
            elif method == "Call":
                await channel.unary_unary(f"/{SERVICE}/Call")(data)
            else:
                await channel.unary_stream(f"/{SERVICE}/{method}")(data).read()

        for data in (b"", b"\xc1", b"\x93\x01", os.urandom(100), b"\x91" * 5_000, encode_message(Position(named(b"x"), 0))[:-1]):
            caplog.clear()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await send(data)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            lines = [line for line in caplog.messages if "site" in line and "127.0.0.1:" in line]
            assert len(lines) == 1
        assert not desk.received
        assert [path for path in desk.blobs.folder.rglob("*") if path.is_file()] == []
        assert await client.call("echo") == {}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One server and one raw channel for all examples: send(method, data) gives the status."""
    loop = asyncio.new_event_loop()
    stack = contextlib.AsyncExitStack()

    async def start() -> tuple[Desk, grpc.aio.Channel, Client]:
        server, desk = await stack.enter_async_context(running(tmp_path_factory.mktemp("fuzz")))
        return desk, await stack.enter_async_context(raw(server.port)), await stack.enter_async_context(connected(server.port))

    desk, channel, client = loop.run_until_complete(start())

    async def send(method: str, pieces: list[bytes]) -> None:
        stream = channel.stream_stream(f"/{SERVICE}/{method}")()
        with contextlib.suppress(asyncio.InvalidStateError):
            for piece in pieces:
                await stream.write(piece)
            await stream.done_writing()
        while await stream.read() is not grpc.aio.EOF:
            pass

    yield desk, lambda method, pieces: loop.run_until_complete(send(method, pieces)), lambda: loop.run_until_complete(client.call("echo"))
    loop.run_until_complete(stack.aclose())
    loop.close()


PIECES = st.lists(
    st.binary(max_size=60) | st.just(encode_message(Position(named(b"abc"), 0))) | st.just(encode_message(Hello(version="1"))), max_size=4
)


@given(method=st.sampled_from(["Control", "Upload"]), pieces=PIECES)
@settings(max_examples=150, deadline=None)
def test_whatever_is_sent_the_server_goes_on(fuzzed: Any, method: str, pieces: list[bytes]) -> None:
    desk, send, call = fuzzed
    with contextlib.suppress(grpc.aio.AioRpcError):
        send(method, pieces)
    assert call() == {}
    assert all(isinstance(message, Hello) for message in desk.received)
    for path in desk.blobs.folder.glob("??/*"):
        assert path.name == named(path.read_bytes()).hex


async def test_a_thousand_connections_do_not_break_a_call(tmp_path: Path) -> None:
    async with running(tmp_path) as (server, _), connected(server.port) as client:
        idle = await asyncio.gather(*[asyncio.open_connection("127.0.0.1", server.port) for _ in range(1_000)])
        for _, writer in idle[:500]:
            writer.write(os.urandom(200))
        assert await client.call("echo", still="here") == {"still": "here"}
        async with connected(server.port, OTHER) as other:
            assert await other.call("echo") == {}
        for _, writer in idle:
            writer.transport.abort()


# ----------------------------------------------------------------------------------------------------------------------------- blobs


@pytest.mark.parametrize("size", [0, 1, MIB, 5 * MIB + 3])
async def test_a_blob_goes_up_and_down(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    async with running(tmp_path) as (server, desk), connected(server.port) as client:
        await client.upload(named(data), reader(data))
        assert desk.blobs.map(named(data)) == data
        await client.upload(named(data), reader(b""))  # it is there: nothing is read
        site = FolderBlobs(tmp_path / "site")
        path = await client.download(named(data), site)
        assert path == site.path(named(data))
        assert path.read_bytes() == data
        assert await client.download(named(data), site) == path


async def test_a_blob_that_is_not_there_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as (server, _), connected(server.port) as client:
        with pytest.raises(Refused, match="not here"):
            await client.download(named(b"nothing"), FolderBlobs(tmp_path / "site"))


async def test_transfers_go_on_after_cuts_anywhere(tmp_path: Path) -> None:
    data = os.urandom(12 * MIB + 5)
    blob = named(data)
    async with running(tmp_path) as (server, desk), Pump(server.port) as pump, connected(pump.port) as client:
        asked: list[int] = []
        read = reader(data)

        def noted(offset: int, size: int) -> memoryview:
            asked.append(offset)
            return read(offset, size)

        for offset in (3 * MIB, 4 * MIB + 4321, 6 * MIB - 1):
            pump.cut_after(offset, "up")
            await client.upload(blob, noted)
            assert desk.blobs.map(blob) == data
            desk.blobs.remove(blob)
            pump.cut_after(offset, "down")
            site = FolderBlobs(tmp_path / "site")
            path = await client.download(blob, FolderBlobs(tmp_path / "site")) if desk.blobs.write([data]) else None
            assert path is not None
            assert path.read_bytes() == data
            site.remove(blob)
            desk.blobs.remove(blob)
        assert pump.cuts == 6
        assert pump.pumped["up"] < 3 * (len(data) + 7 * MIB)
        assert len(asked) < 3 * (13 + 7)


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_corrupt_bytes_on_the_way_do_no_harm(tmp_path: Path, direction: str) -> None:
    data = os.urandom(6 * MIB)
    async with running(tmp_path) as (server, desk), Pump(server.port) as pump, connected(pump.port) as client:
        pump.corrupt_once(direction, after=2 * MIB)
        if direction == "up":
            await client.upload(named(data), reader(data))
            assert desk.blobs.map(named(data)) == data
        else:
            desk.blobs.write([data])
            assert (await client.download(named(data), FolderBlobs(tmp_path / "site"))).read_bytes() == data
        assert pump.connections == 2  # TLS has noticed, and the transfer went on over a new connection


async def test_bytes_that_are_not_the_blob_are_tried_once_more(tmp_path: Path) -> None:
    good, rotten = os.urandom(2 * MIB), os.urandom(2 * MIB)
    async with running(tmp_path) as (server, desk), connected(server.port) as client:
        attempts = 0

        def read(offset: int, size: int) -> bytes:
            nonlocal attempts
            attempts += offset == 0
            return (rotten if attempts == 1 else good)[offset : offset + size]

        await client.upload(named(good), read)
        assert attempts == 2
        assert desk.blobs.map(named(good)) == good
        with pytest.raises(WireError, match="digest"):
            await client.upload(named(b"?" * 2 * MIB), reader(rotten))
        desk.rotten = desk.blobs.write([rotten])
        site = FolderBlobs(tmp_path / "site")
        with pytest.raises(WireError, match="digest"):
            await client.download(named(good), site)
        assert [path for path in site.folder.rglob("*") if path.is_file()] == []


async def test_two_sites_bring_the_same_blob_at_once(tmp_path: Path) -> None:
    data = os.urandom(8 * MIB)
    async with running(tmp_path) as (server, desk), connected(server.port) as one, connected(server.port, OTHER) as two:
        await asyncio.gather(one.upload(named(data), reader(data)), two.upload(named(data), reader(data)))
        assert desk.blobs.map(named(data)) == data
        assert list(desk.blobs.folder.glob("incoming/*")) == []


async def test_an_upload_of_which_nothing_comes_is_ended_and_its_part_kept(tmp_path: Path) -> None:
    data = os.urandom(3 * MIB)
    async with running(tmp_path, limits=QUICK) as (server, desk), raw(server.port) as channel, connected(server.port) as client:
        stream = channel.stream_stream(f"/{SERVICE}/Upload")()
        await stream.write(encode_message(Position(named(data))))
        await stream.read()
        await stream.write(data[:MIB])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        incoming = desk.blobs.incoming(named(data))
        assert incoming.offset == MIB
        incoming.close()
        await client.upload(named(data), reader(data))


async def test_a_download_that_nobody_reads_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hanse.transport.grpc._LAST_WRITE_S", 0.1)
    caplog.set_level(logging.INFO)
    async with running(tmp_path, limits=QUICK) as (server, desk), raw(server.port) as channel, connected(server.port) as client:
        blob = desk.blobs.write([os.urandom(64 * MIB)])
        stream = channel.unary_stream(f"/{SERVICE}/Download")(encode_message(Position(blob)))
        assert len(await stream.read()) == MIB
        async with asyncio.timeout(20):
            while server._running:
                await asyncio.sleep(0.01)
        assert "nothing was taken for 0.3 s" in caplog.text
        assert await client.call("echo") == {}
        assert await client.download(blob, FolderBlobs(tmp_path / "site"))


async def test_a_full_server_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as (server, desk), connected(server.port) as client:
        desk.refuses["site"] = StorageFull("no room", hint="Make room.")
        with pytest.raises(StorageFull, match="no room Make room"):
            await client.upload(named(b"x" * MIB), reader(b"x" * MIB))


async def test_patience_has_an_end(tmp_path: Path) -> None:
    data = os.urandom(2 * MIB)
    async with running(tmp_path) as (server, _), Pump(server.port) as pump:
        pump.refuse()
        async with connected(pump.port, limits=QUICK) as client:
            with pytest.raises(LinkBroken, match="given up"):
                await client.upload(named(data), reader(data))
        pump.refuse(False)
        async with connected(pump.port, limits=QUICK) as client:
            await client.upload(named(data), reader(data))
            pump.freeze()
            with pytest.raises(LinkBroken, match="nothing moved"):
                await client.download(named(data), FolderBlobs(tmp_path / "site"))


async def test_a_dead_peer_is_noticed_on_both_sides(tmp_path: Path) -> None:
    async with running(tmp_path) as (server, desk), Pump(server.port) as pump, connected(pump.port) as client:
        stream = await client.control()
        await stream.send(Hello(version="1"))
        arriving = aiter(stream)
        await anext(arriving)
        pump.freeze()
        async with asyncio.timeout(25):  # 15 s are promised; gRPC alone takes more than 60
            with pytest.raises(LinkBroken):
                await anext(arriving)
            await desk.ended.wait()


# ----------------------------------------------------------------------------------------------------------------------------- proxy


@contextlib.asynccontextmanager
async def connect_proxy() -> AsyncIterator[tuple[int, list[str]]]:
    """A small HTTP CONNECT proxy that wants a password: its port, and the heads of the requests."""
    heads: list[str] = []

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        heads.append(head)
        host, port = head.split()[1].rsplit(":", 1)
        if "Proxy-Authorization: Basic dXNlcjpwYXNz" not in head:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    proxy = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    yield proxy.sockets[0].getsockname()[1], heads
    proxy.close()


async def test_it_works_through_an_http_connect_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")  # not asked
    data = os.urandom(3 * MIB)
    async with running(tmp_path) as (server, desk), connect_proxy() as (port, heads):
        async with connected(server.port, proxy=f"http://user:pass@127.0.0.1:{port}") as client:
            await client.upload(named(data), reader(data))
            stream = await client.control()
            await stream.send(Hello(version="1"))
            assert await anext(aiter(stream)) == Welcome(version="site")
        assert [head.splitlines()[0] for head in heads] == [f"CONNECT localhost:{server.port} HTTP/1.1"]
        assert desk.blobs.map(named(data)) == data
        async with connected(server.port, proxy=f"http://user:wrong@127.0.0.1:{port}") as client:
            with pytest.raises(LinkBroken, match="check `proxy`"):
                await client.call("echo")
        async with connected(server.port) as client:
            assert await client.call("echo") == {}
