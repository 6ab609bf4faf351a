"""Vendor and client without a connection: only files go from one folder to the other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from hanse.cli.finetune.bundle import app
from hanse.environments.simulation import SimEnv
from hanse.errors import ConfigError, HanseError, IdentityError, JobFailed, Refused, WireError
from hanse.finetuning.air_gap import AirGapEnv, Away, Standing, WaitingForBundle, begin, export, import_bundle, place_of
from hanse.finetuning.bundle import open_bundle, write_bundle
from hanse.finetuning.contract import WRITTEN
from hanse.identity.authority import Authority, new_signing_key, public_key
from hanse.identity.certificates import Identity, Role
from hanse.identity.kit import Kit, read_kit
from hanse.identity.signatures import Signer
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.recipe import Recipe, WorkflowRecipe
from hanse.messages.codec import encode
from hanse.messages.flmodel import FLModel
from hanse.site import ledger
from hanse.site.hours import pause, resume

WORKFLOW = """
import asyncio, random
import numpy as np
from hanse import App, FLModel
from hanse.messages.task import Task

app = App()

@app.train
def train(model, site):
    tasks = site.state["tasks"] = site.state.get("tasks", 0) + 1
    print("what is printed at", site.name)
    w = model.params["w"] + site.rng.normal(size=model.params["w"].shape) * tasks + random.random() + site.config["shift"]
    return FLModel({"w": w.astype("f4")}, metrics={"tasks": tasks, "loss": float(w[0])}, meta={"examples": 10 + site.rank})

@app.evaluate
def evaluate(model, site):
    return FLModel(metrics={"loss": float(model.params["w"].sum()) + site.config["shift"]}, meta={"examples": 5})

async def two_at_once(cohort, model):
    async def one(site):
        return [update async for update in cohort.ask(Task("train", model), of=[site])][0].model.params["w"]

    client, other, vendor = await asyncio.gather(one("client"), one("other"), one("vendor"))
    return await cohort.commit(FLModel({"w": client + other + vendor}))

async def ping_pong(cohort, model, rounds, parties):
    async for round in cohort.rounds(model, rounds):
        for site in parties:
            async for update in cohort.ask(Task("train", model, {"round": round}), of=[site]):
                model = FLModel({"w": update.model.params["w"] * np.float32(0.5 + cohort.rng.random())})
        model = await cohort.commit(model, {"loss": update.model.metrics["loss"]})
    return model
"""
SHIFTS = {"vendor": {"shift": 1.5}, "client": {"shift": -0.25}, "other": {"shift": 4.0}}
POLICY = "sandbox: 'off'\n"


class Parties:
    """A vendor and its clients: their people's signers, their folders, and the stick between them."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority.new_root("study")
        self.roots = self.authority.roots
        self.people = {name: self.person(name, name.title()) for name in ("vendor", "client", "other")}
        self.folder = folder
        self.run = folder / "run"

    def person(self, name: str, organisation: str, *, authority: Authority | None = None) -> Signer:
        key = new_signing_key()
        identity = Identity("study", Role.RESEARCHER, f"{name}-person", organisation)
        return Signer(key, (authority or self.authority).issue(identity, public_key(key), days=1))

    def begin(self, recipe: Recipe, *away: str) -> Standing:
        here, elsewhere = {"vendor": SHIFTS["vendor"]}, {site: Away(site.title(), SHIFTS[site]) for site in away}
        signer = self.people["vendor"]
        return begin(recipe, here=here, away=elsewhere, folder=self.run, signer=signer, roots=self.roots, console="quiet")

    def at(self, site: str, bundle: Path, *, policy: str = POLICY, signer: Signer | None = None) -> Standing:
        """Import a bundle at a site."""
        folder = self.folder / site
        folder.mkdir(exist_ok=True)
        (folder / "policy.yaml").write_text(policy)
        return import_bundle(bundle, folder=folder, signer=signer or self.people[site], roots=self.roots)

    def back(self, bundle: Path) -> Standing:
        """Import a bundle where the run was begun."""
        return import_bundle(bundle, folder=self.run, signer=self.people["vendor"], roots=self.roots, console="quiet")

    def export(self, folder: Path, target: Path | None = None) -> Standing:
        signer = self.people["vendor" if folder == self.run else "client"]
        return export(folder, signer=signer, roots=self.roots, target=target, console="quiet")

    def to_the_end(self, standing: Standing) -> tuple[Standing, int]:
        """Carry bundles until the run is complete; how often somebody walked."""
        trips = 0
        while standing.status == "waiting":
            for bundle, site in standing.carry:
                ((answer, _),) = self.at(site, bundle).carry
                standing = self.back(answer)
            trips += 1
        return standing, trips


