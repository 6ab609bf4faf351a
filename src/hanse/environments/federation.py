"""A federation from the side of an admin or researcher, who has a startup kit: submit a job, follow it, fetch what came of it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hanse.errors import ConfigError, LinkBroken, WireError
from hanse.identity.kit import Kit, read_kit
from hanse.jobs.archive import pack
from hanse.messages.wire import Blob, Resources
from hanse.server.run_folder import RunFolder
from hanse.transport.blobs import FolderBlobs
from hanse.transport.grpc import Client

JOB = "job"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
GIVEN_UP_AFTER_S = 600.0
"""A server that cannot be reached for so long is not waited for any more."""

Event = Mapping[str, Any]
_SPOOL = ".incoming"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a job runs.

    sites: which ones; none: all that may and can. site_config: JSON values for single sites, by name. min_sites: with how many the job
    may begin; None: with all that are named. resources: what it takes at each site.
    """

    sites: Sequence[str] = ()
    site_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    min_sites: int | None = None
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True)
class Submitted:
    """A job that the server took: its id there, and the sites that refuse it, each with its reason."""

    job: str
    refusals: Mapping[str, str]


@asynccontextmanager
async def connected(kit: Kit) -> AsyncIterator[Client]:
    """A connection to the kit's server, for as long as it is entered."""
    client = Client(kit.server, kit.credentials(), proxy=kit.proxy)
    try:
        yield client
    finally:
        await client.close()


def kit_in(folder: str | Path) -> Kit:
    """The startup kit in the folder. Raises ConfigError if it is none of somebody who may talk to a server on their own."""
    kit = read_kit(Path(folder))
    if kit.role in ("server", "site", "joining"):
        raise ConfigError(
            f"{folder} is the kit of a {kit.role}: take one of an admin or researcher, from the folder `admins` of a provision"
        )
    return kit


async def submit(client: Client, kit: Kit, folder: Path, placement: Placement) -> Submitted:
    """Sign the job folder, send it up, and have the server offer it to the sites.

    Raises Refused, with each site's clause, if too few sites would take it.
    """
    with tempfile.TemporaryDirectory(prefix="hanse-submit-") as temporary:
        archive = Path(temporary) / "archive"
        manifest, signature = pack(
            folder,
            archive,
            signer=kit.signer(),
            sites=list(placement.sites),
            site_config={site: dict(config) for site, config in placement.site_config.items()},
            min_sites=placement.min_sites,
            resources=placement.resources,
        )
        blobs = FolderBlobs(Path(temporary) / "blobs")
        blob = blobs.add_file(archive)
        content = blobs.map(blob)
        await client.upload(blob, lambda offset, size: content[offset : offset + size])
        reply = await client.call(
            "submit",
            manifest=base64.b64encode(manifest).decode(),
            signature=base64.b64encode(signature).decode(),
            archive=[blob.hex, blob.size],
        )
    return Submitted(str(reply["job"]), dict(reply.get("refusals") or {}))


async def events_of(
    client: Client, job: str, *, follow: bool = True, lost: Callable[[str], None] | None = None
) -> AsyncIterator[dict[str, Any]]:
    """The events of the job, and lines that its sites let out (`output`); with `follow`, as they come, until it has ended.

    lost: told when the server cannot be reached, which is then tried again for ten minutes; without it LinkBroken is raised at once.
    """
    seen, pause_s = 0, FIRST_PAUSE_S
    given_up_at: float | None = None
    clock = asyncio.get_running_loop().time
    while True:
        passed = 0
        try:
            async for event in client.follow("logs", job=job, follow=follow):
                pause_s, given_up_at = FIRST_PAUSE_S, None
                if event.get("event") != "output":
                    passed += 1
                if passed > seen or (passed == seen and event.get("event") == "output"):  # what came before the cut comes again
                    seen = passed
                    yield event
            return
        except LinkBroken as error:
            if lost is None or (given_up_at is not None and clock() > given_up_at):
                raise
            if given_up_at is None:
                given_up_at = clock() + GIVEN_UP_AFTER_S
                lost(f"{error.message} The connection is tried again.")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


async def fetch(client: Client, job: str, folder: Path, *, leave_out: Sequence[str] = ()) -> None:
    """Download what came of the job into the folder, but for empty files and what lies below the names in `leave_out`.

    Raises WireError if the server names a file that lies elsewhere.
    """
    files: Mapping[str, tuple[str, int]] = (await client.call("result", job=job))["files"]
    spool = FolderBlobs(folder / _SPOOL)
    try:
        for name, (digest, size) in files.items():
            target = (folder / name).resolve()
            if not target.is_relative_to(folder.resolve()) or target == folder.resolve():
                raise WireError(f"the server's result of job {job} has a file {name!r}, which lies outside of the run folder", offset=0)
            if name.split("/")[0] in leave_out or size == 0:
                continue
            got = await client.download(Blob(bytes.fromhex(digest), size), spool)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(got, target)
    finally:
        shutil.rmtree(spool.folder, ignore_errors=True)


async def download(client: Client, job: str, runs: Path) -> Path:
    """Fetch what came of the job into a new run folder, and return that."""
    state = await client.call("job", job=job)
    folder = RunFolder.new_path(runs, str(state["name"]))
    try:
        await fetch(client, job, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def read_facts(folder: Path) -> dict[str, Any]:
    """What the `run.json` says that came with a result; nothing if there is none."""
    path = folder / "run.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}
