"""A site's work on one job without a connection: its tasks come as files, and its updates are left as files.

What happens in between is what an agent does: the policy, the sandbox, the training process, the audit log. So the updates have the same
bits as with a server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from blake3 import blake3

from hanse.errors import HanseError, Refused
from hanse.identity.kit import Kit
from hanse.messages.codec import Buffer
from hanse.messages.wire import INLINE_BYTES, Blob, Delivery, FromSite, Left, Offer, Payload, TaskRef
from hanse.site.admission import allow, sandbox_of
from hanse.site.agent import AUDIT, machine_resources, version
from hanse.site.held_job import HeldJob, Site
from hanse.site.hours import Hours
from hanse.site.kept import Kept
from hanse.site.ledger import Ledger
from hanse.site.outgoing import CHUNK_BYTES
from hanse.site.policy import Policy
from hanse.transport.blobs import FolderBlobs

logger = logging.getLogger(__name__)


class SiteWithoutServer:
    """One job at one site. Enter it, have its tasks performed one after another, and leave it.

    kit: a site's; it needs no credentials. archive: the job's files; None if they were here before. updates: where updates are left.
    Entering it raises PolicyRefused and what else stands against the job, Refused if its files are not here and did not come.
    """

    def __init__(self, kit: Kit, policy: Policy, offer: Offer, roots: bytes, *, archive: Path | None, updates: Path) -> None:
        self._kit, self._policy, self._offer, self._roots = kit, policy, offer, roots
        self._kept = Kept(kit.state_folder / "jobs", offer.job)
        self._files = _Files({} if archive is None else {offer.archive: archive}, updates)
        self._updates = updates
        self._waiting: dict[TaskRef, asyncio.Future[Path]] = {}
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        for folder in (self._updates, *self._kit.kept_folders()):
            folder.mkdir(parents=True, exist_ok=True)
        self._ledger = Ledger(self._kit.state_folder / AUDIT)
        try:
            self._held = HeldJob(await self._site(), self._offer, self._manifest, self._kept, self._group)
            await self._group.__aenter__()
        except BaseException:
            self._ledger.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._held.written()
            self._held.stop()
            await self._group.__aexit__(None, None, None)
        finally:
            self._ledger.append("stop", site=self._kit.name)
            self._ledger.close()

    async def perform(self, ref: TaskRef, frame: Path) -> Path:
        """Do the task in the file `frame`, unless it was done before. Returns the file of its update, which is there whole or not at all.

        Raises Refused if the site does no more for this job.
        """
        path = self._updates / update_name(ref)
        if path.exists():
            return path
        self._waiting[ref] = asyncio.get_running_loop().create_future()
        self._held.assign(ref, self._payload(frame))
        try:
            return await self._waiting[ref]
        finally:
            del self._waiting[ref]
            self._held.received(ref, None)

    def note(self, kind: str, **facts: Any) -> None:
        """Write a line about the job to the audit log."""
        self._ledger.append(kind, job=self._offer.job, **facts)

    async def _site(self) -> Site:
        kit, policy, offer = self._kit, self._policy, self._offer
        resources, sandbox, problem = kit.resources or machine_resources(), None, None
        if policy.sandbox != "off":
            sandbox = sandbox_of(kit, gpus=bool(resources.gpus))
            if (problem := await asyncio.to_thread(sandbox.problem)) is not None:
                logger.warning("site %s: there is no sandbox: %s", kit.name, problem)
                sandbox = None
        self._ledger.append("start", site=kit.name, version=version(), sandbox=sandbox is not None, server=None)
        if (why := Hours(policy.hours(), kit.state_folder, self._ledger.append).closed()) is not None:
            raise Refused(f"{why[0].upper()}{why[1:]}.", hint="Come again when it may.")
        is_new = not (self._kept.path / "offer").exists()
        facts = {"job": offer.job, "manifest": blake3(offer.manifest).hexdigest()}
        taken = None if is_new else datetime.fromtimestamp((self._kept.path / "offer").stat().st_mtime, UTC)
        try:
            self._manifest, submitter = allow(
                offer, kit=kit, policy=policy, roots=self._roots, resources=resources, no_sandbox=problem, now=taken
            )
        except HanseError as error:
            self._ledger.append("offer", **facts, decision="refused", why=str(error))
            raise
        if is_new:
            self._kept.save_offer(offer)
            self._ledger.append("offer", **facts, name=self._manifest.name, submitter=str(submitter), decision="accepted")
        return Site(
            kit=kit,
            state=kit.state_folder,
            policy=policy,
            ledger=self._ledger,
            sandbox=sandbox,
            post=self._take,
            client=self._client,
            open=self._open,
        )

    async def _open(self) -> None:
        """It was looked at when the bundle came."""

    async def _client(self) -> _Files:
        return self._files

    def _payload(self, frame: Path) -> Payload:
        if frame.stat().st_size <= INLINE_BYTES:
            return Payload(inline=frame.read_bytes())
        blob = blob_of(frame)
        self._files.offered[blob] = frame
        return Payload(blob=blob)

    def _take(self, message: FromSite) -> None:
        """What would go to the server."""
        match message:
            case Delivery(task=ref, payload=payload):
                path = self._updates / update_name(ref)
                if payload.blob is not None:
                    self._files.place(payload.blob).replace(path)
                else:
                    assert payload.inline is not None
                    part = path.with_name(f".{path.name}.part")
                    part.write_bytes(payload.inline)
                    part.replace(path)
                if ref in self._waiting and not self._waiting[ref].done():
                    self._waiting[ref].set_result(path)
            case Left(why=why):
                logger.warning("site %s does no more for this job: %s", self._kit.name, why)


class _Files:
    """In place of a connection: `offered` are the blobs that could be fetched, `updates` the folder for those that are sent."""

    def __init__(self, offered: dict[Blob, Path], updates: Path) -> None:
        self.offered, self._updates = offered, updates

    def place(self, blob: Blob) -> Path:
        return self._updates / f".{blob.hex}.part"

    async def download(self, blob: Blob, blobs: FolderBlobs) -> Path:
        """See `Client.download`. Raises Refused for a blob that did not come."""
        if blob not in self.offered:
            raise Refused(
                "the job's files are not here, and did not come with this bundle.", hint="Import the first bundle of the run again."
            )
        if not blobs.has(blob):
            await asyncio.to_thread(blobs.add_file, self.offered[blob])
        return blobs.path(blob)

    async def upload(self, blob: Blob, read: Callable[[int, int], Buffer]) -> None:
        """See `Client.upload`."""

        def write() -> None:
            with self.place(blob).open("wb") as file:
                for offset in range(0, blob.size, CHUNK_BYTES):
                    file.write(read(offset, min(CHUNK_BYTES, blob.size - offset)))

        await asyncio.to_thread(write)


def update_name(ref: TaskRef) -> str:
    """The name of the file with a task, or with its update."""
    return f"{ref.commit}-{ref.index}"


def blob_of(path: Path) -> Blob:
    """How a file's content is named."""
    with path.open("rb") as file:
        digest = blake3()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        return Blob(digest.digest(), file.tell())
