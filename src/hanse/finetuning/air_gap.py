"""A job whose sites have no connection: its tasks and updates travel in signed bundles, and its result has the same bits as online.

The workflow runs where the job was begun, next to the sites that are *here*. When it waits for a site that is *away*, its tasks are written
as a bundle and the run ends. Once the bundle with the answer is imported, the workflow runs again from its last commit: it asks again what
it had asked since, and finds the updates that are there by now. A durable server does the same after a crash.

    run.json …          a run folder, see `hanse.server.run_folder`, with the job folder
    air-gap.json        who is here and away, the signed job, and which bundles went out and came back
    tasks/C-I           the frame of task I after commit C; gone with the next commit
    updates/SITE/C-I    a site's update
    sites/SITE/         state and audit log of a site that is here
    outbox/             the bundles to carry
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import msgspec
from blake3 import blake3

from hanse.aggregation.aggregator import Aggregator
from hanse.cohort import Cohort, fold_group
from hanse.environments.loop import run_async
from hanse.errors import ConfigError, IdentityError, Refused, WireError
from hanse.finetuning.bundle import Bundle, Manifest, now, open_bundle, write_bundle
from hanse.finetuning.files import write_whole
from hanse.identity.certificates import Identity, Role
from hanse.identity.kit import KIT, Kit, read_kit, write_kit
from hanse.identity.signatures import Signer
from hanse.jobs.archive import open_manifest, pack, trimmed
from hanse.jobs.bundle import MODEL, check_not_importing
from hanse.jobs.loading import read_job
from hanse.jobs.recipe import Recipe, json_values
from hanse.messages.codec import decode_update, encode_task
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Update
from hanse.messages.wire import Blob, FromServer, Offer, TaskRef, decode_message, encode_message
from hanse.server.console import Console
from hanse.server.run import Run
from hanse.server.run_folder import RUN, RunFolder, first_facts
from hanse.server.runner import run_to_end
from hanse.simulation.roster import NamedSites
from hanse.site.kept import Kept
from hanse.site.policy import DEFAULT_POLICY, Leaving, Policy, read_policy
from hanse.site.without_server import SiteWithoutServer, blob_of, update_name
from hanse.transport.blobs import map_file
from hanse.transport.courier import Ask, Folded, Roster

JOB, STATE, OUTBOX, TASKS, UPDATES, SITES, INCOMING = "job", "air-gap.json", "outbox", "tasks", "updates", "sites", "incoming"
OFFER, ARCHIVE = "offer", "job.zip"
NO_SERVER = "no-server:0"
"""What stands in the kit of a site that has never joined."""

OPEN = Policy(meta=Leaving(allow=("*",)), logs=True, sandbox="off")
"""For the sites that are here: the job is their own."""

_NAME = re.compile(r"\w[\w.-]{0,99}")
_MAX_HEADER_BYTES = 16 << 20
_PASSES = 100


class Away(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A site without a connection. organisation: whose people may sign its updates. config: JSON values for its training code."""

    organisation: str
    config: dict[str, Any] = {}


@dataclass(frozen=True)
class Standing:
    """How far a run, or a site's part in it, has come.

    status: waiting (for the answers to what is to be carried), answered (a site's updates are to be carried back), or completed.
    carry: files, each with whom it is for. notes: what is worth a sentence.
    """

    status: Literal["waiting", "answered", "completed"]
    carry: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = ()
    run: Run | None = field(default=None, compare=False)


class WaitingForBundle(Exception):
    """A run has come as far as it can without the answers to what is to be carried. It is no error."""

    def __init__(self, standing: Standing) -> None:
        super().__init__("".join(f"carry {path} to {site}, and import the answer. " for path, site in standing.carry).rstrip())
        self.standing = standing


@dataclass(frozen=True, kw_only=True)
class AirGapEnv:
    """An environment for `Recipe.execute`: what `begin` does, or `export` where the run was begun before.

    Its arguments are those of `begin`. `execute` gives the run once it is complete, at once if it is, and until then raises
    WaitingForBundle.
    """

    here: Mapping[str, Mapping[str, Any]]
    away: Mapping[str, Away]
    folder: Path
    signer: Signer
    roots: bytes
    console: str = "auto"

    def execute(self, recipe: Recipe) -> Run:
        if (self.folder / STATE).is_file():
            job = json.loads((self.folder / RUN).read_text())["job"]
            if (job["name"], job["recipe"]) != (recipe.name, recipe.kind):
                raise ConfigError(f"{self.folder} holds a run of the {job['recipe']} job {job['name']!r}, not of {recipe.name!r}")
            standing = export(self.folder, signer=self.signer, roots=self.roots, console=self.console)
        else:
            standing = begin(
                recipe,
                here=self.here,
                away=self.away,
                folder=self.folder,
                signer=self.signer,
                roots=self.roots,
                console=self.console,
            )
        if standing.run is None:
            raise WaitingForBundle(standing)
        return standing.run


