"""A bundle: one file that carries a site's tasks, or its updates, where there is no connection.

    hanse bundle 1\\n    the first line
    8 + 8 bytes         the sizes of manifest and signature, little-endian
    manifest            JSON: what this is, from whom, to whom, and every file with its digest and size
    signature           of a person, over the manifest
    archive             a ZIP with those files

The archive is not signed itself, and need not be: the signature is checked first, the manifest read next, and then only what the manifest
names is unpacked. `unzip` reads the file too.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from blake3 import blake3

from hanse.errors import ConfigError, IdentityError, StorageFull, WireError
from hanse.identity.certificates import Identity
from hanse.identity.signatures import LARGEST_BYTES, Signer, verify
from hanse.jobs.archive import MAX_MANIFEST_BYTES, Content, Digest, unpack
from hanse.jobs.archive import Manifest as ArchiveManifest
from hanse.jobs.bundle import FORMAT
from hanse.messages.wire import Name, Resources, TaskRef

_FIRST_LINE = b"hanse bundle 1\n"
_CHUNK_BYTES = 1 << 20


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a person signs.

    run: which run this is of; every one has its own. job: its name; job_digest: of the job's own signed manifest, and so of all its files.
    kind: tasks for a site, or its updates. site, organisation: whose tasks or updates these are. sequence: of the tasks, counted from 1 for
    each site; updates have the number of the tasks that they answer. tasks: which. files: what the archive holds.
    """

    format: Literal[1] = 1
    federation: Name
    run: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    job: Name
    job_digest: Digest
    kind: Literal["tasks", "updates"]
    site: Name
    organisation: Name
    sequence: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    tasks: Annotated[list[TaskRef], msgspec.Meta(max_length=5_000)]
    files: dict[str, Content] = {}
    created: datetime = msgspec.field(default_factory=lambda: now())
    signer: Name


@dataclass(frozen=True)
class Bundle:
    """A bundle whose signature is good. digest: of the manifest, and so of everything in it."""

    path: Path
    manifest: Manifest
    signer: Identity
    digest: str

    def unpack(self, folder: Path) -> None:
        """Make `folder` of the files, all of it or nothing; one that is there, from an import that was cut off, is made anew.

        Raises WireError for whatever is not as the manifest says, and StorageFull.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        manifest = self.manifest
        unpack(
            self.path,
            ArchiveManifest(
                format=FORMAT,
                name=f"{manifest.job} ({self.path.name})",
                digests=manifest.files,
                sites=[],
                site_config={},
                min_sites=1,
                resources=Resources(),
                workflow="bundle",
                rounds=0,
                created=manifest.created,
                submitter=manifest.signer,
            ),
            folder,
        )


def write_bundle(path: Path, about: Manifest, files: Mapping[str, Path], signer: Signer) -> str:
    """Write a bundle, whole or not at all, of `files` by their names in it. Returns the digest of its manifest. Raises StorageFull."""
    contents = {name: _content(file) for name, file in files.items()}
    manifest = msgspec.json.encode(msgspec.structs.replace(about, files=contents))
    signature = signer.sign(manifest)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with part.open("xb") as sink:
            sink.write(_FIRST_LINE + len(manifest).to_bytes(8, "little") + len(signature).to_bytes(8, "little") + manifest + signature)
            with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
                for name, file in files.items():
                    entry = zipfile.ZipInfo(name)
                    entry.file_size = contents[name].size
                    with file.open("rb") as content, archive.open(entry, "w") as target:
                        shutil.copyfileobj(content, target, _CHUNK_BYTES)
            sink.flush()
            os.fsync(sink.fileno())
        part.replace(path)
    except OSError as error:
        raise StorageFull(f"{path} cannot be written: {error.strerror}.", hint="Is there room, and may you write there?") from error
    finally:
        part.unlink(missing_ok=True)
    return blake3(manifest).hexdigest()


def open_bundle(path: Path, roots: bytes, *, now: datetime | None = None) -> Bundle:
    """What a bundle says and who signed it; nothing is read before the signature is good, and its archive not at all.

    Raises ConfigError if there is no such file, IdentityError for a signature that is not accepted, WireError for what is no bundle.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_FIRST_LINE)) != _FIRST_LINE:
                raise WireError(f"{path} is no bundle of this version", offset=0)
            sizes = [int.from_bytes(file.read(8), "little") for _ in range(2)]
            for size, most in zip(sizes, (MAX_MANIFEST_BYTES, LARGEST_BYTES), strict=True):
                if size > most:
                    raise WireError(f"{path} says that {size:,} bytes are to be read, of at most {most:,}", offset=len(_FIRST_LINE))
            data, signature = (file.read(size) for size in sizes)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        signer = verify(data, signature, roots, now=now)
    except IdentityError as error:
        raise IdentityError(f"{path} is not accepted: {error.message}", hint=error.hint) from error
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"{path} has a manifest that this version does not read: {error}", offset=len(_FIRST_LINE)) from error
    if (manifest.signer, manifest.federation) != (signer.name, signer.federation):
        raise IdentityError(f"{path} says that {manifest.signer!r} of {manifest.federation!r} signs it, and {signer} has")
    return Bundle(path, manifest, signer, blake3(data).hexdigest())


def now() -> datetime:
    """The present, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def _content(path: Path) -> Content:
    digest, size = blake3(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return Content(digest.hexdigest(), size)
