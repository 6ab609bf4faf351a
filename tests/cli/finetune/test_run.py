from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hanse.finetuning.contract import Learning, read_project, write_project
from hanse.finetuning.init import invite
from hanse.finetuning.points import digest_of
from hanse.finetuning.versions import Versions
from hanse.identity.kit import Kit
from hanse.messages.codec import read

Hanse = Callable[..., subprocess.CompletedProcess[str]]
Pair = Any


@pytest.fixture
def project(pair: Pair, kits: dict[str, Kit]) -> Pair:
    """Vendor and client with a short contract; the client was invited."""
    learning = Learning(round_trips=1, client_steps=4, client_learning_rate=0.01, batch_size=16, controls=False)
    write_project(pair.vendor, msgspec.structs.replace(read_project(pair.vendor), learning=learning))
    own = {name: (pair.client / name).read_bytes() for name in ("train.npz", "test.npz", "data.yaml")}
    shutil.rmtree(pair.client)
    invite(pair.vendor, pair.client, kits["vera"].signer())
    for name, content in own.items():
        (pair.client / name).write_bytes(content)
    return pair


def test_simulate_report_and_bundle(hanse: Hanse, project: Pair, tmp_path: Path) -> None:
    done = hanse("finetune", "run", "--project", project.vendor, "--simulate", project.client, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    version = Versions(project.vendor).get(said["version"])
    run = project.vendor / "runs" / "line-3-001"
    assert said["report"] == str(run / "finetuning.html")
    assert (said["outcome"], said["words"][:9]) == ("accepted", "Accepted:")
    assert version.model == digest_of(read(run / "model.safetensors")[0].params)
    assert version.notes == "run line-3-001"

    (run / "finetuning.html").unlink()
    again = hanse("finetune", "report", run, "--bundle", tmp_path / "audit.zip")
    assert (again.returncode, again.stdout.splitlines()) == (0, [said["report"], str(tmp_path / "audit.zip")])
    assert (run / "finetuning.html").is_file()
    assert zipfile.is_zipfile(tmp_path / "audit.zip")

    shown = hanse("finetune", "run", "--project", project.vendor, "--simulate", project.client)
    assert shown.returncode == 0, shown.stderr
    assert "Accepted:" in shown.stdout
    assert "next     hanse finetune approve" in shown.stdout
    assert (project.vendor / "runs" / "line-3-002" / "finetuning.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say where to run: --kit"),
        (["--simulate", "{client}", "--kit", "{kit}"], "say where to run"),
        (["--simulate", "{client}", "--client", "south"], "'south' is none of north"),
        (["--simulate", "{nowhere}"], "is no project folder: it has no project.yaml"),
        (["--kit", "{nowhere}"], "is no kit; `hanse provision` makes one"),
        (["--simulate", "{client}", "--project", "{nowhere}"], "is no project folder"),
    ],
)
def test_run_says_what_is_wrong(
    hanse: Hanse,
    pair: Pair,
    kits: dict[str, Kit],
    tmp_path: Path,
    arguments: list[str],
    says: str,
) -> None:
    places = {"client": pair.client, "kit": kits["vera"].folder, "nowhere": tmp_path / "nowhere"}
    given = [each.format(**places) for each in arguments]
    failed = hanse("finetune", "run", *([] if "--project" in given else ["--project", pair.vendor]), *given)
    assert failed.returncode == 2, failed.stderr
    assert says in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in failed.stderr
    assert not (pair.vendor / "runs").exists()
    assert Versions(pair.vendor).history.state == "draft"


def test_a_run_that_fails_says_why_and_ends_with_1(hanse: Hanse, project: Pair) -> None:
    data = dict(np.load(project.client / "train.npz"))
    np.savez(project.client / "train.npz", **{**data, "labels": np.zeros_like(data["labels"])})
    failed = hanse("finetune", "run", "--project", project.vendor, "--simulate", project.client)
    assert failed.returncode == 1
    assert "the data check failed at 'north'" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert hanse("finetune", "status", "--project", project.vendor, "--json").stdout.count('"state": "data check"') == 1


def test_deliver_and_receive_say_what_is_wrong(hanse: Hanse, project: Pair, kits: dict[str, Kit]) -> None:
    def fails(status: int, says: str, *arguments: object) -> None:
        done = hanse("finetune", *arguments)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr

    vendor, client = ("--project", project.vendor), ("--project", project.client)
    vera, clara = (("--kit", kits[name].folder) for name in ("vera", "clara"))
    (base,) = Versions(project.vendor).list()
    added = Versions(project.vendor).add(Versions(project.vendor).params(base), threshold=0.25, parent=base.digest)
    fails(2, "no version begins with 'abcdefg'", "deliver", "abcdefg", *vera, *vendor)
    fails(2, "has no approval of the vendor", "deliver", added.digest, *vera, *vendor)
    fails(2, "is none of north", "deliver", added.digest, *vera, *vendor, "--client", "south")
    fails(2, "cannot be read", "receive", *client, "--kit", project.client)

    assert hanse("finetune", "receive", *client, *clara).stdout == ""  # nothing lies there
    inbox = project.client / "inbox"
    inbox.mkdir()
    (inbox / "a.version").write_bytes(b"no version at all")
    fails(1, "cannot be read", "receive", *client, *clara)
    assert (inbox / "a.version").exists()
    (inbox / "a.version").unlink()
    Versions(project.vendor).sign(added, "approve", kits["vera"].signer(), why="another threshold")
    Versions(project.vendor).export(added, inbox / "b.version")
    whole = (inbox / "b.version").read_bytes()
    (inbox / "b.version").write_bytes(whole.replace(b"another threshold", b"another Threshold"))
    fails(1, "signature", "receive", *client, *clara)
    assert [each.digest for each in Versions(project.client).list()] == [base.digest]
    (inbox / "b.version").write_bytes(whole)
    done = hanse("finetune", "receive", *client, *clara)
    assert done.returncode == 0, done.stderr
    assert f"{added.digest}  is here" in done.stdout
    assert [*inbox.iterdir()] == []
    assert Versions(project.client).history.state == "client acceptance"


def test_report_of_what_is_no_run(hanse: Hanse, tmp_path: Path) -> None:
    failed = hanse("finetune", "report", tmp_path)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
