"""The server's end of a federation's connections: gRPC over mutual TLS on one port, and who is at the other end of each call.

`Client`, the other end, is in `hanse.transport.client`; what both agree on in `hanse.transport.calls`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn, Protocol, TypeAlias
from urllib.parse import unquote

import grpc
from cryptography import x509

from hanse.errors import ConfigError, Failure, HanseError, IdentityError, Refused, WireError
from hanse.identity.certificates import Credentials, Identity, identity_of
from hanse.messages.wire import Blob, FromServer, FromSite, Hello, Reply, Request, decode_message
from hanse.transport.blobs import CHUNK_BYTES, Incoming
from hanse.transport.calls import (
    FAILURE,
    LIMITS,
    MAX_MESSAGE_BYTES,
    SERVER_OPTIONS,
    SERVICE,
    Limits,
    Position,
    decode_position,
    encode_failure,
    encode_within,
)
from hanse.transport.client import Client, ControlStream
from hanse.transport.receiving import Receiver

__all__ = ["Client", "ControlStream", "Limits", "Peer", "Server", "Service", "serve"]

MAX_CALLS = 20_000
"""So many calls run at once in all; more are turned away."""

_SWEEP_S = 30.0
_LAST_WRITE_S = 5.0
_Handler: TypeAlias = Callable[["Peer", Any, "_Stream"], Awaitable[bytes | None]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a call, by the certificate that TLS has checked."""

    identity: Identity
    serial: int
    address: str

    def __str__(self) -> str:
        return f"{self.identity} at {self.address}"


class Service(Protocol):
    """What the server does with what arrives. Any HanseError it raises is raised again at the client."""

    def admit(self, peer: Peer) -> None:
        """Asked before every call. Raises IdentityError if the peer is revoked, Refused if it is disabled."""

    def control(self, peer: Peer, incoming: AsyncIterator[FromSite]) -> AsyncIterator[FromServer]:
        """What to send to a site, as it comes. `incoming` gives what the site sends, a Hello first; it reads a message when it is asked
        for the next. The stream ends when this iterator does, and is closed when the site is gone."""

    async def call(self, peer: Peer, request: Request) -> Any:
        """The JSON value that answers the request."""

    def follow(self, peer: Peer, request: Request) -> AsyncIterator[Any]:
        """JSON values, as they come."""

    def open_blob(self, peer: Peer, blob: Blob) -> int:
        """A descriptor, as of `open_file`, of a blob that the peer may have; the caller closes it. Raises Refused."""

    def incoming(self, peer: Peer, blob: Blob) -> Incoming:
        """Where an upload goes. Raises Refused, StorageFull."""


async def serve(service: Service, credentials: Credentials, listen: str, *, limits: Limits = LIMITS) -> Server:
    """Start to listen at `listen`, such as "[::]:8443" for all addresses of IPv6 and IPv4. Port 0 takes a free one.

    Raises ConfigError if that cannot be.
    """
    server = Server(service, credentials, limits)
    await server._start(listen)
    return server


