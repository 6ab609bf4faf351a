"""A site's agent: one process that connects out to the server, decides by the site's policy, and starts others for training code.

It holds the keys, the policy and the audit log; the training processes hold none of them. What it needs to go on after `kill -9` lies in
the kit's state folder, see `hanse.site.kept`. The server sends a site's open tasks again on each connection, so a cut loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from blake3 import blake3

from hanse.errors import ConfigError, Failure, HanseError, IdentityError, LinkBroken, Refused, StorageFull
from hanse.figures import Figure, published
from hanse.identity.authority import request
from hanse.identity.certificates import Credentials, Role
from hanse.identity.kit import CREDENTIALS, Kit
from hanse.jobs.archive import open_manifest
from hanse.messages.wire import (
    Assignment,
    Delivery,
    End,
    FromServer,
    FromSite,
    Hello,
    Offer,
    OfferReply,
    Received,
    Resources,
    Welcome,
    Withdraw,
)
from hanse.sandbox import Sandbox
from hanse.site import admission
from hanse.site.held_job import COMPLETED, HeldJob, Site
from hanse.site.hours import Hours
from hanse.site.kept import Kept, write_whole
from hanse.site.ledger import Ledger
from hanse.site.pace import Pace
from hanse.site.policy import read_policy
from hanse.site.process import stay_small
from hanse.transport.client import Client, ControlStream, Pacing

AUDIT = "audit.jsonl"
MANIFESTS = "manifests"
"""A folder that tells which job each signed manifest was: a bundle runs once, whoever offers it again."""

FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 10.0
_RENEW_AGAIN_S = 600.0
_SLEEP_S = 3600.0

logger = logging.getLogger(__name__)
Ready = Callable[[], None]


async def run_agent(kit: Kit, *, ready: Ready = lambda: None) -> None:
    """Be the site's agent until SIGTERM or Ctrl-C. `ready` is called once, when the server has answered for the first time.

    Raises ConfigError or IdentityError, before it connects, for a kit or policy that cannot be used.
    """
    if kit.role is not Role.SITE:
        raise ConfigError(f"{kit.folder} is the kit of a {kit.role}: `hanse site start` needs a site's, which `hanse site join` makes.")
    stay_small()
    agent = Agent(kit, ready=ready)
    running = asyncio.current_task()
    assert running is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        await agent.run()
    except asyncio.CancelledError:
        logger.info("site %s stops", kit.name)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


class Agent:
    """A site's side of its federation. `run` runs until it is cancelled."""

    def __init__(self, kit: Kit, *, ready: Ready = lambda: None) -> None:
        self.kit = msgspec.structs.replace(kit, folder=kit.folder.resolve())
        self.jobs: dict[str, HeldJob] = {}
        self._state = self.kit.state_folder
        self._ready: Ready | None = ready
        self._policy = read_policy(self.kit.policy_file)
        self._credentials = self.kit.credentials()
        self._outbox: asyncio.Queue[FromSite] | None = None
        self._client: Client | None = None
        self._connected = asyncio.Event()
        self._written = asyncio.Event()
        self._resources = self.kit.resources or machine_resources()
        self._no_sandbox: str | None = None
        rate = self._policy.caps.bytes_per_second
        self._up = None if rate is None else Pace(rate).take
        self._down = None if rate is None else Pace(rate).take

    async def run(self) -> None:
        """Connect, and stay connected. On the way out, training processes end and the state stays."""
        for folder in self.kit.kept_folders():
            folder.mkdir(parents=True, exist_ok=True)
        (self._state / MANIFESTS).mkdir(parents=True, exist_ok=True)
        with Ledger(self._state / AUDIT) as self._ledger:
            sandbox = await self._try_sandbox()
            hours = Hours(self._policy.hours(), self._state, self._ledger.append)
            self._site = Site(
                kit=self.kit,
                state=self._state,
                policy=self._policy,
                ledger=self._ledger,
                sandbox=sandbox,
                post=self._post,
                client=self._reach,
                open=hours.open,
            )
            self._ledger.append("start", site=self.kit.name, version=version(), sandbox=sandbox is not None)
            try:
                with published(self.kit.metrics, self._figures):
                    await self._work(hours)
            finally:
                if self._client is not None:
                    await self._client.close()
                with contextlib.suppress(StorageFull):
                    self._ledger.append("stop", site=self.kit.name)

    async def _work(self, hours: Hours) -> None:
        async with asyncio.TaskGroup() as self._group:
            self._load_jobs()
            self._group.create_task(self._keep_certificate())
            self._group.create_task(self._sync_ledger())
            self._group.create_task(hours.watch())
            try:
                await self._stay_connected()
            finally:
                for job in self.jobs.values():
                    job.stop()

    def _figures(self) -> Iterator[Figure]:
        """What Prometheus is told; called from another thread."""
        lines = dict(self._ledger.written)
        moved = {kind: self._ledger.written_bytes[kind] for kind in ("task", "update")}
        yield Figure("hanse_site_connected", "Whether the server is reached.", self._connected.is_set())
        yield Figure("hanse_site_jobs", "Jobs that this site takes part in.", len(self.jobs))
        yield Figure("hanse_site_audit_lines_total", "Lines of the audit log since the start.", lines, "kind", counter=True)
        yield Figure("hanse_site_bytes_total", "Bytes of tasks that came and updates that left.", moved, "kind", counter=True)

    # the connection

    async def _stay_connected(self) -> None:
        """Talk to the server; after a cut at once again, then after longer and longer waits."""
        delay_s, own = 0.0, asyncio.current_task()
        assert own is not None
        while True:
            self._conversation, refused = asyncio.create_task(self._converse()), False
            try:
                await self._conversation
            except asyncio.CancelledError:
                if own.cancelling():
                    raise  # and else it is only the conversation that ends, to go on with a new certificate
            except LinkBroken as error:
                logger.warning("site %s: %s", self.kit.name, error)
            except HanseError as error:
                logger.error("site %s: the server does not take this site: %s", self.kit.name, error)
                refused = True
            if self._connected.is_set():
                self._connected.clear()
                delay_s = delay_s if refused else 0.0
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))
            delay_s = min(max(2 * delay_s, FIRST_DELAY_S), LONGEST_DELAY_S)

    async def _converse(self) -> None:
        """One control stream, from Hello until it ends. Raises LinkBroken, or what the server raised."""
        if self._client is None:
            self._client = Client(self.kit.server, self._credentials, proxy=self.kit.proxy, up=self._up, down=self._down)
        stream = await self._client.control()
        outbox = self._outbox = asyncio.Queue()
        self._post(Hello(version=version(), resources=self._resources, accepted=sorted(self.jobs)))
        sender = asyncio.create_task(_send(outbox, stream, self._up))
        try:
            async for message in stream:
                await self._take(message)
                await _paced(message, self._down)
        finally:
            self._outbox = None
            sender.cancel()
            await stream.close()

    def _post(self, message: FromSite) -> None:
        """Send, if there is a connection; if not, the server asks again when there is one."""
        self._written.set()
        if self._outbox is not None:
            self._outbox.put_nowait(message)

    async def _reach(self) -> Client:
        await self._connected.wait()
        assert self._client is not None
        return self._client

    async def _take(self, message: FromServer) -> None:
        match message:
            case Welcome():
                logger.info("site %s is connected to %s", self.kit.name, self.kit.server)
                self._connected.set()
                if self._ready is not None:
                    self._ready()
                    self._ready = None
            case Offer():
                self._post(OfferReply(job=message.job, refusal=self._consider(message)))
            case End(job=job, status=status):
                if (held := self.jobs.get(job)) is not None:
                    self._ledger.append("end", job=job, status=status)
                    del self.jobs[job]
                    ending = self._group.create_task(held.end(status))
                    if status != COMPLETED:  # it may be offered again
                        await ending
            case Assignment(job=job) | Received(job=job) | Withdraw(job=job):
                self._pass_on(message, self.jobs.get(job))

    def _pass_on(self, message: Assignment | Received | Withdraw, job: HeldJob | None) -> None:
        if job is None:
            logger.warning("the server sent a %s of job %s, which this site does not have", type(message).__name__, message.job)
            return
        match message:
            case Assignment(task=task, payload=payload):
                job.assign(task, payload)
            case Received(task=task, problem=problem):
                job.received(task, problem)
            case Withdraw(tasks=tasks):
                job.withdraw(tasks)

    # jobs

    def _consider(self, offer: Offer) -> Failure | None:
        """Take the job, or say why not. A job that was taken stays taken."""
        held = self.jobs.get(offer.job)
        try:
            if held is not None and held.offer.manifest != offer.manifest:
                raise Refused(f"another job of the id {offer.job!r} is here already")
            if held is not None:
                held.offered_again(offer)
                return held.left
            manifest, submitter = open_manifest(offer.manifest, offer.signature, self._credentials.roots)
            digest = blake3(offer.manifest).hexdigest()
            facts = {"job": offer.job, "name": manifest.name, "submitter": str(submitter), "manifest": digest}
            try:
                self._allow(offer)
                kept = Kept(self._state / "jobs", offer.job)
                self._remember(digest, offer.job)
                kept.save_offer(offer)
            except HanseError as error:
                self._ledger.append("offer", **facts, decision="refused", why=str(error))
                raise
            self._ledger.append("offer", **facts, decision="accepted")
            self.jobs[offer.job] = HeldJob(self._site, offer, manifest, kept, self._group)
        except HanseError as error:
            logger.warning("job %s is refused: %s", offer.job, error)
            return Failure.of(error)
        logger.info("job %s, %s of %s, is accepted", offer.job, manifest.name, submitter)
        return None

    def _remember(self, manifest: str, job: str) -> None:
        """Raises Refused if the manifest was another job here."""
        path = self._state / MANIFESTS / manifest
        before = path.read_text() if path.exists() else job
        if before != job:
            raise Refused(f"job {job!r} has the manifest of job {before!r}: a signed job runs once.", hint="Submit it anew.")
        write_whole(path, job.encode())

    def _allow(self, offer: Offer, now: datetime | None = None) -> None:
        """Raises what stands against a job."""
        admission.allow(
            offer,
            kit=self.kit,
            policy=self._policy,
            roots=self._credentials.roots,
            resources=self._resources,
            no_sandbox=self._no_sandbox,
            now=now,
        )

    def _load_jobs(self) -> None:
        """The jobs that were here when the agent stopped, or was stopped. Those that the policy no longer allows are left."""
        folder = self._state / "jobs"
        folder.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                path.unlink(missing_ok=True)
                continue
            try:
                kept = Kept(folder, path.name)
                offer = kept.offer()
                taken = datetime.fromtimestamp((path / "offer").stat().st_mtime, UTC)  # the submitter's certificate may end while it runs
                manifest, _ = open_manifest(offer.manifest, offer.signature, self._credentials.roots, now=taken)
            except HanseError as error:
                logger.warning("%s is no job that can go on: %s", path, error)
                continue
            self.jobs[offer.job] = held = HeldJob(self._site, offer, manifest, kept, self._group)
            try:
                self._allow(offer, taken)
            except HanseError as error:
                held.left = Failure.of(error)

    # what goes on beside

    async def _try_sandbox(self) -> Sandbox | None:
        """The sandbox for training code; None if there is to be none, or none can be had."""
        if self._policy.sandbox == "off":
            return None
        sandbox = admission.sandbox_of(self.kit, gpus=bool(self._resources.gpus))
        self._no_sandbox = await asyncio.to_thread(sandbox.problem)
        if self._no_sandbox is None:
            return sandbox
        what = "jobs are refused" if self._policy.sandbox == "required" else "training code runs without a sandbox"
        logger.warning("site %s: %s: %s", self.kit.name, what, self._no_sandbox)
        self._ledger.append("no sandbox", why=self._no_sandbox)
        return None

    async def _sync_ledger(self) -> None:
        """Force the audit log to the disk after each exchange, aside: a line outlives this process before the update it tells of leaves,
        and a power cut a moment later."""
        while True:
            await self._written.wait()
            self._written.clear()
            try:
                await asyncio.to_thread(self._ledger.sync)
            except HanseError as error:
                logger.error("%s", error)

    async def _keep_certificate(self) -> None:
        """Renew the certificate in time, for the same key, and go on with the new one."""
        while True:
            credentials = self._credentials
            left_s = (credentials.renew_at - datetime.now(UTC)).total_seconds()
            if left_s > 0:
                await asyncio.sleep(min(left_s, _SLEEP_S))  # so that a clock that is set is noticed
                continue
            try:
                client = await self._reach()
                answer = await client.call("renew", csr=request(credentials.key).decode())
                renewed = _renewed(credentials, answer)
            except HanseError as error:
                life_s = (credentials.expires - datetime.now(UTC)).total_seconds()
                logger.error("site %s: the certificate, good for %.0f s, was not renewed: %s", self.kit.name, life_s, error)
                await asyncio.sleep(max(1.0, min(_RENEW_AGAIN_S, life_s / 10)))
                continue
            renewed.save(self.kit.folder / CREDENTIALS)
            self._ledger.append("renewal", expires=renewed.expires.isoformat(timespec="seconds"))
            logger.info("site %s: the certificate is renewed, until %s", self.kit.name, renewed.expires)
            self._credentials = renewed
            self._client = None
            self._conversation.cancel()
            await client.close()


