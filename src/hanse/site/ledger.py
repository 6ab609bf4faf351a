"""A site's audit log: one JSON object a line, each with the BLAKE3 digest of the line before it.

A line that is altered, removed, added or moved breaks the chain, and `verify` says where. The chain cannot tell that its last lines are
gone, so a head file beside it, `audit.head` for `audit.jsonl`, holds how many lines there are and the digest of the last. Whoever can write
both files can write both anew: `hanse audit head` prints the head, to be kept where they cannot write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Self

import msgspec
from blake3 import blake3

from hanse.errors import ConfigError, StorageFull, WireError

_HEAD_BYTES = 1000
_START_ANEW = "Keep both files for whoever looks into it, away from here; the next start begins a new log."


@dataclass(frozen=True, slots=True)
class Head:
    """Where a ledger ends: how many lines, and the BLAKE3 of the last one in hexadecimal digits. Written as `lines:digest`."""

    lines: int = 0
    digest: str = "0" * 64

    def __str__(self) -> str:
        return f"{self.lines}:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Raises ConfigError if the text is no head."""
        lines, _, digest = text.strip().partition(":")
        if not (lines.isascii() and lines.isdigit() and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
            raise ConfigError(f"{text[:100]!r} is no head of an audit log: it is written as 12:5a1f…, the number of lines and a digest")
        return cls(int(lines), digest)


@dataclass(frozen=True, slots=True)
class Place:
    """A line's end in a ledger: the head there, and the byte."""

    head: Head = Head()
    byte: int = 0


class _Own(msgspec.Struct):
    """What every line has; the facts stand beside it. n counts from 0; previous is the digest of the line before, without its line end."""

    n: int
    time: str
    kind: str
    previous: str


class Ledger:
    """The audit log at `path`, to be written by one process, from any of its threads. `head` is where it ends.

    What a crash left is put in order first, and that is itself written down: a last line that was cut off in the middle is removed (kind
    `cut`); lines that the head counts and that are gone are noted (kind `lost`) with the head there was. A power cut before `sync` can
    do that, and so can somebody who removes them.
    wait: for another process that writes it, which is then no error; for ledgers that are open for a line only.
    since: up to where the caller knows the chain to be good, which is not read again, as `end` gave it.
    Raises WireError for all else that is wrong, as nothing is added to a broken chain, and ConfigError if another process writes it.
    """

    def __init__(self, path: Path, *, wait: bool = False, since: Place = Place()) -> None:
        self.path, self.head = path, Head()
        self.written, self.written_bytes = Counter[str](), Counter[str]()
        """Since it was opened: lines by kind, and the sums of their `bytes`."""
        self._lock = threading.Lock()
        self._encode = msgspec.json.Encoder().encode
        with contextlib.ExitStack() as opened:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._log = opened.enter_context(path.open("ab", buffering=0))
                fcntl.flock(self._log, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                head_path(path).touch()
                self._head_file = opened.enter_context(head_path(path).open("r+b", buffering=0))
            except BlockingIOError as error:
                raise ConfigError(f"{path} is written by another process: stop that one first") from error
            except OSError as error:
                raise ConfigError(f"the audit log {path} cannot be written: {error.strerror}") from error
            self._recover(since)
            opened.pop_all()

    def append(self, kind: str, **facts: Any) -> None:
        """Add a line. It outlives this process at once, and a power cut after the next `sync`. facts: JSON values.

        Raises StorageFull, and adds nothing, if there is no room.
        """
        if wrong := [name for name in ("n", "time", "previous") if name in facts]:
            raise ConfigError(f"each line of the audit log has its own {wrong[0]!r}: call the fact by another name")
        with self._lock, self._room():
            own = {"n": self.head.lines, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind}
            try:
                line = self._encode({**own, **facts, "previous": self.head.digest})
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(f"the audit log takes JSON values only: {error}") from error
            if (written := self._log.write(line + b"\n")) <= len(line):
                os.ftruncate(self._log.fileno(), os.fstat(self._log.fileno()).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.head = _after(self.head, line)
            self._write_head()
            self.written[kind] += 1
            self.written_bytes[kind] += facts.get("bytes", 0)

    @property
    def end(self) -> Place:
        """Where it ends now."""
        return Place(self.head, os.fstat(self._log.fileno()).st_size)

    def sync(self) -> None:
        """What was appended is on the disk when this returns: a power cut cannot take it back."""
        with self._room():
            os.fdatasync(self._log.fileno())

    def close(self) -> None:
        """Sync, and let another process write."""
        with self._log, self._head_file:
            self.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write_head(self) -> None:
        os.pwrite(self._head_file.fileno(), f"{self.head.lines:020d}:{self.head.digest}\n".encode(), 0)  # one length: never torn

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageFull(
                f"the audit log {self.path} cannot be written: {error.strerror}.",
                hint="Make room: a site does nothing that it cannot write down.",
            ) from error

    def _recover(self, since: Place) -> None:
        noted = self._head_file.read(_HEAD_BYTES)
        expected = _read_head(self.path, noted) if noted else Head()
        with _opened(self.path) as log:
            size = os.fstat(log.fileno()).st_size
            self.head, end = _follow(self.path, log, expected, since=since if size >= since.byte else Place())
            torn = size - end
        if not noted and (self.head.lines or torn):
            raise _no_head(self.path)
        with self._room():
            if torn:
                os.ftruncate(self._log.fileno(), end)
            if self.head.lines < expected.lines:
                self.append("lost", lines=expected.lines - self.head.lines, head=str(expected))
            if torn:
                self.append("cut", bytes=torn)
            self._write_head()
            if not noted:
                os.fsync(self._head_file.fileno())


def verify(path: Path, head: Head | None = None) -> int:
    """How many lines the ledger has, all of them in place and unaltered. It may be written meanwhile.

    head: one that was printed earlier and kept elsewhere; the ledger must have gone on from there.
    Raises WireError that names the line, or says that lines are gone; ConfigError if there is no ledger.
    """
    expected = read_head(path)
    with _opened(path) as log:
        found, _ = _follow(path, log, expected, *([head] if head else []))
    for what, each in ((str(head_path(path)), expected), ("the head that was given", head)):
        if each is not None and found.lines < each.lines:
            raise WireError(f"{path} has {found.lines:,} lines, and by {what} {each.lines:,}: the last ones are gone", offset=0)
    return found.lines


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The ledger's lines in order, each as it stands there. Raises WireError at the first that breaks the chain."""
    with _opened(path) as log:
        for line, _, _ in _lines(path, log):
            yield msgspec.json.decode(line)


def read_head(path: Path) -> Head:
    """The head of the ledger at `path`. Raises ConfigError if there is no head file."""
    try:
        return _read_head(path, head_path(path).read_bytes())
    except OSError as error:
        raise _no_head(path) from error


def head_path(path: Path) -> Path:
    """The head file of the ledger at `path`."""
    return path.with_suffix(".head")


def _read_head(path: Path, data: bytes) -> Head:
    try:
        return Head.parse(data.decode("ascii", "replace"))
    except ConfigError as error:
        raise WireError(f"{head_path(path)} was altered: {error.message}", offset=0) from error


def _no_head(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} has no {head_path(path).name} beside it: nobody can tell whether its last lines are gone.", hint=_START_ANEW
    )


def _after(head: Head, line: bytes) -> Head:
    return Head(head.lines + 1, blake3(line).hexdigest())


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _lines(path: Path, log: BinaryIO, since: Place = Place()) -> Iterator[tuple[bytes, Head, int]]:
    """Each line, the head after it, the byte where it ends; a last line that does not end is left out. Raises WireError, see `read`."""
    head, end = since.head, since.byte
    log.seek(end)
    for line in log:
        if not line.endswith(b"\n"):
            return
        where, text = f"{path}, line {head.lines + 1}", line[:-1]
        try:
            own = msgspec.json.decode(text, type=_Own)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise WireError(f"{where} was altered: {error}", offset=end) from error
        if own.n != head.lines:
            raise WireError(f"{where} is number {own.n}, not {head.lines}: lines were removed, added or moved", offset=end)
        if own.previous != head.digest:
            raise WireError(f"{where} does not fit the line before it: one of the two was altered", offset=end)
        head, end = _after(head, text), end + len(line)
        yield text, head, end


def _follow(path: Path, log: BinaryIO, *heads: Head, since: Place = Place()) -> tuple[Head, int]:
    """Where the ledger ends, and at which byte. Raises WireError if the chain is broken or does not go through the heads."""
    head, end, start = since.head, since.byte, since.byte
    for _, head, end in _lines(path, log, since):
        if any(each.lines == head.lines and each.digest != head.digest for each in heads):
            raise WireError(f"{path}, line {head.lines} was altered: the head has another digest for it", offset=start)
        start = end
    return head, end
