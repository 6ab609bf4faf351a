"""The server of a federation: knows jobs and sites, says who may do what, and carries tasks and updates between workflows and sites."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import fcntl
import logging
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import msgspec

from hanse.errors import ConfigError, Failure, HanseError, IdentityError, Refused, WireError
from hanse.figures import Figure
from hanse.identity.authority import Authority
from hanse.identity.certificates import Credentials, Role
from hanse.jobs.archive import Manifest, open_manifest, trimmed, unpack
from hanse.jobs.bundle import MODEL, versions
from hanse.messages.wire import (
    Blob,
    Delivery,
    End,
    FromServer,
    FromSite,
    Hello,
    Left,
    Offer,
    OfferReply,
    Output,
    Received,
    Request,
    Resources,
    Welcome,
    arguments_of,
)
from hanse.sandbox import Sandbox, SandboxMode, files_beneath, open_beneath
from hanse.server.arguments import ForToken, Logs, Named, Nothing, OfJob, OfSite, Signing, Submission
from hanse.server.blob_store import BlobStore
from hanse.server.job_events import JobEvents
from hanse.server.job_link import Finished
from hanse.server.registry import Registry
from hanse.server.run_folder import COMMIT
from hanse.server.running_job import TASKS, RunningJob
from hanse.server.scheduler import Queued, room, starts
from hanse.server.store import Job, Member, Store
from hanse.server.tracker import Tracker
from hanse.transport.blobs import Incoming, blob_of, blob_path, open_file
from hanse.transport.grpc import Peer

JOB, TRACKING = "job", "tracking"
OFFER_WITHIN_S = 5.0
"""So long a submission waits for what connected sites say to the job."""

_MAX_OUTBOX = 10_000
_AT_ONCE = 8  # messages of one site
_READERS = (Role.PROJECT_ADMIN, Role.ORG_ADMIN, Role.RESEARCHER, Role.AUDITOR)
_SUBMITTERS = (Role.PROJECT_ADMIN, Role.ORG_ADMIN, Role.RESEARCHER)
_ADMINS = (Role.PROJECT_ADMIN, Role.ORG_ADMIN)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server runs. state: where run folders and, by default, everything else is kept.

    address: host:port for join tokens. certificate_days: how long the certificates that it issues are good.
    absence_s: a site that is away for longer while a task waits for it counts as failed. max_running: jobs at once; None: no limit.
    sandbox: whether workflows, with the jobs' own code, run in one: required, preferred (without where it cannot be had) or off. hidden:
    folders with keys, which are not visible in it, as `state` is not. track: where the values of each job go while it runs.
    """

    state: Path
    address: str
    database: str | None = None
    blobs: str | None = None
    certificate_days: float = 30.0
    absence_s: float = 60.0
    max_running: int | None = None
    sandbox: SandboxMode = "required"
    hidden: Sequence[Path] = ()
    track: str | None = None


@dataclass(eq=False)
class _Connection:
    """A connected site."""

    peer: Peer
    hello: Hello
    since: float = field(default_factory=time.time)
    outbox: asyncio.Queue[FromServer | None] = field(default_factory=lambda: asyncio.Queue(_MAX_OUTBOX))


@dataclass(eq=False)
class _Active:
    """A job that is queued or runs. offering: it was just submitted, and these sites have not yet said whether they take it."""

    job: Job
    manifest: Manifest
    members: dict[str, Member]
    events: JobEvents
    running: RunningJob | None = None
    offering: set[str] | None = None
    replied: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    offered: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def roster(self) -> tuple[str, ...]:
        """The sites that have a rank, by rank."""
        ranked = [member for member in self.members.values() if member.rank is not None]
        return tuple(member.site for member in sorted(ranked, key=lambda member: member.rank or 0))