@pytest.fixture
def parties(tmp_path: Path) -> Parties:
    return Parties(tmp_path)


@pytest.fixture
def code(load: Callable[[str], Any]) -> Any:
    return load(WORKFLOW)


def in_turn(code: Any, *parties: str, rounds: int = 2, size: int = 3) -> Recipe:
    model = {"w": np.arange(size, dtype="f4")}
    return WorkflowRecipe(
        name="in-turn", model=model, app=code.app, run=code.ping_pong, arguments={"rounds": rounds, "parties": list(parties)}, seed=5
    )


def averaged(code: Any) -> Recipe:
    return FedAvgRecipe(name="averaged", model={"w": np.arange(3, dtype="f4")}, app=code.app, rounds=2, evaluate=True, seed=5)


def bits(model: FLModel) -> bytes:
    return b"".join(encode(FLModel(params=model.params), {"metrics": dict(model.metrics)}))


def simulated(recipe: Recipe, tmp_path: Path, *sites: str) -> bytes:
    env = SimEnv(sites=sites, site_config={site: SHIFTS[site] for site in sites}, workers=1, runs=tmp_path / "runs", console="quiet")
    return bits(recipe.execute(env).get_result())


def result(standing: Standing) -> bytes:
    assert standing.status == "completed"
    assert standing.run is not None
    return bits(standing.run.get_result())


def places(bundle: Path) -> tuple[int, int, int]:
    """A byte in the manifest, one in the signature, one in what is in the archive."""
    data = bundle.read_bytes()
    manifest, signature = (int.from_bytes(data[begin : begin + 8], "little") for begin in (15, 23))
    return 31 + manifest // 2, 31 + manifest + signature // 2, 31 + manifest + signature + 60


def altered(bundle: Path, offset: int) -> Path:
    data = bytearray(bundle.read_bytes())
    data[offset] ^= 1
    copy = bundle.with_name("altered.bundle")
    copy.write_bytes(data)
    return copy


def test_two_parties_in_turn_get_the_bits_of_the_simulation(parties: Parties, code: Any, tmp_path: Path) -> None:
    recipe = in_turn(code, "vendor", "client")
    standing, trips = parties.to_the_end(parties.begin(recipe, "client"))
    assert trips == 2
    assert result(standing) == simulated(recipe, tmp_path, "client", "vendor")
    assert [len(open_bundle(path, parties.roots).manifest.files) for path in sorted((parties.run / "outbox").iterdir())] == [3, 1]
    kinds = [line["kind"] for line in ledger.read(parties.folder / "client" / "state" / "audit.jsonl")]
    assert kinds.count("update") == kinds.count("bundle in") == kinds.count("bundle out") == 2


def test_a_round_of_all_sites_waits_for_two_of_them(parties: Parties, code: Any, tmp_path: Path) -> None:
    recipe = averaged(code)
    standing = parties.begin(recipe, "client", "other")
    assert [site for _, site in standing.carry] == ["client", "other"]
    ((answer, to),) = parties.at("other", standing.carry[1][0]).carry
    assert to == "Vendor"
    waits = parties.back(answer)
    assert waits.carry == standing.carry[:1]  # the very file: it was not written again
    standing, _ = parties.to_the_end(waits)
    assert result(standing) == simulated(recipe, tmp_path, "client", "other", "vendor")


def test_asks_at_the_same_time_wait_together(parties: Parties, code: Any, tmp_path: Path) -> None:
    recipe = WorkflowRecipe(name="at-once", model={"w": np.zeros(3, "f4")}, app=code.app, run=code.two_at_once, seed=5)
    standing, trips = parties.to_the_end(parties.begin(recipe, "client", "other"))
    assert trips == 1
    assert result(standing) == simulated(recipe, tmp_path, "client", "other", "vendor")