class Server:
    """A running server; made by `serve`. port: where it listens."""

    port: int

    def __init__(self, service: Service, credentials: Credentials, limits: Limits) -> None:
        self._service, self._limits = service, limits
        self._federation = credentials.identity.federation
        self._running: dict[asyncio.Task[Any], tuple[Peer, float]] = {}
        self._dropped: dict[asyncio.Task[Any], IdentityError] = {}
        # Not grpc.dynamic_ssl_server_credentials: in grpcio 1.85 handshakes at the same time as a new certificate can abort the process.
        pair = (credentials.key, credentials.certificate)
        self._tls = grpc.ssl_server_credentials([pair], credentials.roots, require_client_auth=True)
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        unary, unary_stream, stream_stream = (
            grpc.unary_unary_rpc_method_handler,
            grpc.unary_stream_rpc_method_handler,
            grpc.stream_stream_rpc_method_handler,
        )
        handlers = {
            "Control": stream_stream(self._guarded(self._control)),
            "Call": unary(self._guarded(self._call)),
            "Follow": unary_stream(self._guarded(self._follow)),
            "Upload": stream_stream(self._guarded(self._upload)),
            "Download": unary_stream(self._guarded(self._download)),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def drop(self, predicate: Callable[[Peer], bool]) -> int:
        """End at once all calls of the peers that match; how many there were."""
        error = IdentityError("the server has ended this connection: the certificate is not accepted any more.")
        matching = [task for task, (peer, _) in self._running.items() if predicate(peer)]
        for task in matching:
            self._end(task, error)
        return len(matching)

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more calls, and end those that still run after `grace_s`."""
        self._sweeping.cancel()
        await self._server.stop(grace_s)

    async def _start(self, listen: str) -> None:
        try:
            self.port = self._server.add_secure_port(listen, self._tls)
        except RuntimeError as error:
            raise ConfigError(f"the server cannot listen at {listen!r}: {error}", hint="Is another program using that port?") from error
        await self._server.start()
        self._sweep()

    def _sweep(self) -> None:
        """End the calls of those whose certificate has expired since they came; each `_SWEEP_S`."""
        now = time.time()
        for task, (peer, expires) in list(self._running.items()):
            if expires < now:
                self._end(task, _expired(peer.identity))
        self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _end(self, task: asyncio.Task[Any], error: IdentityError) -> None:
        self._dropped[task] = error
        task.cancel()

    # --------------------------------------------------------------------------------------------------------------- around every call

    def _guarded(self, handle: _Handler) -> Callable[[Any, Any], Awaitable[bytes | None]]:
        """The call for admitted peers only, and with its errors told to the peer and to the log."""

        async def guarded(request: Any, context: Any) -> bytes | None:
            task, stream = asyncio.current_task(), _Stream(context)
            assert task is not None
            who: object = _address(context.peer())
            try:
                peer, expires = self._peer(context)
                who = peer
                self._running[task] = peer, expires
                self._service.admit(peer)
                return await handle(peer, _short(request) if isinstance(request, bytes) else request, stream)
            except asyncio.CancelledError:
                if task not in self._dropped:
                    raise
                error: HanseError = self._dropped[task]
            except HanseError as raised:
                error = raised
            except grpc.aio.AbortError:
                raise
            except Exception as raised:
                error = _told(raised, who)
            finally:
                self._running.pop(task, None)
                self._dropped.pop(task, None)
            logger.log(logging.WARNING if isinstance(error, WireError | IdentityError) else logging.INFO, "%s: %s", who, error)
            await stream.end(error)

        return guarded

    def _peer(self, context: Any) -> tuple[Peer, float]:
        (pem,) = context.auth_context()["x509_pem_cert"]
        identity, serial, expires = _who(pem)
        if identity.federation != self._federation:
            raise IdentityError(f"{identity} is of the federation {identity.federation!r}, and this is {self._federation!r}.")
        if expires < time.time():
            raise _expired(identity)
        return Peer(identity, serial, _address(context.peer())), expires

    # ----------------------------------------------------------------------------------------------------------------------- the calls

    async def _control(self, peer: Peer, _: Any, stream: _Stream) -> None:
        async with _closing(self._service.control(peer, self._messages(stream))) as outgoing:
            async for message in outgoing:
                await stream.write(encode_within(message), within_s=self._limits.stall_s)

    async def _messages(self, stream: _Stream) -> AsyncIterator[FromSite]:
        message = decode_message(await stream.read(self._limits.hello_within_s), FromSite)
        if not isinstance(message, Hello):
            raise WireError(f"the first message is a {type(message).__name__} and has to be a Hello", offset=0)
        yield message
        while (data := await stream.read_or_end()) is not None:
            yield decode_message(data, FromSite)

    async def _call(self, peer: Peer, data: bytes, _: _Stream) -> bytes:
        request = decode_message(data, Request)
        try:
            return encode_within(Reply(value=await self._service.call(peer, request)))
        except HanseError as error:
            logger.info("%s, %s: %s", peer, request.name, error)
            return encode_within(Reply(failure=Failure.of(error)))

    async def _follow(self, peer: Peer, data: bytes, stream: _Stream) -> None:
        async with _closing(self._service.follow(peer, decode_message(data, Request))) as values:
            async for value in values:
                await stream.write(encode_within(Reply(value=value)))

    async def _upload(self, peer: Peer, _: Any, stream: _Stream) -> None:
        blob = decode_position(await stream.read(self._limits.hello_within_s)).blob
        async with Receiver(self._service.incoming(peer, blob)) as receiver:
            await stream.write(encode_within(Position(blob, receiver.offset)))
            while receiver.offset < blob.size:
                chunk = await stream.read(self._limits.stall_s)
                if not chunk:
                    raise WireError("a piece of a blob has no bytes", offset=receiver.offset)
                await receiver.write(chunk)
            await receiver.finish()
        await stream.write(encode_within(Position(blob, blob.size)))

    async def _download(self, peer: Peer, data: bytes, stream: _Stream) -> None:
        position = decode_position(data)
        offset = position.offset
        descriptor = self._service.open_blob(peer, position.blob)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while chunk := os.pread(descriptor, CHUNK_BYTES, offset):
                await stream.write(chunk, within_s=self._limits.stall_s)
                offset += len(chunk)
        finally:
            os.close(descriptor)


_STATUS = {
    IdentityError: grpc.StatusCode.UNAUTHENTICATED,
    Refused: grpc.StatusCode.PERMISSION_DENIED,
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
}


class _Stream:
    """One call's messages, and its end. gRPC takes no status while a message is on its way out, so a write outlives who waits for it."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._writing: asyncio.Task[None] | None = None

    async def read_or_end(self) -> bytes | None:
        """The next message, None at the end."""
        data = await self._context.read()
        return None if data is grpc.aio.EOF else _short(data)

    async def read(self, within_s: float) -> bytes:
        """The next message. Raises Refused if it does not come in time, WireError if the stream ends before."""
        try:
            async with asyncio.timeout(within_s):
                data = await self.read_or_end()
        except TimeoutError as error:
            raise Refused(f"nothing came for {within_s:g} s: the stream is ended.") from error
        if data is None:
            raise WireError("the stream ended before all had come", offset=0)
        return data

    async def write(self, data: bytes, *, within_s: float | None = None) -> None:
        """Returns when the peer has room for it. Raises Refused if it is not so in time."""
        self._writing = asyncio.ensure_future(self._context.write(data))
        self._writing.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(within_s):
                await asyncio.shield(self._writing)
            self._writing = None
        except TimeoutError as error:
            raise Refused(f"nothing was taken for {within_s:g} s: the stream is ended.") from error

    async def end(self, error: HanseError) -> NoReturn:
        """Tell the peer why, and raise what gRPC expects. A peer that takes no bytes cannot be told; it gets no more of them either."""
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=_LAST_WRITE_S)
            if not self._writing.done():
                raise asyncio.CancelledError from error
        await self._context.abort(_STATUS.get(type(error), grpc.StatusCode.ABORTED), trailing_metadata=((FAILURE, encode_failure(error)),))
        raise AssertionError("abort raises")


