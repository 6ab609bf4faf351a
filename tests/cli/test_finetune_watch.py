"""`hanse finetune watch` and `watch-reference` on a real project: a version is deployed, images come, and other devices send them later."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from hanse.cli.finetune.watch import app
from hanse.errors import HanseError
from hanse.finetuning.contract import Party, Project, Schema, write_project
from hanse.finetuning.models import load_module, params_of
from hanse.finetuning.versions import Versions

CODE = """
import torch
def build():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
"""
SIDE = 4


def images(n: int, *, seed: int, brighter: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positives have a bright left half, and brighter devices make all of an image so. uint8 (n, 4, 4, 1), and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    pixels = rng.normal(100 + brighter, 40, size=(n, SIDE, SIDE, 1))
    pixels[:, :, : SIDE // 2] += 45 * labels[:, None, None, None]
    return pixels.clip(0, 255).astype(np.uint8), labels.astype(np.int64)


def save(folder: Path, pixels: np.ndarray, prefix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image[:, :, 0]).save(folder / f"{prefix}{i:04}.png")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a holdout and one deployed version, whose layers compare the halves of an image."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "model.py").write_text(CODE)
    parties: dict[str, Any] = {"vendor": Party(site="maker", organisation="Maker"), "clients": [Party(site="user", organisation="User")]}
    about = Project(name="halves", schema=Schema(shape=[SIDE, SIDE, 1]), seed=3, **parties)
    write_project(folder, about)
    inputs, labels = images(1200, seed=0)
    np.savez(folder / "holdout.npz", inputs=inputs, labels=labels)
    (folder / "data.yaml").write_text("holdout: {kind: arrays, file: holdout.npz}\n")
    params = params_of(load_module(folder, about.model))
    first = np.zeros((8, SIDE, SIDE), np.float32)
    first[:, :, : SIDE // 2] = 1 / 8
    first[4:] += np.random.default_rng(1).normal(0, 0.02, (4, SIDE, SIDE))
    second = np.array([[12, 12, 12, 12, 0, 0, 0, 0]], np.float32)
    values = (first.reshape(8, 16), np.zeros(8), second, [-48 * 0.48])
    version = Versions(folder).add({name: np.asarray(value, np.float32) for name, value in zip(params, values, strict=True)}, threshold=0.5)
    Versions(folder).history.note("deployment", who="test", deployed=version.digest)
    (folder / "current").write_text(version.digest)
    run("watch-reference", "--project", folder, "--out", folder / "watch" / "reference.safetensors")
    return folder


@pytest.fixture
def client(project: Path, tmp_path: Path) -> Path:
    """A copy of the project folder, so that each test has a watch of its own."""
    return Path(shutil.copytree(project, tmp_path / "client"))


def run(*arguments: object, **invoke: Any) -> Result:
    result = CliRunner().invoke(app, [str(each) for each in arguments], **invoke)
    if result.exception is not None and not isinstance(result.exception, SystemExit | HanseError):
        raise result.exception
    return result


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_folder_of_images_is_watched_as_it_fills(client: Path, tmp_path: Path) -> None:
    source = tmp_path / "images"
    watch = ("watch", source, "--project", client, "--once", "--json", "--window", 50)
    save(source, images(220, seed=1)[0], "a")
    *windows, last = lines(run(*watch))
    assert last == {"counts": {"inputs": 200, "waiting": 20, "windows": 4, "labels": 0}}
    assert [each["figures"]["differs"] for each in windows] == [False] * 4
    assert windows[0]["figures"]["mmd2"] is not None
    save(source, images(180, seed=2, brighter=40)[0], "b")
    (source / "half.png").write_bytes(b"\x89PNG still being written")
    found = lines(run(*watch))
    (alarm,) = [each["alarm"] for each in found if "alarm" in each]
    assert alarm["reason"] == "devices"
    assert found[-1]["counts"]["inputs"] == 400
    assert lines(run(*watch)) == [found[-1]]
    text = run(*watch[:-3], "--window", 50)
    assert text.stdout == "so far 400 inputs, 0 waiting, 8 windows, 0 labels\n"


def test_the_reference_of_another_version_is_not_used(client: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    scores, labels = np.linspace(0, 1, 400), (np.arange(400) > 200).astype(int)
    with rows.open("w", newline="") as file:
        csv.writer(file).writerows([("name", "score", "label"), *zip(range(400), scores, labels, strict=True)])
    made = run("watch-reference", rows, "--threshold", 0.5, "--out", tmp_path / "other.safetensors")
    assert made.stdout.startswith(f"{tmp_path / 'other.safetensors'}: scores of 400 rows, 49.8% of them positive, in ")
    save(tmp_path / "images", images(4, seed=1)[0], "a")
    refused = run("watch", tmp_path / "images", "--project", client, "--reference", tmp_path / "other.safetensors", "--once")
    assert "is deployed, and the reference is of no version" in str(refused.exception)
    assert run("watch-reference", rows, "--project", client, "--out", tmp_path / "same.safetensors").exit_code == 0


def test_standard_input_and_a_file(client: Path, tmp_path: Path) -> None:
    text = "name,score\n" + "".join(f"{i},{0.9}\n" for i in range(120))
    watch = ("--project", client, "--window", 50, "--json")
    found = lines(run("watch", "-", *watch, input=text))
    assert [each["alarm"]["project"] for each in found if "alarm" in each] == ["halves"]
    (tmp_path / "scores.csv").write_text(text)
    assert lines(run("watch", tmp_path / "scores.csv", "--once", *watch)) == [found[-1]]
    assert "neither a folder nor a file" in str(run("watch", tmp_path / "none", "--once", *watch).exception)


def test_a_webhook_is_signed(client: Path) -> None:
    asked = run("watch", "-", "--project", client, "--webhook", "https://example.org/", input="name,score\n", env={"HANSE_KIT": None})
    assert asked.exit_code == 2
    assert "--secret" in asked.output


def test_it_waits_for_what_comes_and_can_be_stopped(client: Path, tmp_path: Path) -> None:
    """As a process of its own: rows that are added to a file later are counted, too."""
    rows = tmp_path / "scores.jsonl"
    torn = json.dumps({"name": "torn", "score": 0.9})
    rows.write_text("".join(json.dumps({"name": f"a{i}", "score": 0.9}) + "\n" for i in range(50)) + torn[:9])
    code = "from hanse.cli.finetune.watch import app; app()"
    command = [sys.executable, "-c", code, "watch", rows, "--project", client, "--window", "50", "--json", "--interval", "0.1"]
    with subprocess.Popen([str(each) for each in command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["figures"]["window"] == 1
        with rows.open("a") as file:
            file.write(torn[9:] + "\n" + "".join(json.dumps({"name": f"b{i}", "score": 0.9}) + "\n" for i in range(49)))
        assert json.loads(process.stdout.readline())["figures"]["window"] == 2
        assert json.loads(process.stdout.readline())["alarm"]["reason"]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
