from __future__ import annotations

import mmap

import numpy as np
import pytest
from blake3 import blake3

from hanse.messages.wire import INLINE_BYTES, Payload
from hanse.site.outgoing import CHUNK_BYTES, Outgoing


def test_a_small_frame_is_copied_and_its_memory_given_back_at_once() -> None:
    released: list[bool] = []
    buffer = bytearray(b"abc")
    outgoing = Outgoing([memoryview(buffer), b"de"], None, lambda: released.append(True))
    assert released == [True]
    buffer[:] = b"xyz"
    assert outgoing.payload == Payload(inline=b"abcde")
    assert outgoing.hash().digest == blake3(b"abcde").digest()
    outgoing.close()
    assert released == [True]


@pytest.mark.parametrize("sizes", [[INLINE_BYTES + 1], [100, 3 * CHUNK_BYTES, 0, 1, 20 * CHUNK_BYTES - 7]])
def test_a_large_frame_is_read_at_any_offset(sizes: list[int]) -> None:
    whole = np.random.default_rng(0).bytes(sum(sizes))
    mapping = mmap.mmap(-1, len(whole))
    mapping[:] = whole
    view, ends = memoryview(mapping), np.cumsum(sizes)
    released: list[bool] = []
    outgoing = Outgoing([view[end - size : end] for end, size in zip(ends, sizes, strict=True)], None, lambda: released.append(True))
    assert outgoing.inline is None
    assert outgoing.hash().digest == blake3(whole).digest()
    assert outgoing.payload == Payload(blob=outgoing.blob)
    for offset, size in ((0, 10), (50, 1000), (len(whole) - 5, 100), (99, CHUNK_BYTES), (0, len(whole))):
        assert outgoing.read(offset, size) == whole[offset : offset + size]
    assert released == []
    outgoing.close()
    outgoing.close()
    assert released == [True]
