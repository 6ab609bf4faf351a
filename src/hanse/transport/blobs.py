"""Blobs in a folder: bytes named by their BLAKE3 digest, written once, mapped by those who read them.

    xx/HEX              a whole blob, verified; xx are the first two digits of HEX
    incoming/HEX.N.part a blob that is still coming: its bytes, and behind the last one 8 bytes that count those already here
    spare/N             files of removed blobs: overwriting pages that exist is four times as fast as writing new ones

A name appears by a rename, so a reader never sees half a blob, and after `kill -9` a part goes on where it stood. Against a power cut,
pass durable=True: then a blob is forced to the disk before it gets its name.

Locks (flock) keep spares honest across processes: who reads holds a shared lock for as long as the descriptor, or a mapping made from it,
lives; a file that is still read is never overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from hanse.errors import Refused, StorageFull, WireError
from hanse.messages.codec import Buffer
from hanse.messages.lasting import LastingMap
from hanse.messages.wire import Blob
from hanse.sandbox import open_beneath

CHUNK_BYTES = 1 << 20
SPARES = 8
"""So many files of removed blobs are kept, and none while less than a tenth of the disk is free."""

FORGOTTEN_AFTER_S = 24 * 3600.0
"""A part that nobody has added to for so long is deleted when the folder is opened."""

_SPARE_FROM_BYTES = 1 << 20
_COUNT_BYTES = 8
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger(__name__)


class FolderBlobs:
    """The blobs of one folder. Several processes may use it at once.

    Raises StorageFull, from whatever writes, if there is no room even without the spares; what was kept before is whole.
    """

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        self.folder = Path(folder)
        self.durable = durable
        self._incoming = self.folder / "incoming"
        self._spare = self.folder / "spare"
        for made in (self._incoming, self._spare):
            made.mkdir(parents=True, exist_ok=True)
        self._delete_parts("*.part", untouched_s=FORGOTTEN_AFTER_S)

    def path(self, blob: Blob) -> Path:
        """Where the blob lies, or would lie."""
        return blob_path(self.folder, blob)

    def has(self, blob: Blob) -> bool:
        try:
            return self.path(blob).stat().st_size == blob.size
        except FileNotFoundError:
            return False

    def write(self, parts: Iterable[Buffer]) -> Blob:
        """Keep the parts, joined, as one blob, and name it."""
        expected = sum(memoryview(part).nbytes for part in parts) if isinstance(parts, list | tuple) else 0
        path = self._incoming / f"new-{os.urandom(8).hex()}.part"
        descriptor = self._new_file(path, expected)
        try:
            hasher, size = blake3(), 0
            for part in parts:
                for piece in _pieces(part):
                    hasher.update(piece)
                    self.write_at(descriptor, piece, size)
                    size += piece.nbytes
            blob = Blob(hasher.digest(), size)
            self._keep(descriptor, path, blob)
            return blob
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def add_file(self, path: Path) -> Blob:
        """Keep a copy of the file, and name it."""
        with Path(path).open("rb") as file:
            return self.write(iter(lambda: file.read(CHUNK_BYTES), b""))

    def map(self, blob: Blob) -> memoryview:
        """The blob's bytes, read-only, without reading them. The file is not overwritten as long as the view lives.

        Raises Refused if the blob is not here.
        """
        return map_file(self.path(blob))

    def remove(self, blob: Blob) -> None:
        """Forget the blob, if it is here. Its file may stay as a spare; those who have mapped it keep what they see."""
        path = self.path(blob)
        if not path.exists():
            return
        if blob.size >= _SPARE_FROM_BYTES and len(list(self._spare.iterdir())) < SPARES and not self._crowded():
            with contextlib.suppress(FileNotFoundError):
                path.replace(self._spare / os.urandom(8).hex())
        else:
            path.unlink(missing_ok=True)

    def incoming(self, blob: Blob) -> Incoming:
        """Where the blob's bytes go as they come: on with the longest part that nobody else is writing, else a new part.

        Raises StorageFull if the disk has no room for the rest.
        """
        if self.has(blob):
            return Incoming(self, blob, None, self.path(blob), blob.size)
        taken = set()
        found: list[tuple[int, int, Path]] = []
        for path in self._incoming.glob(f"{blob.hex}.*.part"):
            taken.add(path.name)
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                descriptor = _open_locked(path, os.O_RDWR, fcntl.LOCK_EX)
                found.append((_held(descriptor, blob.size), descriptor, path))
        found.sort(reverse=True)
        for _, descriptor, path in found[1:]:
            path.unlink(missing_ok=True)
            os.close(descriptor)
        if found:
            held, descriptor, path = found[0]
        else:
            number = next(n for n in range(len(taken) + 1) if f"{blob.hex}.{n}.part" not in taken)
            path, held = self._incoming / f"{blob.hex}.{number}.part", 0
            descriptor = self._new_file(path, blob.size, with_count=True)
        try:
            self._make_room(blob.size - held, os.fstat(descriptor).st_blocks * 512 - held)
        except StorageFull:
            if not held:
                path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return Incoming(self, blob, descriptor, path, held)

    def drop_spares(self) -> None:
        """Give the room of the spares back to the disk."""
        for spare in self._spare.iterdir():
            spare.unlink(missing_ok=True)

    def write_at(self, descriptor: int, piece: Buffer, offset: int) -> None:
        view = memoryview(piece)
        while view:
            try:
                written = os.pwrite(descriptor, view, offset)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not any(self._spare.iterdir()):
                    raise StorageFull(
                        f"{self.folder}: {error.strerror}.", hint="Make room on this disk, or move the folder to a larger one."
                    ) from error
                self.drop_spares()
                continue
            view, offset = view[written:], offset + written

    def _keep(self, descriptor: int, part: Path, blob: Blob) -> Path:
        """Give a verified part its name. The lock goes first: a reader must not find it on a whole blob."""
        path = self.path(blob)
        path.parent.mkdir(exist_ok=True)
        os.ftruncate(descriptor, blob.size)
        if self.durable:
            os.fsync(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        part.replace(path)
        if self.durable:
            for folder in (path.parent, self.folder):
                _sync_folder(folder)
        return path

    def _new_file(self, path: Path, size: int, *, with_count: bool = False) -> int:
        """An open, locked file under a name of `incoming`: the spare that fits best, or a new one."""
        descriptor, spare = self._take_spare(size) if size >= _SPARE_FROM_BYTES else (None, None)
        if descriptor is None or spare is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return descriptor
        if with_count:
            os.ftruncate(descriptor, size)  # what lies behind is another blob's, and no count
        spare.rename(path)
        return descriptor

    def _take_spare(self, size: int) -> tuple[int, Path] | tuple[None, None]:
        by_size = [(entry.stat().st_size, entry.name) for entry in os.scandir(self._spare)]
        for _, name in sorted((abs(has - size), name) for has, name in by_size if size <= 2 * has <= 4 * size):
            spare = self._spare / name
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                return _open_locked(spare, os.O_RDWR, fcntl.LOCK_EX), spare
        return None, None

    def _make_room(self, wanted: int, allocated: int) -> None:
        """Raises StorageFull if the disk cannot take `wanted` bytes, of which `allocated` already have their place."""
        missing = wanted - max(0, allocated)
        if missing > _free_bytes(self.folder):
            self.drop_spares()
            if missing > (free := _free_bytes(self.folder)):
                raise StorageFull(
                    f"{self.folder}: the blob needs {missing:,} bytes more and the disk has {free:,}.",
                    hint="Make room on this disk, or move the folder to a larger one.",
                )

    def _crowded(self) -> bool:
        disk = os.statvfs(self.folder)
        return disk.f_bavail * 10 < disk.f_blocks

    def _delete_parts(self, pattern: str, *, untouched_s: float = 0.0) -> None:
        now = time.time()
        for path in self._incoming.glob(pattern):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                if now - path.stat().st_mtime >= untouched_s:
                    descriptor = _open_locked(path, os.O_RDWR, fcntl.LOCK_EX)
                    path.unlink(missing_ok=True)
                    os.close(descriptor)


class Incoming:
    """A blob on its way in. Only one is at work on a part; a second for the same blob writes to a part of its own.

    offset: how many bytes are here; the next ones go there.
    """

    def __init__(self, blobs: FolderBlobs, blob: Blob, descriptor: int | None, path: Path, offset: int) -> None:
        self.blob, self.offset = blob, offset
        self._blobs, self._descriptor, self._path = blobs, descriptor, path
        self._hasher: blake3 | None = None

    def write(self, chunk: Buffer) -> None:
        """Add bytes. Raises WireError if there are more than the blob has, and StorageFull: both delete the part."""
        size = memoryview(chunk).nbytes
        if self._descriptor is None or self.offset + size > self.blob.size:
            self._delete()
            raise WireError(f"the blob {self.blob.hex[:16]}… has {self.blob.size} bytes and more came", offset=self.offset)
        try:
            self._blobs.write_at(self._descriptor, chunk, self.offset)
            self._so_far().update(chunk)
            self.offset += size
            self._blobs.write_at(self._descriptor, self.offset.to_bytes(_COUNT_BYTES, "little"), self.blob.size)
        except StorageFull:
            self._delete()
            raise

    def finish(self) -> Path:
        """The whole blob's path. Raises WireError, and deletes the part, if it is not what its name says."""
        if self._descriptor is None:
            return self._path
        if self.offset != self.blob.size:
            problem = f"the blob {self.blob.hex[:16]}… has {self.blob.size} bytes and {self.offset} came"
        elif self._so_far().digest() != self.blob.digest:
            problem = f"these bytes are not the blob {self.blob.hex[:16]}…: their digest is another one"
        else:
            path = self._blobs._keep(self._descriptor, self._path, self.blob)
            self.close()
            self._blobs._delete_parts(f"{self.blob.hex}.*.part")
            return path
        self._delete()
        raise WireError(problem, offset=self.offset, hint="It is to be sent again from its beginning.")

    def close(self) -> None:
        """Stop here; what came is kept, and the next `incoming` of this blob goes on with it. Closing twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _so_far(self) -> blake3:
        """The digest of what is here; of an earlier connection's bytes it is taken from the file."""
        if self._hasher is None:
            self._hasher = blake3(max_threads=blake3.AUTO if self.offset else 1)
            if self.offset and self._descriptor is not None:
                with mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ) as held, memoryview(held) as view, view[: self.offset] as here:
                    self._hasher.update(here)
        return self._hasher

    def _delete(self) -> None:
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            self.close()


