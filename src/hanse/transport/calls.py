"""What both ends of a connection agree on: the names of the calls, their limits, and how an error travels.

All calls are gRPC over mutual TLS and carry raw bytes: messages of `hanse.messages.wire` in MessagePack, or pieces of a blob.

    Control   both ways      FromSite, FromServer     one for each site, as long as it is connected
    Call      one, one       Request, Reply
    Follow    one, many      Request, Reply           values as they come
    Upload    both ways      Position, then the bytes; Position (where to begin), then Position (all is kept)
    Download  one, many      Position, the bytes from there
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from hanse.errors import ConfigError, Failure, HanseError, IdentityError, NotInstalled, PolicyRefused, Refused, StorageFull, WireError
from hanse.messages.wire import Blob, Count, Reply, decode_message, encode_message

SERVICE = "hanse.Federation"
MAX_MESSAGE_BYTES = 4 << 20
FAILURE = "hanse-failure-bin"
"""The trailing metadata that holds the Reply with the failure that ended a stream."""

_FAILURE_CHARACTERS = 1_000
_METADATA_BYTES = 16 << 10

PING_AFTER_S, PING_TIMEOUT_S = 4, 9
"""An end that has heard nothing for so long pings, and an answer has to come within the timeout: each notices within 15 s that the other
is gone. On a slow line the answer waits behind data, so the timeout is the longer part. The server waits a second longer before it pings:
by then the client has done so, and a quiet connection has one ping in this time and not two."""

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_S * 1000),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_S * 1000),  # without it, 60 s; the one above alone does not end a connection
    ("grpc.http2.max_frame_size", 1 << 20),
    ("grpc.http2.bdp_probe", 0),  # or gRPC lets more and more come before it is read, and holds it in memory
    ("grpc.http2.lookahead_bytes", 4 << 20),
)
SERVER_OPTIONS: tuple[tuple[str, int | str], ...] = (
    *OPTIONS,
    ("grpc.max_receive_message_length", 2 * MAX_MESSAGE_BYTES),  # gRPC itself does not log what it drops, so some of it is let in
    ("grpc.keepalive_time_ms", (PING_AFTER_S + 1) * 1000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),
    # A smaller "grpc.tsi.max_frame_size" would save some KiB a connection, but corrupts one large download in ten (grpcio 1.85.1).
    ("grpc.enable_channelz", 0),
    ("grpc.max_channel_trace_event_memory_per_node", 0),
)
CLIENT_OPTIONS: tuple[tuple[str, int | str], ...] = (
    *OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", PING_AFTER_S * 1000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long each end waits for the other."""

    hello_within_s: float = 10.0
    """The first message of a stream has to come within this time."""
    stall_s: float = 60.0
    """A transfer of which nothing moves for so long is ended; what came is kept."""
    call_within_s: float = 60.0
    """A call has its answer within this time."""
    patience_s: float = 600.0
    """A transfer is tried again and again until nothing has moved for so long."""


LIMITS = Limits()


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A place in a blob."""

    blob: Blob
    offset: Count = 0

    def __post_init__(self) -> None:
        if self.offset > self.blob.size:
            raise ValueError(f"the offset {self.offset} lies behind the end of the blob, {self.blob.size}")


_positions = msgspec.msgpack.Decoder(Position)


def decode_position(data: bytes) -> Position:
    """Raises WireError."""
    try:
        return _positions.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise WireError(f"this is no place in a blob: {error}", offset=0) from error


def encode_within(message: Any) -> bytes:
    """The message as bytes. Raises WireError if it is longer than a message may be."""
    data = encode_message(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(
            f"this {type(message).__name__} has {len(data):,} bytes and a message may have {MAX_MESSAGE_BYTES:,}",
            offset=MAX_MESSAGE_BYTES,
            hint="Send large values as blobs.",
        )
    return data


def encode_failure(error: HanseError) -> bytes:
    """The error as a Reply short enough for the metadata that ends a stream."""
    whole = Failure.of(error)
    cut = (text if len(text) <= _FAILURE_CHARACTERS else text[: _FAILURE_CHARACTERS - 1] + "…" for text in (whole.message, whole.hint))
    return encode_message(Reply(failure=Failure(whole.code, *cut)))


def decode_reply(data: bytes) -> Any:
    """The Reply's value. Raises the error it holds instead; WireError if it is no Reply."""
    reply: Reply = decode_message(data, Reply)
    if reply.failure is not None:
        raise error_of(reply.failure)
    return reply.value


_PLAIN: dict[str, Callable[..., HanseError]] = {
    kind.__name__: kind for kind in (ConfigError, NotInstalled, IdentityError, Refused, StorageFull)
}


def error_of(failure: Failure) -> HanseError:
    """The error that a failure was made of; one of a kind that only its own place knows is a Refused that names it."""
    if failure.code == "WireError" and (found := re.match(r"at byte (\d+): ", failure.message)):
        return WireError(failure.message[found.end() :], offset=int(found[1]), hint=failure.hint)
    if failure.code == "PolicyRefused" and (found := re.search(r" \[([^\[\]]+)\]$", failure.message)):
        return PolicyRefused(failure.message[: found.start()], clause=found[1], hint=failure.hint)
    if failure.code in _PLAIN:
        return _PLAIN[failure.code](failure.message, hint=failure.hint)
    return Refused(f"{failure.code}: {failure.message}", hint=failure.hint)
