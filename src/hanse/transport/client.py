"""A participant's end of a connection: a site's, or a person's. It connects outward only, through an HTTP CONNECT proxy if there is one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc

from hanse.errors import HanseError, LinkBroken, Refused, WireError
from hanse.identity.certificates import Credentials
from hanse.messages.codec import Buffer
from hanse.messages.wire import Blob, FromServer, FromSite, Request, decode_message
from hanse.transport.blobs import CHUNK_BYTES, FolderBlobs
from hanse.transport.calls import (
    CLIENT_OPTIONS,
    FAILURE,
    LIMITS,
    MAX_MESSAGE_BYTES,
    SERVICE,
    Limits,
    Position,
    decode_position,
    decode_reply,
    encode_within,
)
from hanse.transport.receiving import Receiver

T = TypeVar("T")
Pacing = Callable[[int], Awaitable[None]]
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.2, 15.0

logger = logging.getLogger(__name__)


class Client:
    """One connection to a server, made when it is first needed and again after it broke. Made inside a running event loop.

    address: "host:port", the host as the server's certificate names it, an IPv6 address in brackets.
    proxy: the URL of an HTTP CONNECT proxy, "http://user:password@host:port". Environment variables are not asked.
    up, down: awaited with the size of each piece of a blob, before it is sent or after it came: they can hold a transfer to a rate.

    Each method raises LinkBroken if the connection cannot be made or breaks, and else the very error that the server raised.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        proxy: str | None = None,
        limits: Limits = LIMITS,
        up: Pacing | None = None,
        down: Pacing | None = None,
    ) -> None:
        self.address, self._credentials, self._limits, self._up, self._down = address, credentials, limits, up, down
        through = ("grpc.http_proxy", proxy) if proxy else ("grpc.enable_http_proxy", 0)
        tls = grpc.ssl_channel_credentials(credentials.roots, credentials.key, credentials.certificate)
        self._channel = grpc.aio.secure_channel(f"dns:///{address}", tls, options=(*CLIENT_OPTIONS, through))
        self._control = self._channel.stream_stream(f"/{SERVICE}/Control")
        self._call = self._channel.unary_unary(f"/{SERVICE}/Call")
        self._follow = self._channel.unary_stream(f"/{SERVICE}/Follow")
        self._upload = self._channel.stream_stream(f"/{SERVICE}/Upload")
        self._download = self._channel.unary_stream(f"/{SERVICE}/Download")

    async def control(self) -> ControlStream:
        """Open the control stream. The server expects a Hello at once."""
        stream = self._control()
        with self._errors():
            await stream.wait_for_connection()
        return ControlStream(self, stream)

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """What the server answers to a request."""
        with self._errors():
            data = await self._call(encode_within(Request(name=name, arguments=arguments)), timeout=self._limits.call_within_s)
        return decode_reply(data)

    async def follow(self, name: str, /, **arguments: Any) -> AsyncIterator[Any]:
        """The values that the server sends, as they come; the iterator ends when the server's does."""
        with self._errors(), _ended(self._follow(encode_within(Request(name=name, arguments=arguments)))) as stream:
            while (data := await stream.read()) is not grpc.aio.EOF:
                yield decode_reply(data)

    async def download(self, blob: Blob, blobs: FolderBlobs) -> Path:
        """Fetch a blob into a folder, verified; at once if it is there.

        A transfer that is cut goes on where it stood, until nothing has moved for `limits.patience_s`. Bytes that are not the blob are
        thrown away and fetched once more before WireError is raised.
        """
        return await self._patiently(f"download of {blob.hex[:16]}…", lambda patience: self._download_rest(blob, blobs, patience))

    async def upload(self, blob: Blob, read: Callable[[int, int], Buffer]) -> None:
        """Send a blob; when this returns, the server has kept it. `read` gives the bytes at (offset, size). Cuts: as in `download`."""
        await self._patiently(f"upload of {blob.hex[:16]}…", lambda patience: self._upload_rest(blob, read, patience))

    async def close(self) -> None:
        """End all calls and the connection."""
        await self._channel.close()

    async def _download_rest(self, blob: Blob, blobs: FolderBlobs, patience: _Patience) -> Path:
        async with Receiver(blobs.incoming(blob)) as receiver:
            if receiver.offset < blob.size:
                call = self._download(encode_within(Position(blob, receiver.offset)))
                with self._errors(), _ended(call) as stream:
                    while (chunk := await self._moving(stream.read())) is not grpc.aio.EOF:
                        await receiver.write(chunk)
                        if self._down is not None:
                            await self._down(len(chunk))
                        patience.renew()
            return await receiver.finish()

    async def _upload_rest(self, blob: Blob, read: Callable[[int, int], Buffer], patience: _Patience) -> None:
        with self._errors(), _ended(self._upload()) as stream:
            try:
                await self._moving(stream.write(encode_within(Position(blob))))
                offset = decode_position(_some(await self._moving(stream.read()))).offset
                while offset < blob.size:
                    chunk = bytes(read(offset, min(CHUNK_BYTES, blob.size - offset)))
                    if self._up is not None:
                        await self._up(len(chunk))
                    await self._moving(stream.write(chunk))
                    offset += len(chunk)
                    patience.renew()
            except asyncio.InvalidStateError:  # the server has ended the call: what it says is in the status
                await stream.code()
            decode_position(_some(await self._moving(stream.read())))

    async def _moving(self, step: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._limits.stall_s):
                return await step
        except TimeoutError as error:
            raise LinkBroken(f"{self.address}: nothing moved for {self._limits.stall_s:g} s.") from error

    async def _patiently(self, what: str, attempt: Callable[[_Patience], Awaitable[T]]) -> T:
        patience, corrupt = _Patience(self._limits.patience_s), False
        while True:
            try:
                return await attempt(patience)
            except WireError as error:
                if corrupt:
                    raise
                corrupt = True
                logger.warning("%s, %s: %s It is tried once more.", self.address, what, error)
            except LinkBroken as error:
                logger.info("%s, %s: %s", self.address, what, error)
                await patience.wait(error)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What gRPC raises, as one of our own."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        except asyncio.InvalidStateError as error:
            raise LinkBroken(f"{self.address}: the server has ended the call.") from error
        except grpc.aio.UsageError as error:
            raise LinkBroken(f"{self.address}: the connection was closed at this end.") from error

    def _error(self, error: grpc.aio.AioRpcError) -> HanseError:
        for key, value in error.trailing_metadata() or ():
            if key == FAILURE and isinstance(value, bytes):
                try:
                    decode_reply(value)
                except HanseError as raised:
                    return raised
        details = error.details() or error.code().name
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return LinkBroken(
                f"{self.address}: no answer within {self._limits.call_within_s:g} s.", hint="The server may be busy: try again."
            )
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return Refused(f"{self.address}: the server does not know this call.", hint="Is it of another version, or another program?")
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            return WireError(f"{self.address}: {details}", offset=MAX_MESSAGE_BYTES)
        if error.code() is grpc.StatusCode.INTERNAL and details == "Internal error from Core":
            return LinkBroken(f"{self.address}: the call ended while this end was still sending.")
        reason = re.sub(r"^failed to connect to all addresses; last error: (UNKNOWN: |UNAVAILABLE: )?", "", details)
        return LinkBroken(f"{self.address}: {reason.rstrip('.')}.", hint=self._hint(details))

    def _hint(self, details: str) -> str:
        expires = self._credentials.expires
        if expires < datetime.now(UTC):
            return f"This end's own certificate expired at {expires:%Y-%m-%d %H:%M} UTC: renew it, or join again with a new token."
        return next((hint for sign, hint in _HINTS.items() if re.search(sign, details)), "")


