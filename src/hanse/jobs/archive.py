"""A job on its way: a ZIP of its folder, a manifest that says what is in it, and the submitter's signature over the manifest.

The archive itself is not signed: the manifest names every file with its digest and size, and nothing else is unpacked. So the receiver
verifies the signature first, reads the manifest next, and opens the archive last, with every size known.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

import msgspec
from blake3 import blake3

from hanse.errors import ConfigError, IdentityError, StorageFull, WireError
from hanse.identity.certificates import Identity
from hanse.identity.signatures import Signer, verify
from hanse.jobs.bundle import FORMAT, MODEL, JobFile, read_folder
from hanse.messages.wire import Count, Name, Resources

MAX_MANIFEST_BYTES = 1 << 20
"""What an Offer has room for: about 9,000 files."""

_CHUNK_BYTES = 1 << 20
_LARGEST_READ_BYTES = 4 << 20  # the directory of 9,000 files is smaller
_MAX_NAME_CHARACTERS = 500
_DATE = (1980, 1, 1, 0, 0, 0)
_STORED = ".safetensors"  # numbers that hardly get shorter

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Content(NamedTuple):
    """What is in a file: BLAKE3 in hexadecimal digits, and the size in bytes."""

    digest: Digest
    size: Count


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a submitter signs: the job's files and what it asks for. Raises ConfigError for names that no folder may hold.

    digests: each file of the job folder. sites: whom it is for; empty: whoever is there. min_sites: fewer are not enough.
    site_config: JSON values for single sites, which all of them can read. resources: what it takes at each site.
    workflow: the recipe's kind. rounds: at most. created: when, in UTC. submitter: the name in the certificate that it is signed with.
    """

    format: int
    name: Annotated[str, msgspec.Meta(max_length=100, pattern=r"^[\w-]+$")]
    digests: dict[str, Content]
    sites: list[Name]
    site_config: dict[str, dict[str, Any]]
    min_sites: Annotated[int, msgspec.Meta(ge=1)]
    resources: Resources
    workflow: str
    rounds: Count
    created: datetime
    submitter: Name

    def __post_init__(self) -> None:
        _check_names(self.digests)

    @property
    def size(self) -> int:
        """Of all files together, in bytes."""
        return sum(content.size for content in self.digests.values())


def pack(
    folder: Path,
    archive: Path,
    *,
    signer: Signer,
    sites: Sequence[str] = (),
    site_config: Mapping[str, Mapping[str, Any]] | None = None,
    min_sites: int | None = None,
    resources: Resources | None = None,
) -> tuple[bytes, bytes]:
    """Write the job folder to `archive`, which takes its name when it is complete. Returns the manifest and its signature.

    The same folder gives the same archive. `__pycache__` is left out. min_sites: all of `sites`, or 1, unless it is said.
    Raises ConfigError for a folder that is no job, links and other special files in it, and names that not every system can hold.
    """
    job = read_folder(folder)
    names = _files(folder)
    _check_names(names)
    part = archive.with_name(f".{archive.name}.{os.urandom(8).hex()}.part")
    try:
        digests = _write(part, {name: folder / name for name in names})
        manifest = Manifest(
            format=FORMAT,
            name=job.name,
            digests=digests,
            sites=sorted(sites),
            site_config={site: dict(config) for site, config in (site_config or {}).items()},
            min_sites=max(len(sites), 1) if min_sites is None else min_sites,
            resources=resources or Resources(),
            workflow=job.recipe,
            rounds=_rounds(job),
            created=datetime.now(UTC),  # to the microsecond: it tells a job from the same one submitted again
            submitter=signer.identity.name,
        )
        signed = _encoded(manifest)
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)
    return signed, signer.sign(signed)


def open_manifest(manifest: bytes, signature: bytes, roots: bytes, *, now: datetime | None = None) -> tuple[Manifest, Identity]:
    """What is signed, and who signed it; nothing is read before the signature is good.

    Raises IdentityError for a signature that is not accepted or a submitter other than the signer, ConfigError for a manifest of another
    format or with names that may not be, WireError for anything else.
    """
    if len(manifest) > MAX_MANIFEST_BYTES:
        raise WireError(f"a manifest of {len(manifest):,} bytes: at most {MAX_MANIFEST_BYTES:,} are read", offset=MAX_MANIFEST_BYTES)
    signer = verify(manifest, signature, roots, now=now)
    opened = _decoded(manifest)
    if opened.submitter != signer.name:
        raise IdentityError(f"job {opened.name!r} says that {opened.submitter!r} submits it, and {signer.name!r} has signed it")
    return opened, signer


