"""Runs of a project, from the vendor's folder: fine-tune with a client, and bring the candidate to them and their decision back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from hanse.errors import ConfigError, HanseError
from hanse.finetuning.air_gap import AirGapEnv, Away, place_of, runs_in
from hanse.finetuning.contract import read_project
from hanse.finetuning.evidence import Evidence, read_evidence
from hanse.finetuning.recipe import DeliveryRecipe, FinetuneRecipe
from hanse.finetuning.version_file import EVIDENCE
from hanse.finetuning.versions import Version, Versions
from hanse.identity.signatures import Signer
from hanse.jobs.recipe import Environment
from hanse.server.run import Run

SUMMARY = ("eer", "hter", "fpr", "fnr", "accuracy")


@dataclass(frozen=True)
class Tuned:
    """What came of a run: its folder, the candidate as a version of the project, and the gate's evidence."""

    run: Run
    version: Version
    evidence: Evidence


def fine_tune(folder: Path, env: Environment[Run], *, who: str, client: str | None = None) -> Tuned:
    """Train a candidate from the deployed version with one client, and have the vendor's gate decide. See docs/finetuning.md.

    folder: the vendor's project folder. env: has the sites of both; what they run on is theirs. who: starts the run, for the history.
    The candidate is a version of the project afterwards, whatever the gate says; a rejected one changes nothing else anywhere.
    Raises ConfigError if no version is deployed, JobFailed if the run did not come to its end; it may be tried again.
    """
    from hanse.finetuning.party import app

    project = read_project(folder)
    party, versions = project.client(client), Versions(folder, client)
    current = versions.current
    if current is None:
        raise ConfigError(f"{folder} has no deployed version to begin with", hint="`hanse finetune versions add` adds one.")
    history = versions.history
    history.move("data check", who=who, why=f"a run with {party.site}", version=current.digest)
    recipe = FinetuneRecipe(
        name=project.name, app=app, model=versions.params(current), project=msgspec.to_builtins(project), client=party.site,
        threshold=current.threshold, seed=project.seed,
    )  # fmt: skip
    try:
        run = recipe.execute(env)
    except HanseError as error:
        history.note("failed", who=who, why=error.message)
        raise
    return adopt(folder, run, who=who, client=client)


def without_connection(folder: Path, signer: Signer, roots: bytes, *, client: str | None = None, console: str = "auto") -> AirGapEnv:
    """The environment of a run by signed files: the one that was begun and is not yet a version of the project, or a new one."""
    project, place = read_project(folder), place_of(folder)
    party = project.client(client)
    known = {version.notes for version in Versions(folder, client).list()}
    begun = runs_in(place)
    open_ = [run for run in begun if run.name.startswith(f"{party.site}-") and _note(run) not in known]
    return AirGapEnv(
        here={project.vendor.site: {"finetuning": str(folder.resolve())}},
        away={party.site: Away(party.organisation)},
        folder=open_[-1] if open_ else place / "runs" / f"{party.site}-{len(begun) + 1:03d}",
        signer=signer,
        roots=roots,
        console=console,
    )


def _note(run: Path) -> str:
    """What a version's notes say of the run that it came of."""
    return f"run {run.name}"


def adopt(folder: Path, run: Run, *, who: str, client: str | None = None) -> Tuned:
    """The candidate of a completed run as a version of the project, and how it came about in the history.

    `fine_tune` does it; it is for a run that nobody waited for. Raises ConfigError if it is none of this project, or not complete.
    """
    versions, gates = Versions(folder, client), run.events("gate")
    about = json.loads(gates[0]["evidence"])["about"] if gates else {}
    parent = next((version for version in versions.list() if version.model == about.get("old")), None)
    if parent is None or about["contract"] != versions.project.digest or about["client"] != versions.project.client(client).site:
        raise ConfigError(f"{run.folder} is no completed run of this project and client with a version that is here")
    result = run.get_result()
    found = result.meta["finetuning"]
    metrics = {
        f"{party}_{name}": value
        for party, figures in found["candidate"].items()
        for name in SUMMARY
        if (value := figures.get(name)) is not None
    }
    version = versions.add(
        result.params, threshold=found["new_threshold"], parent=parent.digest, evidence=gates[0]["evidence"].encode(), metrics=metrics,
        notes=_note(run.folder),
    )  # fmt: skip
    history = versions.history
    if history.state != "data check":
        history.move("data check", who=who, run=run.folder.name)
    for state in ("base evaluation", "training"):
        history.move(state, who=who, run=run.folder.name)
    history.move("candidate", who=who, version=version.digest)
    history.move("vendor gate", who=who, version=version.digest, outcome=found["outcome"])
    if found["outcome"] != "accepted":
        history.move(found["outcome"], who=who, version=version.digest)
    return Tuned(run, version, read_evidence(versions.path(version) / EVIDENCE))


def deliver(folder: Path, env: Environment[Run], version: Version, roots: bytes, *, client: str | None = None) -> bool:
    """Bring a version that the vendor has approved to the client, and its decision back. True once there is one.

    The version lies in the client's `inbox/` then; nobody there has to take it. Call it again to fetch the decision.
    """
    from hanse.finetuning.party import app

    project, versions = read_project(folder), Versions(folder, client)
    parcel = folder / "outbox" / f"{version.digest.removeprefix('blake3:')}.version"
    parcel.parent.mkdir(exist_ok=True)
    versions.export(version, parcel)
    recipe = DeliveryRecipe(
        name=f"{project.name}-delivery", app=app, model={"version": np.frombuffer(parcel.read_bytes(), np.uint8)},
        project=msgspec.to_builtins(project), client=project.client(client).site, version=version.digest,
    )  # fmt: skip
    answer = recipe.execute(env).get_result()
    if not isinstance(answer.params, Mapping) or "decision" not in answer.params:
        return False
    versions.add_decision(version, answer.params["decision"].tobytes(), roots)
    return True
