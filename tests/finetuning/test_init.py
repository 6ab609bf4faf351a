from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from hanse.errors import ConfigError, IdentityError
from hanse.finetuning.contract import Party, Project, Schema, read_project
from hanse.finetuning.data import read_data
from hanse.finetuning.init import add_weights, init, invite, project_of
from hanse.finetuning.models import load_module, params_of, score
from hanse.finetuning.versions import Versions
from hanse.identity.kit import Kit
from hanse.messages.codec import write
from hanse.messages.flmodel import FLModel

ANSWERS = {
    "name": "line-3", "vendor": "acme=Acme Vision", "clients": "north=North Clinic, south = South Clinic", "kind": "image",
    "shape": "8x8x1",
    "columns": "", "classes": "good, scratched", "mean": "0.5", "std": "0.25", "slices": "device", "group": "", "mode": "one-shot",
    "vendor_weight": "",
}  # fmt: skip


def weights_of(folder: Path, project: Project, target: Path) -> Path:
    write(target, FLModel(params_of(load_module(folder, project.model))))
    return target


def test_the_answers_make_a_project() -> None:
    project = project_of(ANSWERS)
    assert (project.name, project.vendor) == ("line-3", Party(site="acme", organisation="Acme Vision"))
    assert project.clients == [Party(site="north", organisation="North Clinic"), Party(site="south", organisation="South Clinic")]
    assert project.schema == Schema(shape=[8, 8, 1], classes=["good", "scratched"], mean=[0.5], std=[0.25], slices=["device"])
    assert (project.learning.mode, project.learning.weight) == ("one-shot", 0.8)
    table = project_of(ANSWERS | {"kind": "table", "columns": "a,b", "group": "patient", "vendor_weight": "0.6"})
    assert (table.schema.kind, table.schema.columns, table.schema.group, table.learning.weight) == ("table", ["a", "b"], "patient", 0.6)


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("shape", "8 by 8", "8 by 8"),
        ("kind", "sound", "sound"),
        ("mean", "none", "could not convert"),
        ("vendor", "Acme Vision", "no name for a site"),
        ("clients", "", "length >= 1"),
        ("clients", "acme=x", "the same site"),
        ("classes", "one", "length >= 2"),
        ("mode", "fast", "fast"),
        ("vendor_weight", "2", "<= 1"),
        ("std", "0", "> 0"),
    ],
)
def test_wrong_answers(name: str, answer: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        project_of(ANSWERS | {name: answer})


@pytest.mark.parametrize("shape", [[8, 8, 1], [28, 28, 3], [1, 5, 1], [33, 17]])
def test_the_network_to_begin_with_works(tmp_path: Path, project: Project, shape: list[int]) -> None:
    project = msgspec.structs.replace(project, schema=Schema(shape=shape))
    assert init(tmp_path / "p", project, who="vera") is None
    height, width, channels = (*shape, 1)[:3]
    inputs = np.random.default_rng(0).normal(size=(3, channels, height, width)).astype(np.float32)
    scores = score(load_module(tmp_path / "p", project.model), inputs)
    assert scores.shape == (3,)
    assert len({*scores}) == 3


def test_so_does_the_one_for_tables(tmp_path: Path, project: Project) -> None:
    project = msgspec.structs.replace(project, schema=Schema(kind="table", columns=["a", "b", "c"], group="patient"))
    init(tmp_path, project, who="vera")
    assert score(load_module(tmp_path, project.model), np.zeros((2, 3), np.float32)).shape == (2,)
    data = read_data(tmp_path)
    assert data.measured == "holdout"
    assert msgspec.to_builtins(data.train) == {"kind": "table", "file": "data/train.csv", "label": "label"}
    assert ", patient" in (tmp_path / "data.yaml").read_text()


def test_init_with_weights(tmp_path: Path, project: Project) -> None:
    init(tmp_path / "first", project, who="vera")
    weights = weights_of(tmp_path / "first", project, tmp_path / "w.safetensors")
    version = init(tmp_path / "p", project, who="vera", code=tmp_path / "first" / "model.py", weights=weights, threshold=0.3)
    versions = Versions(tmp_path / "p")
    assert versions.current == version == versions.get("current")
    assert version is not None
    assert version.threshold == 0.3
    assert read_project(tmp_path / "p") == project
    assert read_data(tmp_path / "p").train is not None
    assert [line["kind"] for line in versions.history.lines] == ["draft", "first version"]
    with pytest.raises(ConfigError, match="holds a project already"):
        init(tmp_path / "p", project, who="vera")

    child = add_weights(tmp_path / "p", who="vera", parent=version, threshold=0.7, notes="from the holdout")
    assert (child.model, child.parent, child.threshold) == (version.model, version.digest, 0.7)
    assert versions.current == version
    with pytest.raises(ConfigError, match="needs weights, or a parent"):
        add_weights(tmp_path / "p", who="vera")


def test_weights_that_do_not_fit_leave_no_project(tmp_path: Path, project: Project) -> None:
    write(tmp_path / "w.safetensors", FLModel({"w": np.zeros(3, np.float32)}))
    with pytest.raises(ConfigError, match="other model code"):
        init(tmp_path / "p", project, who="vera", weights=tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_text("not tensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        init(tmp_path / "p", project, who="vera", weights=tmp_path / "w.safetensors")
    assert not (tmp_path / "p" / "project.yaml").exists()


def test_what_a_client_gets(tmp_path: Path, project: Project, kits: dict[str, Kit], roots: bytes) -> None:
    vendor = tmp_path / "p"
    init(vendor, project, who="vera")
    with pytest.raises(ConfigError, match="has no version to hand over"):
        invite(vendor, tmp_path / "north", kits["vera"].signer())
    version = add_weights(vendor, weights_of(vendor, project, tmp_path / "w.safetensors"), who="vera")
    for secret in (
        "data/train/a.png",
        "data/holdout/labels.csv",
        "scores/s.npz",
        "evidence/e.json",
        "reports/r.html",
        "exchange/left.jsonl",
    ):
        (vendor / secret).parent.mkdir(parents=True, exist_ok=True)
        (vendor / secret).write_text("SECRET-7")
    (vendor / "data.yaml").write_text("train: {kind: images, folder: /SECRET-7}\n")
    with pytest.raises(IdentityError):
        invite(vendor, tmp_path / "north", kits["clara"].signer())
    assert not (tmp_path / "north").exists()

    client = invite(vendor, tmp_path / "north", kits["vera"].signer())
    digits = version.digest.removeprefix("blake3:")
    files = {path.relative_to(client).as_posix(): path.read_bytes() for path in client.rglob("*") if path.is_file()}
    own = ("version.json", "model.safetensors", "model.py", "acme.signature")
    assert files.keys() == {
        "project.yaml", "model.py", "data.yaml", "current", "history.jsonl", "history.head", *(f"versions/{digits}/{name}" for name in own),
    }  # fmt: skip
    assert not [name for name, data in files.items() if b"SECRET-7" in data]
    assert (read_project(client), read_data(client).measured) == (project, "test")
    theirs = Versions(client)
    assert theirs.current == version
    assert [signed.signer.name for signed in theirs.verify(version, roots)] == ["vera"]
    assert theirs.missing(version, roots) == ["the client north has not accepted it"]
    assert (theirs.history.state, Versions(vendor).history.lines[-1]["kind"]) == ("draft", "invite")
    with pytest.raises(ConfigError, match="is not empty"):
        invite(vendor, client, kits["vera"].signer())