def begin(
    recipe: Recipe,
    *,
    here: Mapping[str, Mapping[str, Any]],
    away: Mapping[str, Away],
    folder: Path,
    signer: Signer,
    roots: bytes,
    console: str = "auto",
) -> Standing:
    """Begin a job in `folder`, which must be empty or not there, and go on with it until it waits for a bundle.

    here: the sites whose tasks run on this machine, with their config. away: those that get bundles. signer: who signs the job and the
    bundles. roots: PEM, the authorities that are believed.
    Raises ConfigError at once if something is wrong with the arguments; JobFailed or JobStopped if the job ends without doing what it was
    asked: `export` goes on from its last commit.
    """
    check_not_importing()
    roster = NamedSites([*here, *away])
    if wrong := [name for name in roster if not _NAME.fullmatch(name)] or sorted(here.keys() & away.keys()):
        raise ConfigError(f"{wrong[0]!r} is no name for one site: letters, digits, _, - and . make one, and a site is here or away")
    recipe.check_sites(len(roster))
    for site, config in here.items():
        json_values(f"here: {site!r}", config)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: a run has a folder of its own.", hint="Go on with one that has begun by exporting it.")
    job = recipe.export(folder / JOB)
    whole, archive = folder / "whole.zip", folder / ARCHIVE
    signed, signature = pack(job, whole, signer=signer, sites=list(roster), site_config={site: away[site].config for site in away})
    trimmed(whole, archive, {MODEL})  # it comes with the tasks
    whole.unlink()
    facts = first_facts(recipe, roster, job, {"kind": "air gap", "here": sorted(here), "away": sorted(away)})
    state = _State(
        run=uuid4().hex,
        manifest=signed,
        signature=signature,
        archive=blob_of(archive),
        here={site: dict(config) for site, config in here.items()},
        away={site: _Away(about=about) for site, about in away.items()},
    )
    RunFolder(folder, facts | {"status": "waiting", "reason": ""}, listen=lambda event: None, progress=lambda *_: None).write_facts()
    state.save(folder)
    return _go_on(folder, state, signer, roots, console)


def export(folder: Path, *, signer: Signer, roots: bytes, target: Path | None = None, console: str = "auto") -> Standing:
    """Go on with what was begun, or answered, in `folder`, and write what is to be carried, again if it was written before.

    target: a folder to copy the bundles to, or the name of the file if there is one. What a job's failed tasks gave is asked for anew.
    """
    if (folder / STATE).is_file():
        state = _State.read(folder)
        if json.loads((folder / RUN).read_text())["status"] in ("failed", "stopped"):
            _forget_failures(folder, state)
        standing = _go_on(folder, state, signer, roots, console)
    else:
        standing = _last_answer(folder)
    return standing if target is None else _copied(standing, target)


def import_bundle(
    path: Path,
    *,
    folder: Path,
    signer: Signer,
    roots: bytes,
    config: Mapping[str, Any] | None = None,
    keep: Sequence[str] = (),
    data: Sequence[str] = (),
    checks: bool = True,
    console: str = "auto",
) -> Standing:
    """Take in a bundle. In a run's folder, these are updates, and the run goes on; anywhere else, tasks, which are done.

    At a site the folder is its kit, made at the first import, with a policy to be edited; config, keep, data: its settings in kit.yaml
    then, as `Kit` has them. checks: False to run the job without policy and sandbox. A bundle that was imported before changes nothing.
    Raises IdentityError, WireError or Refused for a bundle that is not accepted: nothing has changed then. At a site also what its policy
    refuses; in a run's folder what `begin` raises.
    """
    bundle = open_bundle(path, roots)
    if (folder / STATE).is_file():
        state = _State.read(folder)
        note = _take_updates(folder, state, bundle)
        return replace(_go_on(folder, state, signer, roots, console), notes=(note,))
    if bundle.manifest.kind == "updates":
        raise Refused(
            f"{path} holds the updates of {bundle.manifest.site!r}: it goes to where the run was begun, and {folder} is not there"
        )
    settings = {"config": dict(config or {}), "keep": list(keep), "data": list(data)}
    return run_async(_answer(bundle, folder, signer, roots, settings, checks))


