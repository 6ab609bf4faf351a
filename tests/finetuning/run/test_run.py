from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hanse.environments import SimEnv
from hanse.errors import ConfigError, IdentityError, JobFailed, Refused
from hanse.finetuning.contract import Gate, Learning, Project, read_project, write_project
from hanse.finetuning.decisions import decide
from hanse.finetuning.evidence import read_evidence
from hanse.finetuning.init import invite
from hanse.finetuning.points import digest_of
from hanse.finetuning.run import Tuned, deliver, fine_tune
from hanse.finetuning.version_file import EVIDENCE
from hanse.finetuning.versions import Versions
from hanse.identity.kit import Kit
from hanse.messages.codec import read
from hanse.site.ledger import read as read_ledger

Pair = Any  # of conftest.py
CAREFUL = Learning(round_trips=2, client_steps=8, client_learning_rate=0.01, batch_size=16, controls=False)
FORGETFUL = Learning(mode="one-shot", adapter="full", client_alone_steps=150, client_learning_rate=0.2, batch_size=16, controls=False)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def states(folder: Path) -> list[str]:
    return [line["kind"] for line in read_ledger(folder / "history.jsonl")]


def agree(pair: Pair, **terms: Any) -> Project:
    """Have both change these terms of the contract."""
    project = msgspec.structs.replace(read_project(pair.vendor), **terms)
    for folder in (pair.vendor, pair.client):
        write_project(folder, project)
    return project


@pytest.fixture
def invited(pair: Pair, kits: dict[str, Kit]) -> Pair:
    """The pair, after the vendor has handed the client a folder with the version that runs there."""
    agree(pair, learning=CAREFUL)
    own = {name: (pair.client / name).read_bytes() for name in ("train.npz", "test.npz", "data.yaml")}
    shutil.rmtree(pair.client)
    invite(pair.vendor, pair.client, kits["vera"].signer())
    for name, content in own.items():
        (pair.client / name).write_bytes(content)
    return pair


def tune(pair: Pair) -> Tuned:
    return fine_tune(pair.vendor, pair.env(), who="vera")


@pytest.fixture
def delivered(invited: Pair, roots: bytes) -> Callable[[Any], bool]:
    env = SimEnv(sites=["north"], site_config={"north": {"finetuning": str(invited.client)}}, runs=invited.runs, console="quiet")
    return lambda version: deliver(invited.vendor, env, version, roots)


def test_a_run_makes_a_version_that_says_how_it_came_about(invited: Pair) -> None:
    versions = Versions(invited.vendor)
    (base,) = versions.list()
    tuned = tune(invited)
    assert {each.digest for each in versions.list()} == {base.digest, tuned.version.digest}
    assert (tuned.version.parent, tuned.version.project) == (base.digest, versions.project.digest)
    assert tuned.version.model == digest_of(tuned.run.get_result().params) == tuned.evidence.about["new"]
    assert tuned.version.threshold == tuned.evidence.new.threshold
    assert tuned.run.folder.name in tuned.version.notes
    (figures,) = [e for e in tuned.run.events("figures") if (e["what"], e["party"]) == ("candidate", "north")]
    assert tuned.version.metrics["client_eer"] == figures["eer"]
    assert read_evidence(versions.path(tuned.version) / EVIDENCE) == tuned.evidence
    (kept,) = (invited.vendor / "evidence").glob("*.json")
    assert kept.read_bytes() == (versions.path(tuned.version) / EVIDENCE).read_bytes()
    assert tuned.evidence.outcome == "accepted"
    assert states(invited.vendor)[-5:] == ["data check", "base evaluation", "training", "candidate", "vendor gate"]
    assert versions.history.verify() > 0
    assert versions.current == base


def test_a_rejected_candidate_changes_nothing_but_the_record(invited: Pair, kits: dict[str, Kit], roots: bytes) -> None:
    agree(invited, learning=FORGETFUL)
    theirs, current = everything(invited.client), (invited.vendor / "current").read_bytes()
    versions = Versions(invited.vendor)
    base = versions.current
    tuned = tune(invited)
    assert tuned.evidence.outcome == "rejected"
    assert versions.history.state == "rejected"
    assert versions.current == base
    assert (invited.vendor / "current").read_bytes() == current
    after = everything(invited.client)
    assert {name: after[name] for name in theirs} == theirs
    assert {name.partition("/")[0] for name in after.keys() - theirs.keys()} == {"exchange", "scores", "reports"}
    for attempt in (
        lambda: versions.sign(tuned.version, "approve", kits["vera"].signer(), why="I like it"),
        lambda: versions.export(tuned.version, invited.vendor / "x.version"),
    ):
        with pytest.raises(ConfigError):
            attempt()
    with pytest.raises(Refused, match="the gate has rejected it"):
        versions.deploy(tuned.version, roots, who="vera")
    agree(invited, learning=CAREFUL)
    again = tune(invited)
    assert (again.evidence.attempt, again.version.parent) == (2, base.digest if base else None)
    assert versions.history.verify() > 0


def test_an_inconclusive_one_waits_for_a_person(invited: Pair, kits: dict[str, Kit]) -> None:
    agree(invited, gate=Gate(resamples=200, min_per_class=401))
    tuned = tune(invited)
    versions = Versions(invited.vendor)
    assert (tuned.evidence.outcome, versions.history.state) == ("inconclusive", "inconclusive")
    with pytest.raises(ConfigError, match="must say why"):
        versions.sign(tuned.version, "approve", kits["vera"].signer())
    versions.sign(tuned.version, "approve", kits["vera"].signer(), why="the holdout is small, and it is better on every slice")
    assert versions.history.state == "client acceptance"