async def _send(outbox: asyncio.Queue[FromSite], stream: ControlStream, pace: Pacing | None) -> None:
    """Send what comes, until the stream breaks, which whoever reads it finds out."""
    with contextlib.suppress(HanseError):
        while True:
            message = await outbox.get()
            await _paced(message, pace)
            await stream.send(message)


async def _paced(message: FromSite | FromServer, pace: Pacing | None) -> None:
    """Returns when a task or an update in the message is within the rate; all else is small."""
    if pace is not None and isinstance(message, Assignment | Delivery) and message.payload.inline is not None:
        await pace(len(message.payload.inline))


def _renewed(old: Credentials, answer: object) -> Credentials:
    """The credentials with a new certificate. Raises IdentityError if it is not for the same site and key."""
    if not isinstance(answer, dict) or not isinstance(answer.get("certificate"), str):
        raise IdentityError("the server sent no certificate")
    renewed = replace(old, certificate=answer["certificate"].encode())
    if renewed.identity != old.identity or renewed.expires <= old.expires:
        raise IdentityError(f"the server sent a certificate of {renewed.identity}, until {renewed.expires}: it is no renewal")
    return renewed


def machine_resources() -> Resources:
    """What this machine has."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    return Resources(cores=os.cpu_count() or 1, memory_bytes=memory_bytes, gpus=gpus)


def version() -> str:
    """Of this package."""
    return importlib.metadata.version("hanse")