def blob_path(folder: Path, blob: Blob) -> Path:
    """Where a blob lies in a folder of blobs, for processes that only read there."""
    return folder / blob.hex[:2] / blob.hex


def blob_of(file: BinaryIO) -> Blob:
    """The name of the bytes that are left in a file, which may change meanwhile."""
    hasher, size = blake3(), 0
    while chunk := file.read(CHUNK_BYTES):
        hasher.update(chunk)
        size += len(chunk)
    return Blob(hasher.digest(), size)


def open_file(path: Path, *, beneath: Path | None = None) -> int:
    """A descriptor to read a blob's file by. As long as it, a copy of it or a mapping of it is open, in any process, the file is not
    overwritten. beneath: a folder above it that a job's code can write, where no link is followed. Raises Refused if the blob is not
    there."""
    for last in (False, True):
        try:
            return _open_locked(path, os.O_RDONLY, fcntl.LOCK_SH, beneath)
        except OSError as error:
            if beneath is None and not isinstance(error, FileNotFoundError | BlockingIOError):
                raise
            if last:
                raise Refused(f"the blob {path.name[:16]}… is not here.", hint="It was removed, or never came.") from error
    raise AssertionError


def map_file(path: Path) -> memoryview:
    """A blob's file, mapped read-only; see `FolderBlobs.map`."""
    descriptor = open_file(path)
    try:
        if not os.fstat(descriptor).st_size:
            return memoryview(b"")
        return memoryview(LastingMap(descriptor, 0, access=mmap.ACCESS_READ))  # holds a copy of the descriptor, and with it the lock
    finally:
        os.close(descriptor)