def test_a_large_model_goes_both_ways(parties: Parties, code: Any, tmp_path: Path) -> None:
    recipe = in_turn(code, "client", "vendor", rounds=1, size=200_000)
    standing, _ = parties.to_the_end(parties.begin(recipe, "client"))
    assert result(standing) == simulated(recipe, tmp_path, "client", "vendor")


@pytest.mark.usefixtures("sandboxed")
def test_in_the_sandbox_as_the_default_policy_wants_it(parties: Parties, code: Any, tmp_path: Path) -> None:
    recipe = in_turn(code, "vendor", "client", rounds=1)
    ((bundle, _),) = parties.begin(recipe, "client").carry
    folder = parties.folder / "client"
    standing = import_bundle(bundle, folder=folder, signer=parties.people["client"], roots=parties.roots, config={"shift": -0.25})
    assert (folder / "policy.yaml").is_file()
    assert next(ledger.read(folder / "state" / "audit.jsonl"))["sandbox"] is True
    assert result(parties.back(standing.carry[0][0])) == simulated(recipe, tmp_path, "client", "vendor")


@pytest.fixture
def sandboxed() -> None:
    from hanse.sandbox import Sandbox

    if problem := Sandbox().problem():
        pytest.skip(problem)


def test_what_is_altered_is_refused(parties: Parties, code: Any) -> None:
    standing = parties.begin(in_turn(code, "client", "vendor"), "client")
    bundle = standing.carry[0][0]
    manifest, signature, archive = places(bundle)
    for offset, error in ((3, WireError), (22, WireError), (manifest, IdentityError), (signature, IdentityError), (archive, WireError)):
        with pytest.raises(error):
            parties.at("client", altered(bundle, offset))
    cut = bundle.with_name("cut.bundle")
    for size, error in ((20, IdentityError), (manifest, IdentityError), (archive, WireError)):
        cut.write_bytes(bundle.read_bytes()[:size])
        with pytest.raises(error):
            parties.at("client", cut)
    (answer, _) = parties.at("client", bundle).carry[0]  # nothing of it has done harm
    with pytest.raises(WireError):
        parties.back(altered(answer, places(answer)[2]))
    assert parties.export(parties.run) == standing
    assert parties.back(answer).carry[0][0].name == "in-turn-to-client-002.bundle"


def test_what_others_sign_is_refused(parties: Parties, code: Any) -> None:
    ((for_client, _), (for_other, _)) = parties.begin(averaged(code), "client", "other").carry
    stranger = parties.person("client", "Client", authority=Authority.new_root("study"))
    with pytest.raises(Refused, match=r"is for 'client' of 'Client', and researcher 'other-person' of 'Other' signs here"):
        parties.at("client", for_client, signer=parties.people["other"])
    forged = parties.at("client", for_client, signer=stranger).carry[0][0]
    with pytest.raises(IdentityError, match="is not accepted"):
        parties.back(forged)
    theirs = parties.at("other", for_other).carry[0][0]
    bundle = open_bundle(theirs, parties.roots)
    bundle.unpack(parties.folder / "unpacked")
    files = {name: parties.folder / "unpacked" / name for name in bundle.manifest.files}
    swapped = parties.folder / "swapped.bundle"
    about = msgspec.structs.replace(bundle.manifest, site="client", organisation="Client")
    write_bundle(swapped, about, files, parties.people["other"])
    with pytest.raises(IdentityError, match="which 'Client' signs, and researcher 'other-person' of 'Other' has"):
        parties.back(swapped)
    write_bundle(swapped, about, files, parties.people["client"])
    with pytest.raises(IdentityError, match="signs it"):
        parties.back(swapped)
    write_bundle(swapped, msgspec.structs.replace(about, signer="client-person"), files, parties.people["client"])
    with pytest.raises(WireError, match="holds an update of 'other'"):
        parties.back(swapped)


