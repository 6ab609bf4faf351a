"""What the server and the process that runs a job's workflow say to each other, over a `MemoryLink`."""

from __future__ import annotations

import errno
from typing import Literal

import msgspec

from hanse.errors import Failure, StorageFull
from hanse.messages.wire import Blob, TaskRef

NO_ROOM = 75
"""The status that the process ends with when the disk is full. It is started again when there may be room."""


class _Message(msgspec.Struct, kw_only=True, tag=True, omit_defaults=True):
    pass


class Start(_Message):
    """The first message. folder: the run folder, with the job in it. updates, tasks: folders of blobs. sites: by rank."""

    folder: str
    updates: str
    tasks: str
    sites: list[str]


class Arrived(_Message):
    """A site's update: a blob, or the message's body; or why there is none and will be none."""

    task: TaskRef
    site: str
    blob: Blob | None = None
    failure: Failure | None = None


class Stop(_Message):
    """Stop at once; what was committed lasts."""


class Ask(_Message):
    """Give this task to these sites. It is a blob, or the message's body."""

    task: TaskRef
    sites: list[str]
    blob: Blob | None = None


class GiveUp(_Message):
    """The task is over: all have answered, or nobody waits for the rest any more."""

    task: TaskRef


class Noted(_Message):
    """An event of the run, as JSON."""

    event: bytes


class Committed(_Message):
    """So many commits last now, and so many rounds are done; `events_bytes` of `metrics.jsonl` are of these."""

    commits: int
    rounds: int
    events_bytes: int


class Finished(_Message):
    """The job is over."""

    status: Literal["completed", "failed", "stopped"]
    reason: str = ""


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk is full."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_full, error.exceptions))
    return isinstance(error, StorageFull) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))


ToJob = Start | Arrived | Stop
FromJob = Ask | GiveUp | Noted | Committed | Finished

encode = msgspec.msgpack.Encoder().encode
decode_to_job = msgspec.msgpack.Decoder(ToJob).decode
decode_from_job = msgspec.msgpack.Decoder(FromJob).decode