class ControlStream:
    """The two-way stream between a site and the server: iterate to receive. Messages arrive in the order they were sent."""

    def __init__(self, client: Client, stream: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        self._client, self._stream = client, stream
        self._sending = asyncio.Lock()

    async def send(self, message: FromSite) -> None:
        """Returns when the message is on its way; waits while the server is not reading. Cancelling it ends the stream."""
        data = encode_within(message)
        async with self._sending:
            with self._client._errors():
                try:
                    await self._stream.write(data)
                except asyncio.InvalidStateError:
                    await self._raise_status()

    async def __aiter__(self) -> AsyncIterator[FromServer]:
        with self._client._errors():
            while (data := await self._stream.read()) is not grpc.aio.EOF:
                yield decode_message(data, FromServer)

    async def close(self) -> None:
        self._stream.cancel()

    async def _raise_status(self) -> None:
        """Raises what ended the stream, as the server said it."""
        await self._stream.read()
        raise LinkBroken(f"{self._client.address}: the server has ended the control stream.")


class _Patience:
    """Waits longer and longer between attempts, until nothing has moved for `patience_s`."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.renew()

    def renew(self) -> None:
        self._until = asyncio.get_running_loop().time() + self._patience_s
        self._delay_s = _FIRST_DELAY_S

    async def wait(self, error: LinkBroken) -> None:
        """Raises LinkBroken when patience is at its end."""
        delay_s = self._delay_s * random.uniform(0.5, 1.5)
        if asyncio.get_running_loop().time() + delay_s > self._until:
            raise LinkBroken(f"{error.message} Nothing has moved for {self._patience_s:g} s: given up.", hint=error.hint) from error
        self._delay_s = min(2 * self._delay_s, _LONGEST_DELAY_S)
        await asyncio.sleep(delay_s)


_HINTS = {
    "certificate has expired": "The server's certificate has expired: whoever runs it has to renew it.",
    "CERTIFICATE_VERIFY_FAILED": "Another authority has issued the server's certificate: is it the right server, and the right kit?",
    "Hostname Verification Check failed|Peer name .* is not in peer certificate": "The server's certificate is for another name: connect"
    " to it by the name in the kit, or add this one to `addresses` and make the server's kit anew.",
    "Connection refused": "No server listens there: is it running, and is the port right?",
    "[Tt]imed out": "Nothing answers there: does a firewall on the way let this port through, and is the machine on?",
    "lookup|DNS|[Nn]ame.*resol|Domain name": "The name is unknown here: check it in kit.yaml.",
    "HTTP proxy|Proxy|CONNECT": "The proxy did not let it through: check `proxy` in kit.yaml.",
    "SSL|handshake|[Ss]ocket closed|reset by peer|EOF": "The server may not accept this certificate: its log says why.",
}
"""What to do, by what gRPC says; the first that is found counts."""


@contextlib.contextmanager
def _ended(call: T) -> Iterator[T]:
    """The call, cancelled at the end if it still runs."""
    try:
        yield call
    finally:
        call.cancel()  # type: ignore[attr-defined]


def _some(data: Any) -> bytes:
    if data is grpc.aio.EOF:
        raise LinkBroken("the server has ended the call early")
    return bytes(data)