def test_what_came_to_the_wrong_place_is_refused(parties: Parties, code: Any) -> None:
    ((for_client, _), (for_other, _)) = parties.begin(averaged(code), "client", "other").carry
    with pytest.raises(Refused, match="is to be carried there"):
        parties.back(for_client)
    answer = parties.at("client", for_client).carry[0][0]
    with pytest.raises(Refused, match="goes to where the run was begun"):
        parties.at("client", answer)
    both = parties.person("client", "Other")
    with pytest.raises(Refused, match="is the kit of 'client'"):
        import_bundle(for_other, folder=parties.folder / "client", signer=both, roots=parties.roots)
    parties.run = parties.folder / "another run"
    parties.begin(averaged(code), "client", "other")
    with pytest.raises(Refused, match="of another run"):
        parties.back(answer)


def test_an_old_bundle_changes_nothing(parties: Parties, code: Any, tmp_path: Path) -> None:
    recipe = in_turn(code, "client", "vendor", rounds=3)
    first = parties.begin(recipe, "client")
    one = parties.at("client", first.carry[0][0])
    assert parties.at("client", first.carry[0][0]).carry == one.carry
    second = parties.back(one.carry[0][0])
    again = parties.back(one.carry[0][0])
    assert again.carry == second.carry
    assert "nothing has changed" in again.notes[0]
    two = parties.at("client", second.carry[0][0])
    replayed = parties.at("client", first.carry[0][0])
    assert replayed.carry == two.carry
    assert "nothing has changed" in replayed.notes[0]
    standing, _ = parties.to_the_end(parties.back(two.carry[0][0]))
    assert parties.back(two.carry[0][0]).status == "completed"
    assert result(standing) == simulated(recipe, tmp_path, "client", "vendor")


IMPORT = """
import os, sys
from pathlib import Path
from hanse.finetuning import air_gap
from hanse.identity.signatures import Signer

folder, bundle, function, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
real = getattr(air_gap, function)

def dies(*arguments, **named):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), 9)
    return real(*arguments, **named)

setattr(air_gap, function, dies)
air_gap.import_bundle(bundle, folder=folder, signer=Signer.load(folder / "signer"), roots=Path(sys.argv[5]).read_bytes(), console="quiet")
"""


def killed(parties: Parties, place: str, bundle: Path, function: str, count: int) -> bool:
    """Import a bundle in another process, which is killed when it comes to `function` for the (count + 1)th time; whether it did."""
    folder = parties.run if place == "vendor" else parties.folder / place
    folder.mkdir(exist_ok=True)
    parties.people[place].save(folder / "signer")
    if place != "vendor":
        (folder / "policy.yaml").write_text(POLICY)
    roots = parties.folder / "roots.pem"
    roots.write_bytes(parties.roots)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", IMPORT, str(folder), str(bundle), function, str(count), str(roots)]
    return subprocess.run(arguments, check=False, env=environment, capture_output=True).returncode == -9


def test_an_import_that_is_killed_is_done_again(parties: Parties, code: Any, tmp_path: Path) -> None:
    recipe = averaged(code)
    standing = parties.begin(recipe, "client")
    bundle = standing.carry[0][0]
    for function, count in (("_offer", 0), ("write_bundle", 0), ("write_whole", 1)):
        assert killed(parties, "client", bundle, function, count)
    answer = parties.at("client", bundle).carry[0][0]
    trained = [line for line in ledger.read(parties.folder / "client" / "state" / "audit.jsonl") if line["kind"] == "trained"]
    assert len(trained) == 1  # what was done before the kill was not done again
    for function, count in (
        ("decode_update", 0),
        ("write_whole", 0),
        ("_go_on", 0),
        ("_work", 0),
        ("_write_tasks", 0),
        ("write_bundle", 0),
    ):
        assert killed(parties, "vendor", answer, function, count), function
    standing, _ = parties.to_the_end(parties.back(answer))
    assert result(standing) == simulated(recipe, tmp_path, "client", "vendor")


