"""Where the server keeps its blobs: a folder, or an S3-compatible store with a folder before it.

The server's peers always read and write files of the folder. With a store behind it, a blob that has to last goes there before anybody is
told that it is kept, and one that the folder lacks comes from there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hanse.errors import ConfigError, NotInstalled, Refused, StorageFull
from hanse.messages.wire import Blob
from hanse.transport.blobs import FolderBlobs

_PART_BYTES = 8 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000 of an object
_AT_ONCE = 3
_UNWANTED_S = 24 * 3600.0


class BlobStore:
    """Blobs that have to last. folder: where they are read and written.

    url: None, or such as `s3://bucket/prefix`; credentials, region and endpoint come from the usual AWS_* environment variables.
    Raises ConfigError for another URL, NotInstalled if the extra `s3` is missing.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.folder = FolderBlobs(folder)
        self._bucket: Any = None if url is None else _bucket(url)
        self._url = url

    async def keep(self, blob: Blob) -> None:
        """Returns when the blob, which is in the folder, lasts. Raises Refused if it is not there, StorageFull if the store fails."""
        held = self.folder.map(blob)  # so that nobody overwrites the file meanwhile
        if self._bucket is not None:
            part_bytes = max(_PART_BYTES, blob.size // _MOST_PARTS)
            with self._errors():
                await self._bucket.put_async(blob.hex, self.folder.path(blob), chunk_size=part_bytes, max_concurrency=_AT_ONCE)
        held.release()

    async def fetch(self, blob: Blob) -> None:
        """Returns when the blob is in the folder. Raises Refused if there is none, WireError if it is not what its name says."""
        if self.folder.has(blob):
            return
        if self._bucket is None:
            raise Refused(f"the blob {blob.hex[:16]}… is not here.", hint="Was the server's folder of blobs changed?")
        incoming, at = self.folder.incoming(blob), 0
        try:
            with self._errors():
                try:
                    found = await self._bucket.get_async(blob.hex)
                except FileNotFoundError as error:
                    raise Refused(f"the object store {self._url} lacks the blob {blob.hex[:16]}…") from error
                async for chunk in found.stream(min_chunk_size=_PART_BYTES):
                    fresh = memoryview(chunk)[max(0, incoming.offset - at) :]
                    at += len(chunk)
                    if fresh:
                        incoming.write(fresh)
            incoming.finish()
        finally:
            incoming.close()

    async def remove(self, blob: Blob) -> None:
        """Forget the blob."""
        self.folder.remove(blob)
        if self._bucket is not None:
            with self._errors(), contextlib.suppress(FileNotFoundError):
                await self._bucket.delete_async(blob.hex)

    async def clean(self, wanted: Collection[Blob]) -> None:
        """Remove what nobody wants from the folder, and has not for a day: uploads that came to nothing."""
        names = {blob.hex for blob in wanted}
        for path in self.folder.folder.glob("[0-9a-f][0-9a-f]/*"):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                if path.name not in names and time.time() - about.st_mtime > _UNWANTED_S:
                    self.folder.remove(Blob(bytes.fromhex(path.name), about.st_size))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from obstore.exceptions import BaseError  # an extra that most servers do without

        try:
            yield
        except (BaseError, FileNotFoundError, PermissionError) as error:
            raise StorageFull(f"the object store {self._url} does not work: {error}", hint="Is it up, and are AWS_* set?") from error


def _bucket(url: str) -> Any:
    if not url.startswith("s3://"):
        raise ConfigError(f"the blobs' place is {url!r}: it must be a folder, or such as s3://bucket/prefix")
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise NotInstalled("an object store needs the package obstore.", hint="pip install 'hanse[s3]'") from error
    return S3Store.from_url(url)
