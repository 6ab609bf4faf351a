"""Frames between processes of one machine: small ones inline through a socket pair, large ones as shared memory that the receiver maps.

A message is a few bytes with, optionally, one body. A large body is written into a slot, a piece of anonymous shared memory whose
descriptor travels once; the receiver maps it, and gives the slot back with `Body.release`, so that memory is touched first only once. A
body that shall outlive the exchange, or go to many receivers, is written to a `SharedBody` of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hanse.errors import LinkBroken

INLINE_BYTES = 64 << 10
"""Bodies up to this size ride in the socket: cheaper than mapping."""

MAX_SLOTS = 1000

Buffer = bytes | bytearray | memoryview | mmap.mmap
_HEAD = struct.Struct("<BIQI")  # kind, message bytes, body bytes, slot
_INLINE, _SLOT, _NEW_SLOT, _SHARED, _RELEASE = range(5)
_SOCKET_BYTES = 4 << 20
_DESCRIPTOR_BYTES = socket.CMSG_LEN(16 * array("i").itemsize)


def _anonymous_memory() -> int:
    """A descriptor of memory without a name, so nothing is left behind by a killed process."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("hanse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class SharedBody:
    """A body written once and sent to many: anonymous memory that lives as long as somebody maps it."""

    def __init__(self, parts: Iterable[Buffer]) -> None:
        self.descriptor = _anonymous_memory()
        self.size = 0
        with open(self.descriptor, "wb", buffering=0, closefd=False) as file:
            for part in parts:
                left = memoryview(part)
                while left.nbytes:
                    written = file.write(left)
                    left = left[written:]
                    self.size += written

    @classmethod
    def of(cls, descriptor: int) -> SharedBody:
        """A file that is open for reading, as a body; the descriptor is the body's from now on. It is not read here."""
        body = cls.__new__(cls)
        body.descriptor, body.size = descriptor, os.fstat(descriptor).st_size
        return body

    def map(self) -> memoryview:
        """The bytes, in a private mapping: a write stays in this mapping and reaches nobody else."""
        return _map_privately(self.descriptor, self.size)

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class Body:
    """A received body. `buffer` is valid until `release`; calling it gives the memory back to the sender."""

    buffer: memoryview
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Received:
    """One message. `shared` is set, in place of `body`, for a `SharedBody`: a descriptor to map, now this process's own, and its size."""

    message: bytes
    body: Body | None = None
    shared: tuple[int, int] | None = None