def test_the_sites_policy_decides(parties: Parties, code: Any) -> None:
    bundle = parties.begin(averaged(code), "client").carry[0][0]
    with pytest.raises(HanseError, match=r"submitters\.organisations"):
        parties.at("client", bundle, policy="submitters: {organisations: [Elsewhere]}\nsandbox: 'off'\n")
    kit = read_kit(parties.folder / "client")
    pause(kit, who="clara")
    with pytest.raises(Refused, match="The site is paused by clara"):
        parties.at("client", bundle)
    resume(kit)
    answer = parties.at("client", bundle, policy="tensors: {deny: [w]}\nsandbox: 'off'\n").carry[0][0]
    with pytest.raises(JobFailed, match=r"tensors\.deny"):
        parties.back(answer)
    standing = parties.export(parties.run)
    assert standing.carry[0][0].name == "averaged-to-client-002.bundle"  # the failed task is asked for anew
    answer = parties.at("client", standing.carry[0][0]).carry[0][0]
    assert parties.to_the_end(parties.back(answer))[0].status == "completed"


def test_as_an_environment(parties: Parties, code: Any, tmp_path: Path) -> None:
    recipe = in_turn(code, "vendor", "client", rounds=1)
    env = AirGapEnv(
        here={"vendor": SHIFTS["vendor"]},
        away={"client": Away("Client", SHIFTS["client"])},
        folder=parties.run,
        signer=parties.people["vendor"],
        roots=parties.roots,
        console="quiet",
    )
    for _ in range(2):
        with pytest.raises(WaitingForBundle, match=r"carry .*in-turn-to-client-001\.bundle to client, and import the answer") as caught:
            recipe.execute(env)
    parties.back(parties.at("client", caught.value.standing.carry[0][0]).carry[0][0])
    for _ in range(2):
        assert bits(recipe.execute(env).get_result()) == simulated(recipe, tmp_path, "client", "vendor")
    with pytest.raises(ConfigError, match="holds a run of the workflow job 'in-turn'"):
        averaged(code).execute(env)


def test_where_the_bundles_are_copied_to(parties: Parties, code: Any) -> None:
    begun = parties.begin(averaged(code), "client", "other")
    stick = parties.folder / "stick"
    with pytest.raises(ConfigError, match="2 bundles are to be carried"):
        parties.export(parties.run, stick)
    stick.mkdir()
    assert parties.export(parties.run, stick).carry == tuple((stick / path.name, site) for path, site in begun.carry)
    answer = parties.at("client", stick / begun.carry[0][0].name).carry[0][0]
    ((copy, _),) = parties.export(parties.folder / "client", stick / "answer").carry
    assert copy.read_bytes() == answer.read_bytes()
    with pytest.raises(ConfigError, match="no run has begun"):
        parties.export(parties.folder / "nowhere")


def test_the_commands(kits: dict[str, Kit], code: Any, tmp_path: Path) -> None:
    """`hanse finetune bundle`, with the kits that `hanse provision` makes."""

    def hanse(*arguments: str, kit: str, project: str) -> dict[str, Any]:
        said = CliRunner().invoke(
            app, ["bundle", *arguments, "--kit", str(kits[kit].folder), "--project", str(tmp_path / project), "--json"]
        )
        assert said.exit_code == 0, said.output
        found: dict[str, Any] = msgspec.json.decode(said.stdout.splitlines()[-1])
        return found

    vendor, client = tmp_path / "vendor", tmp_path / "client"
    recipe = in_turn(code, "acme", "north", rounds=1)
    begin(
        recipe,
        here={"acme": SHIFTS["vendor"]},
        away={"north": Away("North Clinic", SHIFTS["client"])},
        folder=place_of(vendor) / "runs" / "first",
        signer=kits["vera"].signer(),
        roots=kits["vera"].credentials().roots,
        console="quiet",
    )
    exported = hanse("export", str(tmp_path / "to.bundle"), kit="vera", project="vendor")
    assert exported["status"] == "waiting"
    assert exported["carry"] == [{"file": str(tmp_path / "to.bundle"), "to": "north"}]
    (place_of(client) / "site").mkdir(parents=True)
    (place_of(client) / "site" / "policy.yaml").write_text(POLICY)
    answered = hanse("import", str(tmp_path / "to.bundle"), kit="clara", project="client")
    assert read_kit(place_of(client) / "site").keep == [str(client / name) for name in WRITTEN]
    completed = hanse("import", answered["carry"][0]["file"], kit="victor", project="vendor")
    assert completed["status"] == "completed"
    assert completed["notes"] == [
        "in-turn-from-north-001.bundle, signed by researcher 'clara' of 'North Clinic', brings 1 of the updates of north."
    ]
