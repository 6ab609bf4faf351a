"""An update as it leaves a site: a small one is bytes, a large one stays in the trainer's shared memory and goes out piece by piece."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from blake3 import blake3

from hanse.messages.codec import Buffer
from hanse.messages.wire import INLINE_BYTES, Blob, Payload

CHUNK_BYTES = 1 << 20
_LET_GO_BYTES = 8 << 20


class Outgoing:
    """An update's frame in pieces, as `encode_update` gives it.

    Some of them lie in `mapping`, which is read piece by piece and whose pages are let go again, so that this process never holds more
    than 8 MiB of it. release: gives that memory back; called once by `close`. One of at most INLINE_BYTES is copied and closed at once.
    """

    def __init__(self, pieces: Sequence[Buffer], mapping: mmap.mmap | None = None, release: Callable[[], None] = lambda: None) -> None:
        self.size = sum(memoryview(piece).nbytes for piece in pieces)
        self._pieces = [memoryview(piece).cast("B") for piece in pieces]
        self._mapping, self._release = mapping, release
        self._read_bytes = 0
        self.blob: Blob | None = None
        self.inline: bytes | None = None
        if self.size <= INLINE_BYTES:
            self.inline = b"".join(self._pieces)
            self.blob = Blob(blake3(self.inline).digest(), self.size)
            self.close()
        self._begins = [0, *accumulate(piece.nbytes for piece in self._pieces)]

    @property
    def payload(self) -> Payload:
        """How it travels. A large one has been hashed and uploaded before."""
        return Payload(inline=self.inline) if self.inline is not None else Payload(blob=self.blob)

    def hash(self) -> Blob:
        """Its name. Takes a while: to be called in a thread."""
        if self.blob is None:
            digest = blake3()
            for offset in range(0, self.size, CHUNK_BYTES):
                for part in self._parts(offset, CHUNK_BYTES):
                    digest.update(part)
            self.blob = Blob(digest.digest(), self.size)
        return self.blob

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` of its bytes from `offset` on, as `Client.upload` asks for them."""
        return b"".join(self._parts(offset, size))

    def close(self) -> None:
        """Give the memory back, and forget the frame."""
        self._pieces, self._begins, self._mapping = [], [0], None
        release, self._release = self._release, lambda: None
        release()

    def _parts(self, offset: int, size: int) -> Iterator[memoryview]:
        self._read_bytes += size
        if self._mapping is not None and self._read_bytes >= _LET_GO_BYTES:
            self._read_bytes = 0
            self._mapping.madvise(mmap.MADV_DONTNEED)  # the pages stay in the memory that is mapped here
        end = offset + size
        for begin, piece in zip(self._begins, self._pieces, strict=False):
            if begin < end and begin + piece.nbytes > offset:
                yield piece[max(0, offset - begin) : end - begin]
