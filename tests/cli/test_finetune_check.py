from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from hanse.cli.finetune.data import app
from hanse.finetuning.contract import Party, Project, Schema, write_project


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "client"
    vendor, client = Party(site="acme", organisation="Acme"), Party(site="clinic", organisation="Clinic")
    write_project(folder, Project(name="demo", vendor=vendor, clients=[client], schema=Schema(shape=[8, 8, 1])))
    (folder / "data.yaml").write_text("train: {kind: images, folder: train}\ntest: {kind: images, folder: test}\n")
    rng = np.random.default_rng(0)
    for row in range(240):
        path = folder / ("train", "test")[row % 2] / ("normal", "anomaly")[row // 2 % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_data_that_can_be_used(project: Path) -> None:
    result = run("--project", project)
    assert result.exit_code == 0, result.output
    assert re.match("Nothing is wrong with this data.\n  train: 120 rows, 60 negatives, 60 positives, 0 without a label\n", result.output)
    assert f"report: {project / 'reports' / 'data-check.html'}" in result.output
    assert (project / "reports" / "data-check.html").is_file()


def test_data_that_cannot_be_used_ends_with_status_1(project: Path) -> None:
    for path in (project / "train" / "normal").iterdir():
        (project / "test" / "normal" / f"copy-{path.name}").write_bytes(path.read_bytes())
    (project / "train" / "normal" / "broken.png").write_text("no image")
    result = run("--project", project, "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found["outcome"] == "failed"
    assert [(each["level"], each["code"], each["count"]) for each in found["findings"]] == [
        ("error", "overlap", 60),
        ("warning", "unreadable", 1),
    ]
    assert "train/normal/broken.png" in run("--project", project).output


def test_a_profile_of_another_party(project: Path) -> None:
    assert run("--project", project).exit_code == 0
    result = run("--project", project, "--reference", project / "reports" / "data-profile.json", "--json")
    assert json.loads(result.output)["drift"]["train and reference"].keys() == {"brightness", "contrast", "sharpness"}