def test_a_failed_run_leaves_no_version_and_may_be_tried_again(invited: Pair) -> None:
    good = (invited.client / "train.npz").read_bytes()
    data = dict(np.load(invited.client / "train.npz"))
    np.savez(invited.client / "train.npz", **{**data, "labels": np.zeros_like(data["labels"])})
    versions = Versions(invited.vendor)
    base, before = versions.current, everything(invited.vendor / "versions")
    with pytest.raises(JobFailed, match="data check failed at 'north'"):
        tune(invited)
    assert states(invited.vendor)[-2:] == ["data check", "failed"]
    assert "data check failed" in versions.history.lines[-1]["why"]
    assert (versions.current, everything(invited.vendor / "versions")) == (base, before)
    (invited.client / "train.npz").write_bytes(good)
    assert tune(invited).version.parent == (base.digest if base else None)
    assert versions.history.verify() > 0


def test_without_a_deployed_version_there_is_nothing_to_begin_with(invited: Pair) -> None:
    (invited.vendor / "history.jsonl").unlink()
    (invited.vendor / "current").unlink()
    with pytest.raises(ConfigError, match="no deployed version"):
        tune(invited)
    with pytest.raises(ConfigError, match="'south' is none of north"):
        fine_tune(invited.vendor, invited.env(), who="vera", client="south")


def test_from_the_candidate_to_its_deployment_at_both_and_back(
    invited: Pair, kits: dict[str, Kit], roots: bytes, delivered: Callable[[Any], bool]
) -> None:
    vendor, client = Versions(invited.vendor), Versions(invited.client)
    base, version = vendor.current, tune(invited).version
    assert base is not None
    with pytest.raises(ConfigError, match="no approval of the vendor"):
        delivered(version)
    assert not (invited.client / "inbox").exists()
    vendor.sign(version, "approve", kits["vera"].signer())
    with pytest.raises(Refused, match="has not accepted"):
        vendor.deploy(version, roots, who="vera")

    assert delivered(version) is False
    (parcel,) = (invited.client / "inbox").iterdir()
    assert everything(invited.client / "versions").keys() == {f"{client.path(base).name}/{p.name}" for p in client.path(base).iterdir()}
    assert delivered(version) is False  # nobody there has looked yet
    assert [*(invited.client / "inbox").iterdir()] == [parcel]

    assert client.import_(parcel, roots) == version
    parcel.unlink()
    assert (client.history.state, client.current) == ("client acceptance", base)
    client.sign(version, "accept", kits["clara"].signer(), why="good on our two devices")
    assert delivered(version) is True
    assert not [*(invited.client / "inbox").iterdir()]
    assert vendor.history.state == client.history.state == "approved"
    assert {site: each.decision for site, each in vendor.decisions(version).items()} == {"acme": "approve", "north": "accept"}
    assert vendor.decisions(version)["north"].why == "good on our two devices"
    assert delivered(version) is True  # once more is no harm
    for versions, who in ((vendor, "vera"), (client, "clara")):
        versions.deploy(version, roots, who=who)
        assert versions.current == version
        assert versions.verify(version, roots)
    assert digest_of(read(client.path(version) / "model.safetensors")[0].params) == version.model
    for versions, who in ((vendor, "vera"), (client, "clara")):
        assert versions.rollback(who=who, why="a new lamp") == base
        assert (versions.current, versions.history.state) == (base, "rolled back")
        assert versions.history.verify() > 0


def test_a_refusal_comes_back_too(invited: Pair, kits: dict[str, Kit], roots: bytes, delivered: Callable[[Any], bool]) -> None:
    vendor, client = Versions(invited.vendor), Versions(invited.client)
    version = tune(invited).version
    vendor.sign(version, "approve", kits["vera"].signer())
    delivered(version)
    client.import_(next((invited.client / "inbox").iterdir()), roots)
    client.sign(version, "refuse", kits["clara"].signer(), why="worse on our second device")
    assert delivered(version) is True
    assert vendor.history.state == client.history.state == "rejected"
    for versions in (vendor, client):
        with pytest.raises(Refused, match="has refused it: worse on our second device"):
            versions.deploy(version, roots, who="vera")


@pytest.mark.parametrize("wrong", ["of another organisation", "on another version", "no signature"])
def test_what_is_no_decision_of_the_client_is_refused(
    invited: Pair, kits: dict[str, Kit], delivered: Callable[[Any], bool], wrong: str
) -> None:
    vendor = Versions(invited.vendor)
    base, version = vendor.current, tune(invited).version
    assert base is not None
    vendor.sign(version, "approve", kits["vera"].signer())
    before, lines = everything(vendor.path(version)), states(invited.vendor)
    elsewhere = msgspec.structs.replace(
        vendor.project, clients=[msgspec.structs.replace(vendor.project.clients[0], organisation="Elsewhere")]
    )
    forged = {
        "of another organisation": lambda: decide(elsewhere, version.digest, "accept", kits["mallory"].signer()),
        "on another version": lambda: decide(vendor.project, base.digest, "accept", kits["clara"].signer()),
        "no signature": lambda: b"{}",
    }[wrong]()
    theirs = invited.client / "versions" / vendor.path(version).name
    theirs.mkdir()
    (theirs / "north.signature").write_bytes(forged)
    with pytest.raises(IdentityError):
        delivered(version)
    assert (everything(vendor.path(version)), states(invited.vendor)) == (before, lines)