def unpack(archive: Path, manifest: Manifest, folder: Path, *, may_lack: Collection[str] = (), max_bytes: int | None = None) -> None:
    """Make `folder` of the archive, all of it or nothing. Whatever the archive holds, only the manifest's files are written.

    may_lack: files of the manifest that need not be there, such as the first model at a site. max_bytes: of all files together.
    Raises ConfigError if the folder is not empty, StorageFull if there is no room, and WireError, at the entry's place in the archive, for
    an entry that the manifest does not name, a missing one, a link, a wrong size or digest, and whatever is no archive.
    """
    if manifest.size > (manifest.size if max_bytes is None else max_bytes):
        raise WireError(f"the files of job {manifest.name!r} take {manifest.size:,} bytes: at most {max_bytes:,} are unpacked", offset=0)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: a job is unpacked to a folder of its own")
    part = folder.with_name(f".{folder.name}.{os.urandom(8).hex()}.part")
    try:
        with _room(folder), _opened(archive) as source:
            part.mkdir(parents=True)
            for entry in _entries(source, manifest, may_lack):
                _unpack(source, entry, manifest.digests[entry.filename], part / entry.filename)
            part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def trimmed(archive: Path, target: Path, leave_out: Collection[str]) -> None:
    """Write an archive that `unpack` has taken to `target` without some of its files. The manifest and its signature stay good."""
    part = target.with_name(f".{target.name}.{os.urandom(8).hex()}.part")
    try:
        with _room(target), _opened(archive) as source, zipfile.ZipFile(part, "x") as sink:
            for entry in source.infolist():
                if entry.filename not in leave_out:
                    with source.open(entry) as content:
                        _add(sink, entry.filename, entry.file_size, content)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def code_digest(manifest: Manifest) -> str:
    """One digest of what a site runs: of all files but the first model, as `blake3:` and 64 hexadecimal digits. A policy can name it.

    The job file names the digests of the others: take the first model's out there if another model shall not need a new permission.
    """
    parts = [[name, *manifest.digests[name]] for name in sorted(manifest.digests) if name != MODEL]
    return f"blake3:{blake3(msgspec.json.encode(parts)).hexdigest()}"


# ---------------------------------------------------------------------------------------------------------------------------- writing


def _files(folder: Path) -> list[str]:
    """The names of a job folder's files, sorted. Raises ConfigError for anything that is neither a file nor a folder."""
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if "__pycache__" in name.parts:
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{path} is a link or a special file: a job holds plain files only. Put the file itself there.")
        if path.is_file():
            names.append(name.as_posix())
    return sorted(names)


def _rounds(job: JobFile) -> int:
    own = job.arguments.get("arguments") if job.workflow else job.arguments
    rounds = own.get("rounds", 1) if isinstance(own, dict) else 1
    if type(rounds) is not int or rounds < 0:
        raise ConfigError(f"job {job.name!r} has rounds={rounds!r}: it must be a whole number from 0")
    return rounds


def _encoded(manifest: Manifest) -> bytes:
    """The manifest's bytes. Raises ConfigError if a receiver would not take them."""
    try:
        data = msgspec.json.encode(manifest)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"job {manifest.name!r} cannot be submitted: {error}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ConfigError(
            f"job {manifest.name!r} has {len(manifest.digests):,} files and a manifest of {len(data):,} bytes: at most"
            f" {MAX_MANIFEST_BYTES:,} can travel. Put many small files into one, or leave out what the job does not need."
        )
    try:
        _decoded(data)
    except WireError as error:
        raise ConfigError(f"job {manifest.name!r} cannot be submitted: {error.message}") from error
    return data


def _write(archive: Path, paths: Mapping[str, Path]) -> dict[str, Content]:
    with _room(archive), zipfile.ZipFile(archive, "x") as sink:
        digests = {}
        for name, path in paths.items():
            with path.open("rb") as content:
                digests[name] = _add(sink, name, path.stat().st_size, content)
    return digests


def _add(sink: zipfile.ZipFile, name: str, size: int, content: IO[bytes]) -> Content:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.compress_type = zipfile.ZIP_STORED if name.endswith(_STORED) else zipfile.ZIP_DEFLATED
    entry.create_system = 3  # Unix, wherever it is packed
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    entry.file_size = size
    digest = blake3(max_threads=blake3.AUTO)
    with sink.open(entry, "w") as target:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
    return Content(digest.hexdigest(), entry.file_size)


# ---------------------------------------------------------------------------------------------------------------------------- reading


class _Format(msgspec.Struct):
    format: int


