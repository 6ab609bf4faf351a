"""Fine-tuning in a federation of real processes: mutual TLS, sandboxes, policies, and kill -9 in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.end_to_end.federation import SERVER, Federation, federation, make_template, until
from tests.finetuning.run.conftest import MODEL

from hanse.environments import ProdEnv, SimEnv
from hanse.environments.local import admin_kit
from hanse.errors import JobFailed, Refused
from hanse.finetuning.contract import Gate, Learning, Party, Project, Schema, write_project
from hanse.finetuning.init import init
from hanse.finetuning.points import digest_of
from hanse.finetuning.run import Tuned, fine_tune
from hanse.finetuning.versions import Versions
from hanse.identity.kit import read_kit, write_kit
from hanse.sandbox import Sandbox
from hanse.server.run import Run
from hanse.site.ledger import read, verify

SITES = ("acme", "north", "south")
NO_SANDBOX = Sandbox().problem()
SANDBOX = "required" if NO_SANDBOX is None else "'off'"
LEARNING = Learning(round_trips=2, client_steps=60, batch_size=16, controls=False)
ROWS = {"train": 300, "holdout": 800, "test": 200}


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asyncio.run(make_template(tmp_path_factory.mktemp("finetuning") / "template", SITES))


@pytest.fixture(autouse=True)
def _soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that follows a job of a federation that is gone ends, and with it a test that has failed."""
    monkeypatch.setattr("hanse.environments.federation.GIVEN_UP_AFTER_S", 30.0)


class Parties:
    """The project folders of a vendor and of clients."""

    def __init__(self, folder: Path, weights: Path, clients: Sequence[str] = ("north",)) -> None:
        self.folder, self.sites = folder, ("acme", *clients)
        project = Project(
            name="line-3",
            vendor=Party(site="acme", organisation="Acme Vision"),
            clients=[Party(site=site, organisation=f"{site.title()} Clinic") for site in clients],
            schema=Schema(kind="table", columns=[f"x{number}" for number in range(6)], slices=["device"]),
            learning=LEARNING,
            gate=Gate(resamples=200, margin_abs=0.05),
        )
        code = folder / "model.py"
        folder.mkdir(parents=True)
        code.write_text(MODEL)
        init(self["acme"], project, who="vera", code=code, weights=weights)
        for number, site in enumerate(self.sites):
            write_project(self[site], project)
            (self[site] / "model.py").write_text(MODEL)
            sections = ("train", "holdout" if site == "acme" else "test")
            for section in sections:
                np.savez(self[site] / f"{section}.npz", **_rows(site, section, number))
            (self[site] / "data.yaml").write_text("".join(f"{name}: {{kind: arrays, file: {name}.npz}}\n" for name in sections))

    def __getitem__(self, site: str) -> Path:
        return self.folder / site

    def simulated(self, client: str = "north") -> Tuned:
        config = {site: {"finetuning": str(self[site])} for site in ("acme", client)}
        env = SimEnv(sites=["acme", client], site_config=config, runs=self.folder / "runs", console="quiet", workers=1)
        return fine_tune(self["acme"], env, who="vera", client=client)


def _rows(site: str, section: str, number: int) -> dict[str, Any]:
    """The vendor's rows are told apart by the sum of two columns; each client's device turns one of these."""
    rng = np.random.default_rng([number, len(section)])
    count = ROWS[section] if site == "acme" or section == "test" else 40
    labels = np.arange(count) % 2
    inputs = rng.normal(size=(count, 6)) + 1.6 * (2 * labels[:, None] - 1) * np.array([1, 1, 0, 0, 0, 0])
    if number:
        inputs[:, number % 2] *= -1
    return {"inputs": inputs.astype(np.float32), "labels": labels, "device": np.array([f"{site}-{row // 2 % 2}" for row in range(count)])}


@asynccontextmanager
async def running(template: Path, folder: Path, parties: Parties, *, policy: str = "") -> AsyncIterator[Federation]:
    """The federation of these parties. policy: further clauses of the clients."""
    own = folder / "template"
    shutil.copytree(template, own)
    for site in parties.sites:
        kit = read_kit(own / "sites" / site)
        own_folder = str(parties[site])
        keep = [f"{own_folder}/{name}" for name in ("exchange", "scores", "reports", "evidence", "inbox")]
        write_kit(kit.folder, msgspec.structs.replace(kit, config={"finetuning": own_folder}, data=[own_folder], keep=keep))
        kit.policy_file.write_text(f"sandbox: {SANDBOX}\n{'' if site == 'acme' else policy}\n")
    async with asyncio.timeout(100), federation(own, folder / "federation", parties.sites) as processes:
        yield processes
    assert processes.processes() == []


async def tuned(processes: Federation, parties: Parties, client: str = "north") -> Tuned:
    env = ProdEnv(admin_kit(processes.folder), sites=["acme", client], runs=parties.folder / "runs", console="quiet")
    try:
        return await asyncio.to_thread(fine_tune, parties["acme"], env, who="vera", client=client)
    except BaseException as error:
        for name in (SERVER, *parties.sites):
            error.add_note(f"--- the end of the log of {name}:\n{processes.log(name)[-2000:]}")
        raise


async def the_job(processes: Federation) -> None:
    """Wait until the server has a job, and look at that from then on."""
    jobs = processes.state(SERVER) / "jobs"
    await until(lambda: jobs.is_dir() and any(path.joinpath("run.json").is_file() for path in jobs.iterdir()), "a job")
    (processes.job,) = (path.name for path in jobs.iterdir() if path.joinpath("run.json").is_file())