def take_over(spare: Path, path: Path) -> bool:
    """Give a file that nobody reads by `open_file` or `map_file` any more another name, to be overwritten. False if it is read, or not
    there."""
    try:
        descriptor = _open_locked(spare, os.O_RDWR, fcntl.LOCK_EX)
    except (FileNotFoundError, BlockingIOError):
        return False
    spare.rename(path)
    os.close(descriptor)
    return True


def _open_locked(path: Path, flags: int, lock: int, beneath: Path | None = None) -> int:
    """Open and lock at once, or not at all. Raises FileNotFoundError, if another holds the lock BlockingIOError, and as `open_beneath`."""
    descriptor = open_beneath(beneath, path.relative_to(beneath), flags) if beneath else os.open(path, flags | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
        if not os.path.samestat(os.stat(path), os.fstat(descriptor)):
            raise FileNotFoundError(errno.ENOENT, "it was renamed meanwhile", str(path))
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _held(descriptor: int, size: int) -> int:
    """How many bytes of a part are here, by the count behind its end."""
    count = int.from_bytes(os.pread(descriptor, _COUNT_BYTES, size), "little")
    return count if count <= size else 0


def _pieces(part: Buffer) -> Iterator[memoryview]:
    view = memoryview(part).cast("B")
    for begin in range(0, len(view), CHUNK_BYTES):
        yield view[begin : begin + CHUNK_BYTES]


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