def place_of(project: Path) -> Path:
    """Where a project's bundles and runs without a connection are: beside its folder, which training code may write to."""
    project = project.resolve()
    return project.with_name(f"{project.name}.air-gap")


def folder_for(place: Path, bundle: Path, roots: bytes) -> Path:
    """The folder below `place` that a bundle is to be imported in: of the run that it answers, or of the site. Raises as `open_bundle`."""
    about = open_bundle(bundle, roots).manifest
    runs = [folder for folder in runs_in(place) if _State.read(folder).run == about.run]
    return runs[0] if runs else place / "site"


def runs_in(place: Path) -> list[Path]:
    """The runs that were begun below `place`, oldest first."""
    return sorted((path.parent for path in place.glob(f"runs/*/{STATE}")), key=lambda path: path.stat().st_ctime)


# ----------------------------------------------------------------------------------------------------------- where the run was begun


class _Away(msgspec.Struct):
    """A site that is away. sequence: of the last bundle for it; tasks: what that asks; answered: up to which bundle there were answers."""

    about: Away
    sequence: int = 0
    tasks: list[TaskRef] = []
    answered: int = 0


class _State(msgspec.Struct, kw_only=True):
    """What `air-gap.json` holds."""

    run: str
    manifest: bytes
    signature: bytes
    archive: Blob
    here: dict[str, dict[str, Any]]
    away: dict[str, _Away]

    @property
    def roster(self) -> NamedSites:
        return NamedSites([*self.here, *self.away])

    def offer(self, site: str) -> Offer:
        rank, count = self.roster.index(site), len(self.roster)
        return Offer(job=self.run, manifest=self.manifest, signature=self.signature, archive=self.archive, rank=rank, sites=count)

    def save(self, folder: Path) -> None:
        write_whole(folder / STATE, msgspec.json.encode(self))

    @classmethod
    def read(cls, folder: Path) -> _State:
        return msgspec.json.decode((folder / STATE).read_bytes(), type=cls)


class _Waiting(BaseException):
    """The workflow waits for these tasks of sites that are away. It is no Exception: nothing takes it for the job's end."""

    def __init__(self, missing: Mapping[str, set[TaskRef]]) -> None:
        self.missing = missing


class _Sites:
    """The courier. A site that is away and has not answered is waited for without end: the run is over before that."""

    def __init__(self, folder: Path, state: _State, own: Identity, roots: bytes, recipe: Recipe, sites: AsyncExitStack) -> None:
        """own: in whose name the sites that are here work. sites: where those that are here are entered, when they are first asked."""
        self.roster: Roster = state.roster
        self.missing: dict[str, set[TaskRef]] = {}
        self._folder, self._state, self._own = folder, state, own
        self._roots, self._recipe, self._sites = roots, recipe, sites
        self._here: dict[str, SiteWithoutServer] = {}
        self._one_at_a_time = asyncio.Lock()
        self._asks = 0
        self._stuck = asyncio.Event()

    async def ask(self, ask: Ask) -> AsyncGenerator[Update, None]:
        """See `Courier.ask`. Deadlines do not count: nobody knows how long a bundle travels."""
        self._asks += 1
        ref = TaskRef(ask.key[1], ask.key[2])
        frame = self._folder / TASKS / update_name(ref)
        if not frame.exists():
            write_whole(frame, b"".join(encode_task(ask.task)))
        for site in ask.sites:
            path = self._folder / UPDATES / site / update_name(ref)
            if not path.exists() and site in self._state.here:
                async with self._one_at_a_time:
                    await (await self._site(site)).perform(ref, frame)
            if path.exists():
                yield decode_update(map_file(path), max_header_bytes=_MAX_HEADER_BYTES)
            else:
                self.missing.setdefault(site, set()).add(ref)
        if any(ref in refs for refs in self.missing.values()):
            self._stuck.set()
            await asyncio.get_running_loop().create_future()

    async def fold(self, ask: Ask, aggregator: Aggregator) -> AsyncGenerator[Folded, None]:
        """See `Courier.fold`. A group of a single site comes unfolded."""
        async with aclosing(self.ask(ask)) as updates:
            arrived = {update.site: update async for update in updates}
        for number, group in enumerate(ask.groups):
            partial, theirs = None, tuple(arrived[site] for site in group)
            if len(group) > 1:
                partial, theirs = fold_group(theirs, aggregator, ask.task, self._recipe.filters.server_in, self._recipe.seed)
            yield Folded(number, partial, theirs, lambda: None)

    async def stuck(self) -> None:
        """Returns when an ask waits for a bundle, and what the workflow does at the same time has come to its asks too."""
        await self._stuck.wait()
        seen = -1
        while seen != self._asks or self._one_at_a_time.locked():
            async with self._one_at_a_time:  # what runs here comes to its end
                seen = self._asks
            for _ in range(_PASSES):
                await asyncio.sleep(0)

    async def _site(self, site: str) -> SiteWithoutServer:
        if site not in self._here:
            kit = _kit(site, self._own, self._folder / SITES / site, config=self._state.here[site])
            entered = SiteWithoutServer(
                kit,
                OPEN,
                self._state.offer(site),
                self._roots,
                archive=self._folder / ARCHIVE,
                updates=self._folder / UPDATES / site,
            )
            self._here[site] = await self._sites.enter_async_context(entered)
        return self._here[site]


