"""What an agent and its trainers say to each other over a `MemoryLink`: small messages in MessagePack, frames as bodies.

The agent trusts nothing that comes from a trainer, which runs a job's code: it reads strictly, and more than one answer to a task, or any
other message, ends the trainer.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from hanse.errors import Failure, WireError
from hanse.messages.wire import Short, TaskRef

Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Message(msgspec.Struct, tag=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    pass


class Begin(_Message):
    """The first message. folder: the job's files. site, rank, sites, config: who this site is in the job, with JSON values for its code.

    cpu_s, memory_bytes: what the process may take in all, CPU seconds and private memory.
    """

    folder: str
    site: str
    rank: int
    sites: int
    config: dict[str, Any] = {}
    threads: int = 1
    cpu_s: float | None = None
    memory_bytes: int | None = None


class Restore(_Message):
    """What the site keeps between tasks is what the body holds, a frame; nothing, without a body."""


class Perform(_Message):
    """Do the task in the body."""

    task: TaskRef


class Close(_Message):
    """The job is over: let the script end, then end."""


class Performed(_Message):
    """The body is the update. state: what the site keeps from now on, a frame; None for nothing. cpu_s: what the process used in all."""

    task: TaskRef
    state: bytes | None = None
    cpu_s: Seconds = 0


class Lines(_Message):
    """Lines that the code printed."""

    lines: Annotated[list[Short], msgspec.Meta(max_length=1_000)]


class Unfit(_Message):
    """The job's code cannot be run: it does not import, say. The trainer ends."""

    failure: Failure
    traceback: str = ""


class Closed(_Message):
    """The script has ended; `problem` is what went wrong in that."""

    problem: Failure | None = None


ToTrainer = Begin | Restore | Perform | Close
FromTrainer = Performed | Lines | Unfit | Closed

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(ToTrainer).decode
_decoder = msgspec.msgpack.Decoder(FromTrainer)


def decode_answer(data: bytes) -> FromTrainer:
    """A trainer's message. Raises WireError if it is none."""
    try:
        message: FromTrainer = _decoder.decode(data)
        return message
    except (msgspec.MsgspecError, ValueError, RecursionError, UnicodeError) as error:
        raise WireError(f"the training process sent no valid message: {error}", offset=0) from error
