"""The command in processes of its own, and a federation to use it with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hanse.messages.codec import write
from hanse.messages.flmodel import FLModel

Hanse = Callable[..., subprocess.CompletedProcess[str]]

CODE = """
import os
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    print(f"round {model.current_round} at {site.name}")
    if os.path.exists(site.config.get("broken", "nowhere")) and model.current_round == 1:
        raise ValueError("no data today")
    if "until" in site.config and model.current_round == 1:
        open(site.config["until"]).read()
    return FLModel({"w": model.params["w"] + 1}, metrics={"loss": 1.0})
"""


@pytest.fixture(scope="session")
def hanse() -> Hanse:
    """Runs the command, with `cwd` and what else `subprocess.run` takes."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"COLUMNS": "140", "NO_COLOR": "1", "TERM": "dumb"} | dict(options.pop("env", {}))  # type: ignore[call-overload]
        command = [sys.executable, "-m", "hanse.cli.main", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]

    return run


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """Makes a job folder of three rounds, `config` in it."""

    def make(name: str, **config: object) -> Path:
        folder = tmp_path / name
        (folder / "code").mkdir(parents=True)
        (folder / "code" / "job.py").write_text(CODE)
        write(folder / "model.safetensors", FLModel({"w": np.zeros(3, np.float32)}))
        says = {
            "name": name, "recipe": "fedavg", "arguments": {"rounds": 3}, "app": {"file": "job.py", "name": "app"},
            "model": "model.safetensors", "config": {key: str(value) for key, value in config.items()},
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(says))
        return folder

    return make


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, hanse: Hanse) -> Iterator[Path]:
    """The folder of a federation of north and south, which runs in the background."""
    folder = tmp_path_factory.mktemp("federation") / "poc"
    started = hanse("poc", "start", "--sites", "north, south", "--folder", folder)
    assert started.returncode == 0, started.stderr
    yield folder
    stopped = hanse("poc", "stop", "--folder", folder)
    assert stopped.stdout == "stopped\n"
