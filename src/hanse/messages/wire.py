"""What travels between sites, server and admins besides models: small messages in MessagePack, each a struct with a schema.

Reading is strict: a message of another type, an unknown field or a value out of its bounds raises WireError. Models and tensors are
frames of `hanse.messages.codec`; a message carries a frame inline if it is small, and else names a blob.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from hanse.errors import ConfigError, Failure, WireError

INLINE_BYTES = 512 << 10
"""Frames up to this size ride in the message itself: two-party gradient exchange lives on latency."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=r"^[^/\x00-\x1f\x7f]+$")]
"""The name of a site, a job, a person, an organisation: printable, without a slash."""

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Short = Annotated[str, msgspec.Meta(max_length=10_000)]
T = TypeVar("T")


class Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Bytes named by their BLAKE3 digest (32 bytes) and their size."""

    digest: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    size: Count

    @property
    def hex(self) -> str:
        return self.digest.hex()


class _Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag=True, omit_defaults=True):
    pass


class TaskRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, order=True):
    """Which task of a job: how many commits came before, how many asks since."""

    commit: Count
    index: Count


Frame = Annotated[bytes, msgspec.Meta(max_length=INLINE_BYTES)]


class Payload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An encoded task or update: inline, or as a blob that is fetched or was sent before this message."""

    inline: Frame | None = None
    blob: Blob | None = None

    def __post_init__(self) -> None:
        if (self.inline is None) == (self.blob is None):
            raise ValueError("a payload is either inline or a blob")


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a job takes of a site, or what a site has: cores, memory in bytes, GPUs."""

    cores: Annotated[float, msgspec.Meta(ge=0)] = 0
    memory_bytes: Count = 0
    gpus: Count = 0

    def fits(self, free: Resources) -> bool:
        return self.cores <= free.cores and self.memory_bytes <= free.memory_bytes and self.gpus <= free.gpus


# ------------------------------------------------------------------------------------------------------- the control stream, site to server


class Hello(_Message):
    """The site's first message on each connection. accepted: the jobs it holds. resources: what it has in all."""

    version: Short
    resources: Resources = Resources()
    accepted: Annotated[list[Name], msgspec.Meta(max_length=10_000)] = []


class OfferReply(_Message):
    """The site takes the job, or says by which clause of its policy it does not."""

    job: Name
    refusal: Failure | None = None


class Delivery(_Message):
    """An update. It is the site's to keep until the server says Received; the same one may come twice."""

    job: Name
    task: TaskRef
    payload: Payload


class Output(_Message):
    """Lines that training code printed, if the site's policy lets them out."""

    job: Name
    lines: Annotated[list[Short], msgspec.Meta(max_length=1_000)]


class Left(_Message):
    """The site will do no more for this job, and why."""

    job: Name
    why: Failure


FromSite = Hello | OfferReply | Delivery | Output | Left


# ------------------------------------------------------------------------------------------------------- the control stream, server to site


class Welcome(_Message):
    """The server's first message on each connection."""

    version: Short


class Offer(_Message):
    """A job for the site: its signed manifest, and the archive of its files as a blob. Sent again on each connection while the job runs.

    sites: how many the job has; rank: this site's place among them in the order of names.
    """

    job: Name
    manifest: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    signature: Annotated[bytes, msgspec.Meta(max_length=64 << 10)]
    archive: Blob
    rank: Count
    sites: Count


class Assignment(_Message):
    """A task. Sent again on each connection until its update has been received or it is withdrawn."""

    job: Name
    task: TaskRef
    payload: Payload


class Received(_Message):
    """The update is stored: it survives a crash of the server, and the site may forget it. problem: why it was thrown away instead."""

    job: Name
    task: TaskRef
    problem: Failure | None = None


class Withdraw(_Message):
    """The tasks' updates are not waited for any more."""

    job: Name
    tasks: Annotated[list[TaskRef], msgspec.Meta(max_length=10_000)]


class End(_Message):
    """The job is over: the site forgets it. status: completed, failed or stopped."""

    job: Name
    status: Short


FromServer = Welcome | Offer | Assignment | Received | Withdraw | End


# --------------------------------------------------------------------------------------------------------------- asking for something


class Request(_Message):
    """One call of a person or a site: `name` says which, `arguments` are JSON values that the call's own schema checks."""

    name: Short
    arguments: dict[str, Any] = {}


class Reply(_Message):
    """What came of a call: a JSON value, or why there is none."""

    value: Any = None
    failure: Failure | None = None


_encoder = msgspec.msgpack.Encoder()
encode_message = _encoder.encode
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (FromSite, FromServer, Request, Reply)
}


def decode_message(data: bytes | memoryview, kind: Any) -> Any:
    """The message in `data`; `kind` is FromSite, FromServer, Request or Reply. Raises WireError for anything else."""
    try:
        return _decoders[kind].decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, UnicodeError) as error:
        raise WireError(f"this is no valid message: {error}", offset=0) from error


def arguments_of(request: Request, schema: type[T]) -> T:
    """The request's arguments as `schema`, a msgspec struct. Raises ConfigError that names what is wrong."""
    try:
        return msgspec.convert(request.arguments, schema)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{request.name}: {error}") from error