def _go_on(folder: Path, state: _State, signer: Signer, roots: bytes, console: str) -> Standing:
    """Run the workflow from its last commit until it waits, or ends."""
    facts = json.loads((folder / RUN).read_text())
    if facts["status"] == "completed":
        return Standing("completed", run=Run(folder))
    recipe = read_job(folder / JOB)
    screen = Console(console)
    run = RunFolder(folder, facts, listen=screen.show, progress=screen.progress)
    run.committed = lambda _: _forget_before(folder, state, run.commits)
    with run.held():
        run.write_facts(status="running", reason="")
        restored = run.resume()
        model = recipe.first_model()[0] if restored is None else restored[0]
        run.event("start", job=recipe.name, sites=len(state.roster), rounds=recipe.total_rounds(), seed=recipe.seed, resumed=run.commits)
        try:
            run_to_end(lambda: _work(recipe, model, run, state, signer.identity, roots), run)
        except _Waiting as waiting:
            carry = _write_tasks(folder, state, waiting.missing, recipe.name, signer)
            run.write_facts(status="waiting", reason=f"waits for the updates of {', '.join(site for _, site in carry)}")
            return Standing("waiting", carry)
    return Standing("completed", run=Run(folder))


async def _work(recipe: Recipe, model: FLModel, run: RunFolder, state: _State, own: Identity, roots: bytes) -> None:
    """The workflow, to its end. Raises _Waiting if it comes to wait for a bundle first."""
    async with AsyncExitStack() as stack:
        sites = _Sites(run.path, state, own, roots, recipe, stack)
        cohort = Cohort(sites, run, job_id=recipe.name, seed=recipe.seed, filters=recipe.filters)
        workflow = asyncio.ensure_future(recipe.workflow()(cohort, model))
        stuck = asyncio.create_task(sites.stuck())
        try:
            await asyncio.wait({workflow, stuck}, return_when=asyncio.FIRST_COMPLETED)
            ended = workflow.done()
        finally:
            for task in (workflow, stuck):
                task.cancel()
            await asyncio.gather(workflow, stuck, return_exceptions=True)
    if not ended:
        raise _Waiting(sites.missing)
    workflow.result()


def _write_tasks(
    folder: Path, state: _State, missing: Mapping[str, set[TaskRef]], job: str, signer: Signer
) -> tuple[tuple[Path, str], ...]:
    """A bundle for each site that has not answered; the one that it has already, if that holds the same tasks."""
    carry = []
    for site, refs in sorted(missing.items()):
        party, tasks = state.away[site], sorted(refs)
        if party.tasks != tasks or party.answered == party.sequence:
            party.sequence, party.tasks = party.sequence + 1, tasks
            state.save(folder)
        path = folder / OUTBOX / f"{job}-to-{site}-{party.sequence:03d}.bundle"
        if not path.exists():
            files = {f"{TASKS}/{update_name(ref)}": folder / TASKS / update_name(ref) for ref in tasks}
            if not party.answered:
                offer = folder / f"offer-{site}"
                write_whole(offer, encode_message(state.offer(site)))
                files |= {OFFER: offer, ARCHIVE: folder / ARCHIVE}
            about = Manifest(
                federation=signer.identity.federation,
                run=state.run,
                job=job,
                job_digest=blake3(state.manifest).hexdigest(),
                kind="tasks",
                site=site,
                organisation=party.about.organisation,
                sequence=party.sequence,
                tasks=tasks,
                signer=signer.identity.name,
            )
            write_bundle(path, about, files, signer)
        carry.append((path, site))
    return tuple(carry)