class FederationServer:
    """Implements `hanse.transport.grpc.Service`. `start` it, serve it, and `close` it.

    drop: ends the connections of the peers that match; set it to `Server.drop`.
    """

    def __init__(self, settings: Settings, credentials: Credentials, authority: Authority) -> None:
        self.settings = settings
        self.credentials = credentials
        self.drop: Callable[[Callable[[Peer], bool]], object] = lambda predicate: None
        settings.state.mkdir(parents=True, exist_ok=True)
        self.store = Store(settings.database or f"sqlite:///{settings.state.resolve() / 'server.sqlite'}")
        self.registry = Registry(self.store, authority, address=settings.address, certificate_days=settings.certificate_days)
        remote = settings.blobs if settings.blobs and "://" in settings.blobs else None
        self.blobs = BlobStore(settings.state / "blobs" if remote or not settings.blobs else Path(settings.blobs), remote)
        self._active: dict[str, _Active] = {}
        self._connected: dict[str, _Connection] = {}
        self._results: dict[tuple[Blob, str], tuple[Path, str]] = {}  # what people have asked for: the job's folder, and the name there
        self._numbers: dict[str, int] = {}
        self._scheduling = asyncio.Lock()
        self._counts = Counter[tuple[str, str]]()
        self._closing = False
        self._sandbox: Sandbox | None = None
        self._lock: IO[str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: dict[str, tuple[tuple[Role, ...], Callable[[Peer, Request], Awaitable[Any]]]] = {
            "enrol": ((Role.JOINING,), self._enrol),
            "renew": ((Role.SITE, *_READERS), self._renew),
            "token": (_ADMINS, self._token),
            "submit": (_SUBMITTERS, self._submit),
            "abort": (_SUBMITTERS, self._abort),
            "resume": (_SUBMITTERS, self._resume),
            "result": (_SUBMITTERS, self._result),
            "jobs": (_READERS, self._list_jobs),
            "job": (_READERS, self._show_job),
            "sites": (_READERS, self._list_sites),
            "site": (_READERS, self._show_site),
            "disable": (_ADMINS, self._disable),
            "enable": (_ADMINS, self._enable),
            "revoke": ((Role.PROJECT_ADMIN,), self._revoke),
        }

    async def start(self) -> None:
        """Open the database and let the jobs that ran go on. Raises ConfigError if that cannot be, such as for a second server."""
        self._lock = (self.settings.state / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another server is running on {self.settings.state}: let it end, or stop it") from error
        self._sandbox = await self._try_sandbox()
        await self.store.open()
        await self.registry.load()
        for job in await self.store.jobs():
            self._numbers[job.name] = max(self._numbers.get(job.name, 0), int(job.id.rpartition("-")[2]))
            try:
                if job.active:
                    await self._take_up(job)
            except HanseError as error:
                logger.error("job %s cannot go on: %s", job.id, error)
                await self.store.change_job(job.id, status="failed", reason=f"it could not go on: {error}", ended=time.time())
        await self.blobs.clean(await self.store.blobs())
        for active in self._active.values():
            if active.job.status == "running":
                self._run(active)

    async def _try_sandbox(self) -> Sandbox | None:
        """The sandbox for workflows; None if there is to be none. Raises ConfigError if there must be one and none can be had."""
        if self.settings.sandbox == "off":
            return None
        sandbox = Sandbox(hidden=[*self.settings.hidden, self.settings.state], readable=[self.blobs.folder.folder])
        if (problem := await asyncio.to_thread(sandbox.problem)) is None:
            return sandbox
        if self.settings.sandbox == "required":
            raise ConfigError(
                f"workflows run in a sandbox, and there is none: {problem}.",
                hint="Install bubblewrap, or say `sandbox: preferred` in kit.yaml: then a job's code can read this server's keys.",
            )
        logger.warning("workflows run without a sandbox, and can read this server's keys: %s", problem)
        return None

    async def close(self) -> None:
        """Stop the jobs' processes, which go on when the server is started again, and let go of everything."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        for active in list(self._active.values()):
            if active.running is not None:
                await active.running.suspend()
        for connection in self._connected.values():
            self._hang_up(connection)
        await self.store.close()
        if self._lock is not None:
            self._lock.close()

    def figures(self) -> Iterator[Figure]:
        """What Prometheus is told; called from another thread."""
        counts, active = dict(self._counts), Counter(each.job.status for each in list(self._active.values()))
        jobs, updates, sizes = ({label: n for (what, label), n in counts.items() if what == kind} for kind in ("job", "update", "byte"))
        yield Figure("hanse_sites_connected", "Sites connected now.", len(self._connected))
        yield Figure("hanse_jobs", "Jobs that have not ended.", {status: active[status] for status in ("queued", "running")}, "status")
        yield Figure("hanse_jobs_ended_total", "Jobs that ended since the server was started.", jobs, "status", counter=True)
        yield Figure("hanse_updates_total", "Updates that came since then.", updates, "outcome", counter=True)
        yield Figure("hanse_update_bytes_total", "Their bytes.", sizes, "outcome", counter=True)

    def _arrived(self, outcome: str, size: int) -> None:
        self._counts["update", outcome] += 1
        self._counts["byte", outcome] += size

    # ------------------------------------------------------------------------------------------------- what the transport asks

    def admit(self, peer: Peer) -> None:
        self.registry.admit(peer.identity)

    async def call(self, peer: Peer, request: Request) -> Any:
        if request.name not in self._calls:
            raise Refused(f"the server knows no call {request.name!r:.100}")
        roles, answer = self._calls[request.name]
        self._check_role(peer, request.name, roles)
        return await answer(peer, request)

    async def follow(self, peer: Peer, request: Request) -> AsyncIterator[Any]:
        if request.name != "logs":
            raise Refused(f"the server knows nothing to follow called {request.name!r:.100}")
        self._check_role(peer, "logs", _READERS)
        wanted = arguments_of(request, Logs)
        active = self._active.get(wanted.job)
        events = JobEvents(self._folder((await self._job(wanted.job)).id)) if active is None else active.events
        async for event in events.follow(live=wanted.follow and active is not None):
            yield event

    def open_blob(self, peer: Peer, blob: Blob) -> int:
        who = peer.identity
        if who.role is Role.SITE:
            for active in self._active.values():
                if who.name not in active.members:
                    continue
                if active.job.archive == blob:
                    return open_file(self.blobs.folder.path(blob))
                if active.running is not None and active.running.has_task(blob, who.name):
                    return open_file(blob_path(active.running.task_folder, blob), beneath=active.running.folder)
        elif (blob, who.name) in self._results:
            folder, name = self._results[blob, who.name]
            return open_file(folder / name, beneath=folder)
        raise Refused(f"the blob {blob.hex[:16]}… is not for {who}.", hint="It may have been, and is no longer needed.")

    def incoming(self, peer: Peer, blob: Blob) -> Incoming:
        who = peer.identity
        takes_part = who.role is Role.SITE and any(who.name in active.members for active in self._active.values())
        if not takes_part and who.role not in _SUBMITTERS:
            raise Refused(f"{who} has nothing to send.", hint="Sites send updates of jobs that run, and submitters send jobs.")
        return self.blobs.folder.incoming(blob)

    async def control(self, peer: Peer, incoming: AsyncIterator[FromSite]) -> AsyncIterator[FromServer]:
        who = peer.identity
        self._check_role(peer, "Control", (Role.SITE,))
        hello = await anext(incoming)
        assert isinstance(hello, Hello), "the transport sees to it"
        connection = _Connection(peer, hello)
        await self._came(connection)
        reading = asyncio.create_task(self._read(connection, incoming))
        reading.add_done_callback(lambda _: self._hang_up(connection))
        try:
            yield Welcome(version=versions()["hanse"])
            while (message := await connection.outbox.get()) is not None:
                yield message
            if reading.done():
                await reading  # raises what ended it
        finally:
            reading.cancel()
            if self._connected.get(who.name) is connection:
                self._went(connection)

    # ------------------------------------------------------------------------------------------------------------- connected sites

    def send(self, site: str, message: FromServer) -> bool:
        """See `running_job.Sites`. A site that reads too slowly is let go, and gets everything when it comes again."""
        connection = self._connected.get(site)
        if connection is None:
            return False
        try:
            connection.outbox.put_nowait(message)
        except asyncio.QueueFull:
            logger.warning("site %r does not read what is sent to it: its connection is ended", site)
            self._hang_up(connection)
            self._went(connection)
            return False
        return True

    async def _came(self, connection: _Connection) -> None:
        who, hello = connection.peer.identity, connection.hello
        before = self._connected.pop(who.name, None)
        if before is not None:
            self._hang_up(before)
        resources = msgspec.to_builtins(hello.resources)
        await self.registry.note(who, seen=connection.since, version=hello.version, resources=resources)
        self._connected[who.name] = connection
        logger.info("site %r is connected", who.name)
        for active in list(self._active.values()):
            if who.name not in active.members and not active.job.fixed and not active.manifest.sites:
                await self._change_member(active, Member(active.job.id, who.name))
            member = active.members.get(who.name)
            if member is None or (member.state == "refused" and member.rank is None) or not self._takes_part(who.name, active.job.id):
                continue
            self._offer(active, who.name, again=True)
            if active.running is not None:
                for assignment in active.running.came(who.name):
                    self.send(who.name, assignment)
        for job in hello.accepted:
            if not self._takes_part(who.name, job):
                self.send(who.name, End(job=job, status=await self._status(job)))
        self._reschedule()

    def _takes_part(self, site: str, job: str) -> bool:
        """Whether it does, or may come to, in a job that has not ended."""
        active = self._active.get(job)
        return active is not None and site in active.members and not (active.job.fixed and active.members[site].rank is None)

    def _went(self, connection: _Connection) -> None:
        name = connection.peer.identity.name
        self._connected.pop(name, None)
        logger.info("site %r is away", name)
        for active in self._active.values():
            if active.running is not None:
                active.running.went(name)
            if active.offering is not None:
                active.offering.discard(name)
                self._check_replies(active)

    def _hang_up(self, connection: _Connection) -> None:
        """End the stream after what it holds already; at once if that does not leave room."""
        while True:
            try:
                return connection.outbox.put_nowait(None)
            except asyncio.QueueFull:
                connection.outbox.get_nowait()

    async def _read(self, connection: _Connection, incoming: AsyncIterator[FromSite]) -> None:
        """Take what a site sends, a few updates at a time: one is kept while the next comes."""
        at_once = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            async for message in incoming:
                await at_once.acquire()
                task = group.create_task(self._take(connection.peer.identity.name, message))
                task.add_done_callback(lambda _: at_once.release())
                if not isinstance(message, Delivery):
                    await asyncio.wait([task])

    async def _take(self, site: str, message: FromSite) -> None:
        if isinstance(message, Hello):
            raise WireError("a second Hello", offset=0)
        active = self._active.get(message.job)
        if active is not None and site not in active.members:
            raise Refused(f"job {active.job.id!r} is not for site {site!r}")
        match message:
            case Delivery(job=job, task=task):
                if active is None or active.running is None:
                    self.send(site, Received(job=job, task=task))  # nobody waits for it any more
                else:
                    self.send(site, await active.running.deliver(site, message))
            case OfferReply(refusal=refusal) if active is not None:
                await self._replied(active, site, refusal)
            case Output(lines=lines) if active is not None:
                active.events.output(site, lines)
            case Left(why=why) if active is not None:
                logger.warning("site %r leaves job %s: %s", site, active.job.id, why)
                await self._change_member(active, replace(active.members[site], state="left", reason=str(why)))
                if active.running is not None:
                    active.running.left(site, why)

    async def _replied(self, active: _Active, site: str, refusal: Failure | None) -> None:
        member = active.members[site]
        state, reason = ("accepted", "") if refusal is None else ("refused", str(refusal))
        changed = replace(member, state=state, reason=reason)
        if changed != member:
            await self._change_member(active, changed)
        if active.running is not None:
            active.running.back(site) if refusal is None else active.running.left(site, refusal)
        if active.offering is not None:
            active.offering.discard(site)
            self._check_replies(active)
        self._reschedule()

    def _check_replies(self, active: _Active) -> None:
        if not active.offering:
            active.replied.set()

    def _offer(self, active: _Active, site: str, *, again: bool = False) -> bool:
        """Offer the job, if the site is there and has not been offered the same. The rank is provisional until the job starts."""
        names = active.roster if active.job.fixed else sorted(active.members)
        place = (names.index(site), len(names))
        if not again and active.offered.get(site) == place:
            return False
        active.offered[site] = place
        offer = Offer(
            job=active.job.id,
            manifest=active.job.manifest,
            signature=active.job.signature,
            archive=active.job.archive,
            rank=place[0],
            sites=place[1],
        )
        return self.send(site, offer)

    async def _change_member(self, active: _Active, member: Member) -> None:
        active.members[member.site] = member
        await self.store.put_members(member)

    # ------------------------------------------------------------------------------------------------------------------------- jobs

    async def _submit(self, peer: Peer, request: Request) -> Any:
        wanted = arguments_of(request, Submission)
        try:
            signed, signature = (base64.b64decode(text, validate=True) for text in (wanted.manifest, wanted.signature))
        except (binascii.Error, ValueError) as error:
            raise ConfigError(f"submit: manifest and signature must be in base64: {error}") from error
        manifest, submitter = open_manifest(signed, signature, self.credentials.roots)
        if submitter != peer.identity:
            raise IdentityError(
                f"{peer.identity} submits a job that {submitter} has signed.", hint="Submit with the kit that you sign with."
            )
        archive = wanted.blob
        if not self.blobs.folder.has(archive):
            raise Refused("the job's archive is not here.", hint="Upload it, then submit.")
        candidates = self._candidates(manifest)
        number, job_id = self._new_id(manifest.name)
        folder = self._folder(job_id)
        try:
            site_archive = await asyncio.to_thread(self._unpack, archive, manifest, folder)
            await self.blobs.keep(site_archive)
            job = Job(
                id=job_id,
                number=number,
                name=manifest.name,
                submitter=submitter.name,
                organisation=submitter.organisation,
                manifest=signed,
                signature=signature,
                archive=site_archive,
            )
            members = {site: Member(job_id, site) for site in candidates}
            await self.store.add_job(job, list(members.values()))
            active = self._active[job_id] = _Active(job, manifest, members, JobEvents(folder))
            refusals = await self._offer_to_all(active)
        except BaseException:
            await self._forget(job_id)
            raise
        if len(members) - len(refusals) < manifest.min_sites:
            await self._forget(job_id)
            listed = "".join(f"\n  {site}: {why}" for site, why in sorted(refusals.items()))
            raise Refused(
                f"job {manifest.name!r} needs {manifest.min_sites} sites, and {len(members) - len(refusals)} of {len(members)} can take it:"
                f"{listed}\n ",
                hint="Change the job, or ask the sites to change their policy.",
            )
        logger.info("job %s of %s is queued, for %d sites", job_id, submitter, len(members))
        active.offering = None
        self._reschedule()
        return {"job": job_id, "refusals": refusals}

    def _candidates(self, manifest: Manifest) -> list[str]:
        """Whom to offer a job. Raises Refused if they cannot be enough."""
        able = self.registry.able
        if unknown := set(manifest.sites) - able:
            raise Refused(
                f"job {manifest.name!r} names sites that are not in this federation, or disabled or revoked: {', '.join(sorted(unknown))}"
            )
        found = sorted(manifest.sites or able)
        if len(found) < manifest.min_sites:
            raise Refused(f"job {manifest.name!r} needs {manifest.min_sites} sites, and this federation has {len(found)} that take jobs.")
        return found

    def _unpack(self, archive: Blob, manifest: Manifest, folder: Path) -> Blob:
        """Make the run folder with the job in it. Returns what sites get: the archive without the first model."""
        folder.mkdir(parents=True)
        source = self.blobs.folder.path(archive)
        unpack(source, manifest, folder / JOB)
        if MODEL not in manifest.digests:
            return archive
        target = folder / "sites.zip"
        trimmed(source, target, {MODEL})
        blob = self.blobs.folder.add_file(target)
        target.unlink()
        return blob

    async def _offer_to_all(self, active: _Active) -> dict[str, str]:
        """Offer a new job to its sites; the refusals that came in time, by site."""
        active.offering = {site for site in active.members if site in self._connected}
        for site in sorted(active.members):
            if not active.manifest.resources.fits(self._resources(site)) and site in self._connected:
                why = Failure("Resources", "the job takes more than the site has", "Ask for less: resources.")
                await self._replied(active, site, why)
            else:
                self._offer(active, site)
        self._check_replies(active)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OFFER_WITHIN_S):
                await active.replied.wait()
        return {site: member.reason for site, member in active.members.items() if member.state == "refused"}

    def _resources(self, site: str) -> Resources:
        connection = self._connected.get(site)
        return Resources() if connection is None else connection.hello.resources

    async def _forget(self, job_id: str) -> None:
        self._active.pop(job_id, None)
        await self.store.remove_job(job_id)
        for site in self._connected:
            self.send(site, End(job=job_id, status="refused"))
        await asyncio.to_thread(shutil.rmtree, self._folder(job_id), ignore_errors=True)

    async def _take_up(self, job: Job) -> _Active:
        """An unfinished job, from the database."""
        manifest, _ = open_manifest(job.manifest, job.signature, self.credentials.roots, now=datetime.fromtimestamp(job.submitted, UTC))
        members = {member.site: member for member in await self.store.members(job.id)}
        await self.blobs.fetch(job.archive)
        active = self._active[job.id] = _Active(job, manifest, members, JobEvents(self._folder(job.id)))
        return active

    def _reschedule(self) -> None:
        if not self._closing:
            self._spawn(self._schedule())

    async def _schedule(self) -> None:
        """Start the jobs that can start now."""
        async with self._scheduling:
            queue = [_queued(active) for active in self._active.values() if active.job.status == "queued" and active.offering is None]
            running = [active for active in self._active.values() if active.job.status == "running"]
            free = {
                site: room(connection.hello.resources, [active.manifest.resources for active in running if site in active.roster])
                for site, connection in self._connected.items()
            }
            chosen = starts(queue, free=free, running=len(running), max_running=self.settings.max_running)
            for job_id, sites in chosen.items():
                await self._begin(self._active[job_id], sites)

    async def _begin(self, active: _Active, sites: tuple[str, ...]) -> None:
        """Fix the roster and start the workflow."""
        job = active.job
        if not job.fixed:
            active.members |= {site: replace(active.members[site], rank=rank) for rank, site in enumerate(sites)}
            await self.store.put_members(*active.members.values())
        await self._change_job(active, status="running", reason="", fixed=True, started=job.started or time.time())
        for site, member in active.members.items():
            if member.rank is None:
                self.send(site, End(job=job.id, status="started without this site"))
            else:
                self._offer(active, site)
        logger.info("job %s starts, with %d sites", job.id, len(sites))
        self._run(active)

    def _run(self, active: _Active) -> None:
        folder, track = self._folder(active.job.id), self.settings.track
        active.running = RunningJob(
            active.job,
            active.roster,
            folder,
            store=self.store,
            blobs=self.blobs,
            sites=self,
            events=active.events,
            ended=lambda finished: self._job_ended(active, finished),
            arrived=self._arrived,
            absence_s=self.settings.absence_s,
            sandbox=self._sandbox,
            tracker=None if track is None else Tracker(track, folder, self.settings.state / TRACKING / active.job.id),
        )
        for member in active.members.values():
            if member.state in ("left", "refused") and member.rank is not None:
                active.running.left(member.site, Failure("SiteLeft", member.reason))
        active.running.start()

    async def _job_ended(self, active: _Active, finished: Finished) -> None:
        job_id, rounds = active.job.id, active.job.rounds if active.running is None else active.running.rounds
        logger.info("job %s: %s %s", job_id, finished.status, finished.reason)
        self._counts["job", finished.status] += 1
        await self._change_job(active, status=finished.status, reason=finished.reason, rounds=rounds, ended=time.time())
        self._active.pop(job_id, None)  # this is done again if the disk was full
        for blob in await self.store.drop_updates(job_id):
            await self.blobs.remove(blob)
        for site in active.members:
            self.send(site, End(job=job_id, status=finished.status))
        active.events.end()
        active.over.set()
        self._reschedule()

    async def _change_job(self, active: _Active, **changes: Any) -> None:
        active.job = replace(active.job, **changes)
        await self.store.change_job(active.job.id, **changes)

    async def _abort(self, peer: Peer, request: Request) -> Any:
        job = await self._job_to_steer(peer, request)
        active = self._active.get(job.id)
        if active is None:
            raise Refused(f"job {job.id!r} is {job.status}: there is nothing to stop.")
        if active.running is None:
            await self._job_ended(active, Finished(status="stopped", reason=f"stopped by {peer.identity.name} before it started"))
        else:
            await active.running.stop()
            await active.over.wait()
        return {"job": job.id, "status": active.job.status}

    async def _resume(self, peer: Peer, request: Request) -> Any:
        job = await self._job_to_steer(peer, request)
        if job.status not in ("failed", "stopped"):
            raise Refused(f"job {job.id!r} is {job.status}: only one that failed or was stopped goes on.")
        active = await self._take_up(job)
        active.members = {site: replace(member, state="offered", reason="") for site, member in active.members.items()}
        await self.store.put_members(*active.members.values())
        await self._change_job(active, status="queued", reason="", ended=None)
        for site in active.roster if job.fixed else sorted(active.members):
            self._offer(active, site)
        return {"job": job.id}

    async def _result(self, peer: Peer, request: Request) -> Any:
        job = await self._job_to_steer(peer, request)
        folder = self._folder(job.id)

        def find() -> dict[str, Blob]:
            found: dict[str, Blob] = {}
            for name in sorted(files_beneath(folder)):
                if not Path(name).name.startswith(".") and Path(name).parts[0] not in (TASKS, COMMIT):
                    with contextlib.suppress(OSError), open(open_beneath(folder, name), "rb") as file:  # a job that runs replaces its files
                        found[name] = blob_of(file)
            return found

        files = await asyncio.to_thread(find)
        self._results |= {(blob, peer.identity.name): (folder, name) for name, blob in files.items()}
        return {"files": {name: [blob.hex, blob.size] for name, blob in files.items()}}

    async def _list_jobs(self, peer: Peer, request: Request) -> Any:
        arguments_of(request, Nothing)
        members: dict[str, list[Member]] = {}
        for member in await self.store.members():
            members.setdefault(member.job, []).append(member)
        return [self._about(job, members.get(job.id, [])) for job in await self.store.jobs()]

    async def _show_job(self, peer: Peer, request: Request) -> Any:
        job = await self._job(arguments_of(request, OfJob).job)
        members = await self.store.members(job.id)
        shown = [
            {"site": m.site, "state": m.state, "reason": m.reason, "rank": m.rank, "connected": m.site in self._connected} for m in members
        ]
        return {**self._about(job, members), "members": shown}

    def _about(self, job: Job, members: list[Member]) -> dict[str, Any]:
        active = self._active.get(job.id)
        rounds = job.rounds if active is None or active.running is None else active.running.rounds
        return {
            "job": job.id,
            "name": job.name,
            "submitter": job.submitter,
            "organisation": job.organisation,
            "status": job.status,
            "reason": job.reason,
            "rounds": rounds,
            "total_rounds": msgspec.json.decode(job.manifest, type=_Rounds).rounds,
            "sites": [member.site for member in members if member.rank is not None or not job.fixed],
            "submitted": job.submitted,
            "started": job.started,
            "ended": job.ended,
        }

    # --------------------------------------------------------------------------------------------------------- sites and identities

    async def _list_sites(self, peer: Peer, request: Request) -> Any:
        arguments_of(request, Nothing)
        return [self._about_site(name) for name in sorted(self.registry.sites)]

    async def _show_site(self, peer: Peer, request: Request) -> Any:
        name = self.registry.site(arguments_of(request, OfSite).site).name
        jobs = [active.job.id for active in self._active.values() if name in active.members]
        return {**self._about_site(name), "jobs": jobs}

    def _about_site(self, name: str) -> dict[str, Any]:
        site, connection = self.registry.sites[name], self._connected.get(name)
        return {
            "site": name,
            "organisation": site.organisation,
            "connected": connection is not None,
            "since": site.seen if connection is None else connection.since,
            "version": site.version,
            "resources": dict(site.resources),
            "disabled": site.disabled,
            "revoked": name in self.registry.revoked,
            "expires": site.expires,
        }

    async def _disable(self, peer: Peer, request: Request) -> Any:
        return await self._switch(peer, arguments_of(request, OfSite).site, disabled=True)

    async def _enable(self, peer: Peer, request: Request) -> Any:
        return await self._switch(peer, arguments_of(request, OfSite).site, disabled=False)

    async def _switch(self, peer: Peer, name: str, *, disabled: bool) -> Any:
        self._check_organisation(peer, self.registry.site(name).organisation)
        await self.registry.switch(name, disabled=disabled)
        if disabled:
            self._cut_off(name, Failure("SiteDisabled", f"the site was disabled by {peer.identity.name}"), role=Role.SITE)
        return self._about_site(name)

    async def _revoke(self, peer: Peer, request: Request) -> Any:
        name = arguments_of(request, Named).name
        if name == peer.identity.name:
            raise Refused("nobody revokes their own certificates.", hint="Ask another project admin.")
        await self.registry.revoke(name)
        self._cut_off(name, Failure("SiteRevoked", f"the site's certificates were revoked by {peer.identity.name}"), role=None)
        logger.warning("%s has revoked the certificates of %r", peer.identity, name)
        return {"name": name}

    def _cut_off(self, name: str, why: Failure, *, role: Role | None) -> None:
        self.drop(lambda peer: peer.identity.name == name and role in (None, peer.identity.role))
        for active in self._active.values():
            if active.running is not None:
                active.running.left(name, why)

    async def _token(self, peer: Peer, request: Request) -> Any:
        wanted = arguments_of(request, ForToken)
        self._check_organisation(peer, wanted.organisation)
        federation = self.credentials.identity.federation
        return {"token": self.registry.token(federation, wanted.site, wanted.organisation, wanted.hours)}

    async def _enrol(self, peer: Peer, request: Request) -> Any:
        return {"certificate": await self.registry.enrol(peer.identity, peer.serial, arguments_of(request, Signing).csr)}

    async def _renew(self, peer: Peer, request: Request) -> Any:
        return {"certificate": await self.registry.renew(peer.identity, arguments_of(request, Signing).csr)}

    # ---------------------------------------------------------------------------------------------------------------------- helpers

    def _check_role(self, peer: Peer, what: str, roles: tuple[Role, ...]) -> None:
        if peer.identity.role not in roles:
            raise Refused(f"{peer.identity} may not call {what!r}: it is for {', '.join(roles)}.")

    def _check_organisation(self, peer: Peer, organisation: str) -> None:
        who = peer.identity
        if who.role is Role.ORG_ADMIN and who.organisation != organisation:
            raise Refused(f"{who} speaks for its own organisation only, and this is {organisation!r}.")

    async def _job(self, job_id: str) -> Job:
        if job_id in self._active:
            return self._active[job_id].job
        found = [job for job in await self.store.jobs() if job.id == job_id]
        if not found:
            raise Refused(f"there is no job {job_id!r:.120}.", hint="`hanse job list` has them all.")
        return found[0]

    async def _job_to_steer(self, peer: Peer, request: Request) -> Job:
        """The job that the request names, if the peer may steer it: its submitter, an admin of that organisation, or a project admin."""
        job, who = await self._job(arguments_of(request, OfJob).job), peer.identity
        own = who.name == job.submitter and who.organisation == job.organisation
        if not own and not (who.role is Role.PROJECT_ADMIN or (who.role is Role.ORG_ADMIN and who.organisation == job.organisation)):
            raise Refused(f"job {job.id!r} is {job.submitter}'s: {who} may look at it only.")
        return job

    async def _status(self, job_id: str) -> str:
        return next((job.status for job in await self.store.jobs() if job.id == job_id), "unknown")

    def _folder(self, job_id: str) -> Path:
        return self.settings.state / "jobs" / job_id

    def _new_id(self, name: str) -> tuple[int, str]:
        """A number for the queue and a name for the job, such as digits-0001."""
        self._numbers[name] = self._numbers.get(name, 0) + 1
        return time.time_ns(), f"{name}-{self._numbers[name]:04d}"

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("the server failed: %s", error, exc_info=error)

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(done)


def _queued(active: _Active) -> Queued:
    accepted = [member for member in active.members.values() if member.state == "accepted"]
    if not active.job.fixed:
        return Queued(active.job.id, tuple(m.site for m in accepted), active.manifest.min_sites, active.manifest.resources)
    sites = tuple(member.site for member in accepted if member.rank is not None)
    return Queued(active.job.id, sites, active.manifest.min_sites, active.manifest.resources, fixed=True)


class _Rounds(msgspec.Struct):
    rounds: int
