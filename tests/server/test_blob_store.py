from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from blake3 import blake3
from obstore.store import S3Store

from hanse.errors import ConfigError, Refused, StorageFull, WireError
from hanse.messages.wire import Blob
from hanse.server.blob_store import BlobStore

DATA = os.urandom((9 << 20) + 17)  # more than one part
BLOB = Blob(blake3(DATA).digest(), len(DATA))


async def test_a_kept_blob_comes_back_to_an_empty_folder(bucket: str, tmp_path: Path) -> None:
    here = BlobStore(tmp_path / "here", bucket)
    assert here.folder.write([DATA]) == BLOB
    await here.keep(BLOB)
    there = BlobStore(tmp_path / "there", bucket)
    assert not there.folder.has(BLOB)
    await there.fetch(BLOB)
    assert bytes(there.folder.map(BLOB)) == DATA
    await there.fetch(BLOB)  # it is there already
    await there.remove(BLOB)
    assert not there.folder.has(BLOB)
    with pytest.raises(Refused, match="lacks the blob"):
        await there.fetch(BLOB)


async def test_bytes_that_are_not_the_blob_are_not_believed(bucket: str, tmp_path: Path) -> None:
    await S3Store.from_url(bucket).put_async(BLOB.hex, DATA[:-1] + b"?" if DATA[-1:] != b"?" else DATA[:-1] + b"!")
    store = BlobStore(tmp_path / "here", bucket)
    with pytest.raises(WireError, match="digest is another one"):
        await store.fetch(BLOB)
    assert not store.folder.has(BLOB)


async def test_a_store_that_does_not_work_is_said(bucket: str, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "here", "s3://no-such-bucket/x")
    store.folder.write([DATA])
    with pytest.raises(StorageFull, match="s3://no-such-bucket/x does not work"):
        await store.keep(BLOB)


async def test_a_folder_alone_keeps_and_forgets(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "here")
    with pytest.raises(Refused, match="is not here"):
        await store.keep(BLOB)
    with pytest.raises(Refused, match="is not here"):
        await store.fetch(BLOB)
    store.folder.write([DATA])
    await store.keep(BLOB)
    await store.fetch(BLOB)
    await store.remove(BLOB)
    assert not store.folder.has(BLOB)


async def test_only_old_blobs_that_nobody_wants_are_cleaned_away(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "here")
    wanted, old, fresh = (store.folder.write([text]) for text in (b"wanted", b"old", b"fresh"))
    long_ago = time.time() - 25 * 3600
    for blob in (wanted, old):
        os.utime(store.folder.path(blob), (long_ago, long_ago))
    await store.clean([wanted])
    assert [store.folder.has(blob) for blob in (wanted, old, fresh)] == [True, False, True]


@pytest.mark.parametrize("url", ["gs://bucket/x", "ftp://x"])
def test_another_kind_of_place_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        BlobStore(tmp_path, url)