def same(one: Tuned, other: Tuned) -> bool:
    """Whether both gave the same candidate, the same figures and the same verdict."""
    digests = [digest_of(each.run.get_result().params) for each in (one, other)]
    figures = [[{k: v for k, v in e.items() if k != "time"} for e in each.run.events("figures")] for each in (one, other)]
    return digests[0] == digests[1] and figures[0] == figures[1] and one.evidence == other.evidence


@pytest.fixture
def parties(tmp_path: Path, base_weights: Path) -> Parties:
    return Parties(tmp_path / "parties", base_weights)


@pytest.fixture
def simulated(tmp_path: Path, base_weights: Path) -> Tuned:
    return Parties(tmp_path / "simulated", base_weights).simulated()


async def test_a_federation_gives_the_bits_of_a_simulation(template: Path, tmp_path: Path, parties: Parties, simulated: Tuned) -> None:
    async with running(template, tmp_path, parties) as processes:
        found = await tuned(processes, parties)
        starts = [line for line in read(processes.state("north") / "audit.jsonl") if line["kind"] == "start"]
        assert starts[-1]["sandbox"] is (NO_SANDBOX is None)
    assert same(found, simulated)
    assert verify(parties["north"] / "exchange" / "left.jsonl") > 0


@pytest.mark.parametrize("seed", [1, 2])
async def test_kill_9_of_anybody_changes_no_bit(template: Path, tmp_path: Path, parties: Parties, simulated: Tuned, seed: int) -> None:
    rng = random.Random(seed)
    moments = [(commit, rng.choice(("task", "training", "trained", "update"))) for commit in (2, 4, 6)]
    faults = dict(zip(rng.sample(("server", "agent", "trainer"), 3), moments, strict=True))
    async with running(template, tmp_path, parties) as processes:
        run = asyncio.create_task(tuned(processes, parties))
        try:
            await the_job(processes)
            for what, (commit, moment) in faults.items():
                await until(lambda: run.done() or processes.reached("north", moment, (commit, 0)), f"{moment} of {commit}")  # noqa: B023
                assert not run.done(), "it was faster than the fault"
                if what == "trainer":
                    await until(lambda: run.done() or processes.trainer("north"), "the client's training process")
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(processes.trainer("north") or 0, signal.SIGKILL)
                else:
                    async with processes.killed(SERVER if what == "server" else "north"):
                        processes.look()
            found = await run
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
        for site in parties.sites:
            verify(processes.state(site) / "audit.jsonl")
    assert same(found, simulated), faults
    for site in parties.sites:
        assert verify(parties[site] / "exchange" / "left.jsonl") > 0
    assert Versions(parties["acme"]).history.verify() > 0


@pytest.mark.parametrize(
    ("policy", "clause", "tasks"),
    [
        ("metrics: {deny: ['check_*']}", "metrics.deny", set()),
        ("metrics: {allow: [has_base, 'check_*', cpu_seconds, eer]}", "metrics.allow", {"prepare", "install"}),
        ("tensors: {deny: ['values/*']}", "tensors.deny", {"prepare", "install"}),
        ("workflows: [fedavg]", "workflows", set()),
    ],
    ids=["check", "figures", "tensors", "workflow"],
)
async def test_what_the_clients_policy_forbids_does_not_leave(
    template: Path, tmp_path: Path, parties: Parties, policy: str, clause: str, tasks: set[str]
) -> None:
    async with running(template, tmp_path, parties, policy=policy) as processes:
        with pytest.raises((JobFailed, Refused), match=rf"\[{clause}\]") as refused:
            await tuned(processes, parties)
    lines = list(read(processes.state("north") / "audit.jsonl"))
    if isinstance(refused.value, JobFailed):
        crossed = [event for event in Run(refused.value.folder).events("crossed") if event["party"] == "north"]
        assert {event["task"] for event in crossed} == tasks
        updates = [line for line in lines if line["kind"] == "update"]
        assert len(updates) == len(crossed) + 1  # the last one says why there is none
        assert updates[-1]["tensors"] == 0
        assert updates[-1]["bytes"] < 1000
    else:
        assert [line["decision"] for line in lines if line["kind"] == "offer"] == ["refused"]
        assert not [*(parties["north"] / "exchange").iterdir()]  # the agent has made it, to be kept
    assert len(Versions(parties["acme"]).list()) == 1
    assert Versions(parties["acme"]).history.lines[-1]["kind"] == "failed"


async def test_two_clients_never_see_anything_of_each_other(template: Path, tmp_path: Path, base_weights: Path) -> None:
    clients = ("north", "south")
    parties = Parties(tmp_path / "parties", base_weights, clients)
    async with running(template, tmp_path, parties) as processes:
        found = {site: await tuned(processes, parties, site) for site in clients}
    for site in clients:
        assert same(found[site], Parties(tmp_path / f"simulated-{site}", base_weights, clients).simulated(site))
    assert found["north"].version.parent == found["south"].version.parent
    for site, other in (("north", "south"), ("south", "north")):
        theirs = {digest for each in left_by(parties[other]) for digest in each}
        theirs |= {path.stem for path in (parties[other] / "exchange" / "points").rglob("*.safetensors")}
        theirs |= {found[other].version.model, found[other].version.digest, found[other].run.folder.name, f"{other}-0"}
        shared = {path.stem for path in (parties[other] / "exchange" / "models").iterdir()}
        assert len(theirs) > 20
        for path in parties[site].rglob("*"):
            if path.is_file() and path.name != "project.yaml":
                text = str(path.relative_to(parties[site])).encode() + path.read_bytes()
                assert not [word for word in theirs - shared if word.removeprefix("blake3:").encode() in text], path
                assert other.encode() not in text, path


def left_by(folder: Path) -> list[list[str]]:
    """The digests of the tensors in each answer."""
    return [[tensor["digest"] for tensor in line["tensors"]] for line in read(folder / "exchange" / "left.jsonl")]