def _short(data: bytes) -> bytes:
    """What came. Raises WireError if it is longer than a message may be."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data):,} bytes came and one may have {MAX_MESSAGE_BYTES:,}", offset=MAX_MESSAGE_BYTES)
    return data


@lru_cache(maxsize=10_000)
def _who(pem: bytes) -> tuple[Identity, int, float]:
    """Identity, serial number, and when it expires in seconds since 1970."""
    certificate = x509.load_pem_x509_certificate(pem)
    return identity_of(pem), certificate.serial_number, certificate.not_valid_after_utc.timestamp()


def _address(peer: str) -> str:
    """gRPC's "ipv6:%5B::1%5D:4711" as "[::1]:4711"."""
    return unquote(peer).removeprefix("ipv4:").removeprefix("ipv6:")


def _expired(identity: Identity) -> IdentityError:
    return IdentityError(f"the certificate of {identity} has expired.", hint="Renew it, or join again with a new token.")


def _told(error: Exception, who: object) -> HanseError:
    """What the peer is told of an error: a HanseError that task groups have wrapped as it is, of any other only its kind."""
    inner: BaseException = error
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    if isinstance(inner, HanseError):
        return inner
    logger.error("%s: the server failed at this call", who, exc_info=error)
    return Refused(f"the server failed at this: {type(inner).__name__}.", hint="Its log says more.")


@contextlib.asynccontextmanager
async def _closing(iterator: AsyncIterator[Any]) -> AsyncIterator[AsyncIterator[Any]]:
    """The iterator, closed at the end if it is one that can be."""
    try:
        yield iterator
    finally:
        if (aclose := getattr(iterator, "aclose", None)) is not None:
            await aclose()
