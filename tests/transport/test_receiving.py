from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from blake3 import blake3

from hanse.errors import WireError
from hanse.messages.wire import Blob
from hanse.transport.blobs import FolderBlobs
from hanse.transport.receiving import Receiver

MIB = 1 << 20


def named(data: bytes) -> Blob:
    return Blob(blake3(data).digest(), len(data))


@pytest.mark.parametrize("pieces", [0, 1, 3, 4, 9])
async def test_pieces_become_the_blob(tmp_path: Path, pieces: int) -> None:
    data = os.urandom(pieces * 1000)
    async with Receiver(FolderBlobs(tmp_path).incoming(named(data))) as receiver:
        for piece in range(pieces):
            await receiver.write(data[piece * 1000 : piece * 1000 + 1000])
        assert receiver.offset == len(data)
        assert (await receiver.finish()).read_bytes() == data


@pytest.mark.parametrize("pieces", [1, 4, 6, 11])
async def test_what_came_before_an_end_is_kept(tmp_path: Path, pieces: int) -> None:
    blobs, data = FolderBlobs(tmp_path), os.urandom(12 * MIB)

    async def receive() -> None:
        async with Receiver(blobs.incoming(named(data))) as receiver:
            for piece in range(pieces):
                await receiver.write(data[piece * MIB : piece * MIB + MIB])
            await asyncio.Event().wait()

    receiving = asyncio.create_task(receive())
    for _ in range(100):
        await asyncio.sleep(0)  # cancelled while the thread writes, or when it has
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    incoming = blobs.incoming(named(data))
    assert incoming.offset % MIB == 0
    incoming.write(data[incoming.offset :])
    assert incoming.finish().read_bytes() == data


async def test_too_many_bytes_are_said_and_deleted(tmp_path: Path) -> None:
    blobs, blob = FolderBlobs(tmp_path), named(b"12345")

    async def receive() -> None:
        async with Receiver(blobs.incoming(blob)) as receiver:
            for _ in range(20):
                await receiver.write(b"1234")

    with pytest.raises(WireError, match="more came"):
        await receive()
    incoming = blobs.incoming(blob)
    assert incoming.offset == 0
    incoming.close()