def _decoded(data: bytes) -> Manifest:
    try:
        if (format := msgspec.json.decode(data, type=_Format).format) != FORMAT:
            raise ConfigError(f"the manifest is of format {format}; this version of Hanse reads {FORMAT}")
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"this is no manifest: {error}", offset=0) from error


class _Bounded(io.BufferedReader):
    """A file that gives only so much at once: a directory that is too long takes no memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(_LARGEST_READ_BYTES + 1 if size is None or size < 0 else min(size, _LARGEST_READ_BYTES + 1))
        if len(data) > _LARGEST_READ_BYTES:
            raise zipfile.BadZipFile(f"more than {_LARGEST_READ_BYTES:,} bytes of it would have to be read at once")
        return data


@contextlib.contextmanager
def _reading(what: str, offset: int) -> Iterator[None]:
    """Whatever the standard library raises for bytes that are no archive, as WireError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        raise WireError(f"{what} cannot be read: {error}", offset=offset) from error


@contextlib.contextmanager
def _room(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"there is no room for {path}: {error.strerror}.", hint="Make room, and do it again.") from error
        if error.errno in (errno.EINVAL, errno.ENAMETOOLONG):
            raise WireError(f"{path}: {error.strerror}", offset=0) from error
        raise


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; nothing but its directory is read. Raises ConfigError if there is no such file."""
    try:
        raw = io.FileIO(archive)
    except OSError as error:
        raise ConfigError(f"{archive}: {error.strerror}") from error
    with _Bounded(raw) as file:
        with _reading(f"{archive}, the archive,", 0):
            opened = zipfile.ZipFile(file)
        with opened:
            yield opened


def _entries(source: zipfile.ZipFile, manifest: Manifest, may_lack: Collection[str]) -> list[zipfile.ZipInfo]:
    """The archive's entries, each of them named by the manifest, once. Raises WireError for any other, and for one that is missing."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in source.infolist():
        name, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
        if name not in manifest.digests or entry.orig_filename != name:
            problem = "is not in the manifest"
        elif name in entries:
            problem = "is there twice"
        elif kind not in (0, stat.S_IFREG) or entry.external_attr & 0x10:
            problem = "is a link, a folder or a special file"
        elif entry.file_size != manifest.digests[name].size:
            problem = f"says it has {entry.file_size:,} bytes, and the manifest {manifest.digests[name].size:,}"
        elif entry.flag_bits & 0x1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = "is encrypted, or compressed in a way other than deflate"
        else:
            entries[name] = entry
            continue
        raise WireError(f"{name!r:.200} in the archive {problem}", offset=max(entry.header_offset, 0))
    if missing := [name for name in manifest.digests if name not in entries and name not in may_lack]:
        raise WireError(f"{min(missing)!r} is in the manifest and not in the archive", offset=0)
    return list(entries.values())


def _unpack(source: zipfile.ZipFile, entry: zipfile.ZipInfo, expected: Content, path: Path) -> None:
    """Write one file, never more than the manifest says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, left = blake3(max_threads=blake3.AUTO), expected.size
    what = f"{entry.filename!r} in the archive"
    with path.open("xb") as file:
        with _reading(what, max(entry.header_offset, 0)):
            content = source.open(entry)
        with content:
            while True:
                with _reading(what, max(entry.header_offset, 0)):
                    chunk = content.read(min(_CHUNK_BYTES, left + 1))
                if not chunk:
                    break
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                file.write(chunk)
    if left or digest.hexdigest() != expected.digest:
        raise WireError(f"{what} is not what the manifest says: its {'size' if left else 'digest'} differs", offset=entry.header_offset)


def _check_names(names: Collection[str]) -> None:
    """Raises ConfigError for a name that leads out of its folder, that some systems cannot hold, or that some take for another one."""
    spelled: dict[str, tuple[str, bool]] = {}
    for name in names:
        parts = name.split("/")
        if (
            not 0 < len(name) <= _MAX_NAME_CHARACTERS
            or any(character in '\\:*?"<>|' or not character.isprintable() for character in name)
            or any(part in ("", ".", "..") or part != part.strip(" ") or part.endswith(".") or len(part.encode()) > 255 for part in parts)
        ):
            raise ConfigError(
                f"{name!r:.200} is no name for a file of a job: it must be a path below the folder, of printable characters other than"
                ' \\ : * ? " < > |, with no part that is longer than 255 bytes, is "..", begins with a space or ends with a space or a dot'
            )
        for depth in range(1, len(parts) + 1):
            path, is_file = "/".join(parts[:depth]), depth == len(parts)
            folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
            if spelled.setdefault(folded, (path, is_file)) != (path, is_file):
                raise ConfigError(f"{name!r} and {spelled[folded][0]!r} are one name on some systems: give one of them another name")