class MemoryLink:
    """One end of a two-way, ordered link to another process of this machine.

    Set `max_message_bytes` where the other end is not trusted: a longer message, like anything else that `send` does not do, breaks the
    link before it takes memory.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.max_message_bytes = 1 << 32
        self._sending: list[tuple[int, mmap.mmap]] = []  # slots: descriptor and mapping, by number
        self._free: deque[int] = deque()
        self._mapped: dict[int, tuple[int, mmap.mmap]] = {}  # the peer's slots, by number
        self._inbox = bytearray()
        self._descriptors: deque[int] = deque()

    @staticmethod
    def pair() -> tuple[MemoryLink, MemoryLink]:
        ends = socket.socketpair()
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        return MemoryLink(ends[0]), MemoryLink(ends[1])

    def close(self) -> None:
        """Close this end. Slots that somebody still reads stay mapped until they let go."""
        self.socket.close()
        for descriptor in (*(held for held, _ in (*self._sending, *self._mapped.values())), *self._descriptors):
            os.close(descriptor)
        self._sending, self._mapped = [], {}
        self._descriptors.clear()

    # sending

    def send(self, message: bytes, body: Sequence[Buffer] = ()) -> None:
        """Send a message and a body given in parts. Raises LinkBroken if the other end is gone."""
        size = sum(memoryview(part).nbytes for part in body)
        if len(message) + size <= INLINE_BYTES:
            self._write(_HEAD.pack(_INLINE, len(message), size, 0), message, *body)
            return
        kind, slot = self._fill_slot((*body, message), size + len(message))
        self._write(_HEAD.pack(kind, len(message), size, slot), descriptors=[self._sending[slot][0]] if kind == _NEW_SLOT else [])

    def send_shared(self, message: bytes, body: SharedBody) -> None:
        """Send a message of at most INLINE_BYTES, with a body that many may get."""
        self._write(_HEAD.pack(_SHARED, len(message), body.size, 0), message, descriptors=[body.descriptor])

    def _fill_slot(self, parts: Sequence[Buffer], size: int) -> tuple[int, int]:
        """Write into a slot, a free one if one fits: (kind, slot). The body comes first, so that its arrays stay aligned."""
        self._take_releases()
        fitting = next((slot for slot in self._free if len(self._sending[slot][1]) >= size), None)
        if fitting is None:
            descriptor = _anonymous_memory()
            os.ftruncate(descriptor, size)
            self._sending.append((descriptor, mmap.mmap(descriptor, size)))
            slot, kind = len(self._sending) - 1, _NEW_SLOT
        else:
            self._free.remove(fitting)
            slot, kind = fitting, _SLOT
        with memoryview(self._sending[slot][1]) as target:
            at = 0
            for part in parts:
                view = memoryview(part).cast("B")
                target[at : at + view.nbytes] = view
                at += view.nbytes
        return kind, slot

    def _write(self, *parts: Buffer, descriptors: Sequence[int] = ()) -> None:
        data = b"".join(parts)
        try:
            sent = socket.send_fds(self.socket, [data], list(descriptors)) if descriptors else self.socket.send(data)
            if sent < len(data):
                self.socket.sendall(memoryview(data)[sent:])
        except OSError as error:
            raise LinkBroken(f"a worker process is gone: {error}") from error

    # receiving

    def receive(self) -> Received:
        """Wait for the next message. Raises LinkBroken once the other end is closed."""
        while True:
            if (received := self._parse()) is not None:
                return received
            self._read(0)

    def receive_ready(self) -> list[Received]:
        """All messages that have arrived, without waiting. Raises LinkBroken once the other end is closed and nothing is left."""
        with contextlib.suppress(BlockingIOError):
            self._read(socket.MSG_DONTWAIT)
        messages = []
        while (received := self._parse()) is not None:
            messages.append(received)
        return messages

    def _take_releases(self) -> None:
        """Note the slots that came back while this end was only sending; other messages stay in the inbox."""
        try:
            self._read(socket.MSG_DONTWAIT)
        except (BlockingIOError, LinkBroken):
            return
        while (head := self._head()) is not None and head[0] == _RELEASE:
            del self._inbox[: _HEAD.size]
            self._free.appendleft(head[3])

    def _read(self, flags: int) -> None:
        try:
            data, ancillary, _, _ = self.socket.recvmsg(1 << 18, _DESCRIPTOR_BYTES, flags)  # socket.recv_fds ignores its flags
        except ConnectionError as error:
            raise LinkBroken(f"a worker process is gone: {error}") from error
        if not data:
            raise LinkBroken("a worker process is gone")
        self._inbox += data
        for _, _, packed in ancillary:
            self._descriptors.extend(array("i", packed))

    def _head(self) -> tuple[int, int, int, int] | None:
        return _HEAD.unpack_from(self._inbox) if len(self._inbox) >= _HEAD.size else None

    def _parse(self) -> Received | None:
        while (head := self._head()) is not None:
            kind, message_bytes, size, slot = head
            if message_bytes > self.max_message_bytes or (kind == _INLINE and message_bytes + size > INLINE_BYTES):
                raise LinkBroken(f"the other end announces a message of {message_bytes:,} bytes with a body of {size:,}, which is too long")
            end = _HEAD.size + (message_bytes if kind in (_INLINE, _SHARED) else 0)
            total = end + (size if kind == _INLINE else 0)
            if len(self._inbox) < total:
                return None
            message, inline = bytes(self._inbox[_HEAD.size : end]), bytes(self._inbox[end:total])
            del self._inbox[:total]
            if kind == _RELEASE:
                self._free.appendleft(slot)
            elif kind == _INLINE:
                return Received(message, Body(memoryview(inline), _nothing) if size else None)
            elif kind == _SHARED:
                return Received(message, shared=(self._next_descriptor(), size))
            else:
                return self._open_slot(slot, message_bytes, size, new=kind == _NEW_SLOT)
        return None

    def _open_slot(self, slot: int, message_bytes: int, size: int, *, new: bool) -> Received:
        if new:
            descriptor = self._next_descriptor()
            _never_shrinks(descriptor)
            if slot in self._mapped or len(self._mapped) == MAX_SLOTS or not os.fstat(descriptor).st_size:
                raise LinkBroken("the other end sends shared memory that is empty, or more of it than anybody needs")
            self._mapped[slot] = descriptor, mmap.mmap(descriptor, os.fstat(descriptor).st_size, access=mmap.ACCESS_READ)
        if slot not in self._mapped or size + message_bytes > len(self._mapped[slot][1]):
            raise LinkBroken(f"the other end names {size + message_bytes:,} bytes of shared memory that are not there")
        view = memoryview(self._mapped[slot][1])
        message = bytes(view[size : size + message_bytes])
        if not size:
            self._release(slot)
            return Received(message)
        return Received(message, Body(view[:size], lambda: self._release(slot)))

    def _next_descriptor(self) -> int:
        if not self._descriptors:
            raise LinkBroken("the other end names shared memory and sends no descriptor of it")
        return self._descriptors.popleft()

    def _release(self, slot: int) -> None:
        with contextlib.suppress(LinkBroken):  # a sender that died took its slots with it: there is nobody to tell
            self._write(_HEAD.pack(_RELEASE, 0, 0, slot))


def map_shared(shared: tuple[int, int]) -> memoryview:
    """Map what `Received.shared` names, privately; the descriptor stays open, so that it can be mapped afresh."""
    return _map_privately(*shared)


def _map_privately(descriptor: int, size: int) -> memoryview:
    return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY))


def _never_shrinks(descriptor: int) -> None:
    """Seal memory of the other end: were it cut short, whoever reads its mapping would be killed. Raises LinkBroken if it cannot be."""
    if not hasattr(os, "memfd_create"):
        return
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as error:
        raise LinkBroken(f"the other end's shared memory cannot be sealed: {error}") from error


def _nothing() -> None:
    """An inline body has nothing to give back."""