def _take_updates(folder: Path, state: _State, bundle: Bundle) -> str:
    """Put a site's updates where the workflow finds them. Returns what is to be said of it."""
    about, path = bundle.manifest, bundle.path
    if about.run != state.run:
        raise Refused(f"{path} is of another run of job {about.job!r}: it belongs elsewhere.")
    if about.kind == "tasks":
        raise Refused(f"{path} holds tasks for {about.site!r}: it is to be carried there, and its answer to be imported here.")
    party = state.away.get(about.site)
    if party is None or about.sequence > party.sequence:
        raise Refused(f"{path} answers bundle {about.sequence} for {about.site!r}, which this run has not written.")
    if bundle.signer.organisation != party.about.organisation:
        raise IdentityError(f"{path} holds updates of {about.site!r}, which {party.about.organisation!r} signs, and {bundle.signer} has.")
    names = {ref: update_name(ref) for ref in about.tasks}
    if about.files.keys() != {f"{UPDATES}/{name}" for name in names.values()}:
        raise WireError(f"{path} does not hold the updates that it names", offset=0)
    incoming, updates = folder / INCOMING, folder / UPDATES / about.site
    with _unpacked(bundle, incoming):
        for ref, name in names.items():
            update = decode_update(map_file(incoming / UPDATES / name), max_header_bytes=_MAX_HEADER_BYTES)
            if (update.site, update.task_id) != (about.site, TaskId(about.job, ref.commit, ref.index, about.site)):
                raise WireError(f"{path} holds an update of {update.site!r} for {update.task_id} as {name}", offset=0)
        new = [name for name in names.values() if (folder / TASKS / name).exists() and not (updates / name).exists()]
        updates.mkdir(parents=True, exist_ok=True)
        for name in new:
            (incoming / UPDATES / name).replace(updates / name)
    party.answered = max(party.answered, about.sequence)
    state.save(folder)
    if not new:
        return f"{path.name} was imported before, or nobody waits for it any more: nothing has changed."
    return f"{path.name}, signed by {bundle.signer}, brings {len(new)} of the updates of {about.site}."


def _forget_before(folder: Path, state: _State, commits: int) -> None:
    """No task of an earlier commit is asked for again."""
    for place in (folder / TASKS, *(folder / UPDATES / site for site in state.roster)):
        for path in place.glob("*-*"):
            if int(path.name.partition("-")[0]) < commits:
                path.unlink()


def _forget_failures(folder: Path, state: _State) -> None:
    for site in state.roster:
        for path in (folder / UPDATES / site).glob("*-*"):
            if decode_update(map_file(path), max_header_bytes=_MAX_HEADER_BYTES).failure is not None:
                path.unlink()


# ------------------------------------------------------------------------------------------------------------- at a site that is away


class _Part(msgspec.Struct, frozen=True):
    """What a site knows of a run. sender: the organisation that its tasks come from. sequence: of the last ones that were answered."""

    sender: str
    sequence: int = 0
    answer: str = ""


async def _answer(bundle: Bundle, folder: Path, signer: Signer, roots: bytes, settings: Mapping[str, Any], checks: bool) -> Standing:
    """Do the tasks of a bundle, and write the bundle with their updates."""
    about, own = bundle.manifest, signer.identity
    if own.organisation != about.organisation:
        raise Refused(f"{bundle.path} is for {about.site!r} of {about.organisation!r}, and {own} signs here.")
    kit = _site_kit(folder, about.site, own, settings)
    place = kit.state_folder / "air-gap" / about.run
    part_file, incoming, updates = place / "part.json", place / INCOMING, place / UPDATES / str(about.sequence)
    part = msgspec.json.decode(part_file.read_bytes(), type=_Part) if part_file.exists() else _Part(bundle.signer.organisation)
    if bundle.signer.organisation != part.sender:
        raise IdentityError(f"the tasks of this run come from {part.sender!r}, and {bundle.path} is signed by {bundle.signer}.")
    if about.sequence <= part.sequence:
        note = f"{bundle.path.name} was imported before: nothing has changed."
        return Standing("answered", ((folder / OUTBOX / part.answer, part.sender),), (note,))
    names = {ref: update_name(ref) for ref in about.tasks}
    with _unpacked(bundle, incoming):
        offer = _offer(bundle, incoming, kit)
        if not part.sequence and (signed_by := open_manifest(offer.manifest, offer.signature, roots)[1]).organisation != part.sender:
            raise IdentityError(f"{bundle.path} is signed by {bundle.signer}, and its job by {signed_by}.")
        archive = incoming / ARCHIVE if ARCHIVE in about.files else None
        policy = read_policy(kit.policy_file) if checks else OPEN
        async with SiteWithoutServer(kit, policy, offer, roots, archive=archive, updates=updates) as site:
            site.note("bundle in", digest=bundle.digest, signer=str(bundle.signer), sequence=about.sequence)
            write_whole(part_file, msgspec.json.encode(part))
            files = {f"{UPDATES}/{name}": await site.perform(ref, incoming / TASKS / name) for ref, name in names.items()}
            path = folder / OUTBOX / f"{about.job}-from-{about.site}-{about.sequence:03d}.bundle"
            answer = msgspec.structs.replace(about, kind="updates", signer=own.name, created=now())
            site.note("bundle out", digest=write_bundle(path, answer, files, signer), signer=str(own), sequence=about.sequence)
    write_whole(part_file, msgspec.json.encode(_Part(part.sender, about.sequence, path.name)))
    shutil.rmtree(updates)
    return Standing("answered", ((path, part.sender),))


