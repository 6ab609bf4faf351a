"""A version as one file, to be carried anywhere: an uncompressed ZIP of the version's folder.

Nothing in it is believed: only names that a version has are written, each of a bounded size, and the caller checks the digests. What
version.json does not name by digest is signed itself.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import struct
import zipfile
from pathlib import Path

from hanse.errors import ConfigError, StorageFull, WireError

VERSION, WEIGHTS, CODE, EVIDENCE = "version.json", "model.safetensors", "model.py", "evidence.json"
_SIGNATURE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\.signature")
_MOST_BYTES = {VERSION: 1 << 20, CODE: 4 << 20, EVIDENCE: 64 << 20}
_SIGNATURE_BYTES = 256 << 10
_DIRECTORY_BYTES = 1 << 20
_DATE = (1980, 1, 1, 0, 0, 0)


def is_signature(name: str) -> bool:
    return _SIGNATURE.fullmatch(name) is not None


def pack(folder: Path, target: Path) -> None:
    """Write the version's folder to one file, whole or not at all. The same folder gives the same bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.urandom(8).hex()}.part")
    try:
        with zipfile.ZipFile(part, "x") as sink:
            for path in sorted(path for path in folder.iterdir() if _limit(path.name)):
                entry = zipfile.ZipInfo(path.name, _DATE)
                entry.create_system, entry.file_size = 3, path.stat().st_size
                with path.open("rb") as content, sink.open(entry, "w") as written:
                    shutil.copyfileobj(content, written, 1 << 20)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def unpack(source: Path, folder: Path) -> None:
    """Write what the file holds into the folder, never more bytes than the file has for each entry.

    Raises ConfigError if there is no such file, WireError for whatever `pack` would not have written, StorageFull.
    """
    try:
        raw = io.FileIO(source)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    with _Bounded(raw) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                _check(archive.infolist(), source)
                for entry in archive.infolist():
                    with archive.open(entry) as content, (folder / entry.filename).open("xb") as written:
                        shutil.copyfileobj(content, written, 1 << 18)
        except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
            raise WireError(f"{source} cannot be read: {error}", offset=0) from error
        except OSError as error:
            if error.errno == errno.EINVAL:  # a place before the file's beginning
                raise WireError(f"{source} cannot be read: its directory names places that are not there", offset=0) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"there is no room for {source}: {error.strerror}.", hint="Make room, and do it again.") from error
            raise


class _Bounded(io.BufferedReader):
    """A file that gives only so much at once: a directory that is too long takes no memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(_DIRECTORY_BYTES + 1 if size is None or size < 0 else min(size, _DIRECTORY_BYTES + 1))
        if len(data) > _DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"more than {_DIRECTORY_BYTES:,} bytes of it would have to be read at once")
        return data


def _limit(name: str) -> int | None:
    """How many bytes a file of this name may have; None: a version has no such file."""
    if name == WEIGHTS:
        return 1 << 62
    return _SIGNATURE_BYTES if is_signature(name) else _MOST_BYTES.get(name)


def _check(entries: list[zipfile.ZipInfo], source: Path) -> None:
    seen: set[str] = set()
    for entry in entries:
        limit = _limit(entry.filename)
        if limit is None or entry.orig_filename != entry.filename:
            problem = "is no file of a version"
        elif entry.filename in seen:
            problem = "is there twice"
        elif entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1 or entry.compress_size != entry.file_size:
            problem = "is compressed or encrypted"
        elif entry.file_size > limit or entry.file_size > source.stat().st_size:
            problem = f"says it has {entry.file_size:,} bytes"
        else:
            seen.add(entry.filename)
            continue
        raise WireError(f"{entry.filename!r:.200} in {source} {problem}", offset=max(entry.header_offset, 0))