def _offer(bundle: Bundle, incoming: Path, kit: Kit) -> Offer:
    """The job, from the bundle or as it is known from an earlier one. Raises Refused if neither has it, WireError if it is another one."""
    about = bundle.manifest
    if OFFER in about.files:
        offer = decode_message((incoming / OFFER).read_bytes(), FromServer)
    else:
        try:
            offer = Kept(kit.state_folder / "jobs", about.run).offer()
        except WireError as error:
            raise Refused(f"{bundle.path} holds tasks of a job that is not here yet: import the first bundle of this run first.") from error
    if not isinstance(offer, Offer) or offer.job != about.run or blake3(offer.manifest).hexdigest() != about.job_digest:
        raise WireError(f"{bundle.path} is of another job than it says", offset=0)
    return offer


def _site_kit(folder: Path, site: str, own: Identity, settings: Mapping[str, Any]) -> Kit:
    """The kit of the site in the folder, made now if there is none. Raises Refused if it is another site's."""
    if not (folder / KIT).exists():
        kit = _kit(site, own, folder, **settings)
        write_kit(folder, kit)
        if not kit.policy_file.exists():
            kit.policy_file.write_text(DEFAULT_POLICY, encoding="utf-8")
    kit = read_kit(folder.resolve())
    if (kit.federation, kit.name) != (own.federation, site):
        raise Refused(f"these tasks are for {site!r} of {own.federation!r}, and {folder} is the kit of {kit.name!r} of {kit.federation!r}.")
    return kit


def _last_answer(folder: Path) -> Standing:
    """What the site in the folder wrote last."""
    state = read_kit(folder).state_folder if (folder / KIT).is_file() else folder
    parts = sorted((state / "air-gap").glob("*/part.json"), key=lambda path: path.stat().st_mtime)
    part = msgspec.json.decode(parts[-1].read_bytes(), type=_Part) if parts else _Part("")
    if not part.answer:
        raise ConfigError(f"nothing is to be carried: no run has begun in {folder}, and no bundle was answered there.")
    return Standing("answered", ((folder / OUTBOX / part.answer, part.sender),))


# ---------------------------------------------------------------------------------------------------------------------------- at both


def _kit(site: str, identity: Identity, folder: Path, **settings: Any) -> Kit:
    return Kit(
        federation=identity.federation,
        role=Role.SITE,
        name=site,
        organisation=identity.organisation,
        server=NO_SERVER,
        folder=folder.resolve(),
        **settings,
    )


@contextlib.contextmanager
def _unpacked(bundle: Bundle, folder: Path) -> Iterator[None]:
    """The bundle's files, in the folder meanwhile."""
    bundle.unpack(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copied(standing: Standing, target: Path) -> Standing:
    """With copies of what is to be carried. Raises ConfigError for one file for two bundles."""
    if not target.is_dir() and len(standing.carry) > 1:
        raise ConfigError(f"{len(standing.carry)} bundles are to be carried: name a folder for them, and not {target}")
    carry = []
    for path, receiver in standing.carry:
        copy = target / path.name if target.is_dir() else target
        part = copy.with_name(f".{copy.name}.part")
        shutil.copyfile(path, part)
        part.replace(copy)
        carry.append((copy, receiver))
    return replace(standing, carry=tuple(carry))
