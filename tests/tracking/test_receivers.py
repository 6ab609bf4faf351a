"""A real run's folder, written to each receiver and read again with what reads it for people."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.environments import SimEnv
from hanse.errors import ConfigError
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.server.run import Run
from hanse.tracking.values import Value, values

APP = """
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    round = model.current_round
    for step in range(2):
        site.log("batch/loss", 1.0 / (1 + 2 * round + step), step=2 * round + step)
    site.log("note", f"round {round} at {site.name}")
    return FLModel(model.params, metrics={"loss": 10.0 * round + site.rank})
"""


@pytest.fixture
def run(tmp_path: Path, load: Callable[[str], Any]) -> Run:
    """Two sites, two rounds: site-1 has loss 0 and 10, site-2 has 1 and 11."""
    recipe = FedAvgRecipe(name="tracked", app=load(APP).app, model={"w": np.zeros(2, np.float32)}, rounds=2, seed=7)
    return recipe.execute(SimEnv(num_clients=2, workers=1, runs=tmp_path / "runs", console="quiet"))


def track(run: Run, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, as it is typed."""
    command = [sys.executable, "-m", "hanse.cli.main", "track", str(run.folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_values(run: Run) -> None:
    found = list(values(run))
    assert Value("", "loss", 0.5, 0) in found
    assert Value("", "loss", 10.5, 1) in found
    assert Value("site-2", "train/loss", 11.0, 1) in found
    assert Value("site-1", "batch/loss", 0.25, 3) in found
    assert Value("site-1", "note", "round 1 at site-1", 1, "text") in found
    assert [value for value in values(run, sites=False) if value.site] == []


def test_tensorboard(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from hanse.tracking.tensorboard import write

    folder = Path(write(run, str(tmp_path / "board")))
    assert scalars(folder / "global") == {("loss", 0): 0.5, ("loss", 1): 10.5}
    assert scalars(folder / "sites" / "site-2") == {
        ("train/loss", 0): 1.0, ("train/loss", 1): 11.0,
        ("batch/loss", 0): 1.0, ("batch/loss", 1): 0.5, ("batch/loss", 2): pytest.approx(1 / 3), ("batch/loss", 3): 0.25,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="is not empty"):
        write(run, str(folder))
    write(run, str(tmp_path / "small"), sites=False)
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["global"]


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What an event file holds: TensorFlow's records, each of one protobuf message with its length and two checksums."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    (path,) = folder.iterdir()
    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        body, check = data[12 : 12 + size], int.from_bytes(data[12 + size : 16 + size], "little")
        plain = crc32c(body)
        assert check == (((plain >> 15) | (plain << 17)) + 0xA282EAD8) & 0xFFFFFFFF
        event = Event.FromString(body)
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value if value.HasField("simple_value")}
        data = data[16 + size :]
    return found


def test_mlflow(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from hanse.tracking.mlflow import write

    at = (tmp_path / "mlruns").as_uri()
    key = write(run, at)
    client = mlflow.MlflowClient(at)
    found = client.get_run(key)
    assert (found.info.status, found.info.run_name) == ("FINISHED", run.folder.name)
    assert client.get_experiment(found.info.experiment_id).name == "tracked"
    assert {(metric.step, metric.value) for metric in client.get_metric_history(key, "loss")} == {(0, 0.5), (1, 10.5)}
    assert {(metric.step, metric.value) for metric in client.get_metric_history(key, "site-2/train/loss")} == {(0, 1.0), (1, 11.0)}
    assert len(client.get_metric_history(key, "site-1/batch/loss")) == 4
    assert (found.data.params["seed"], found.data.params["rounds"], found.data.params["recipe"]) == ("7", "2", "fedavg")
    assert found.data.tags["site-1/note"] == "round 1 at site-1"
    assert client.get_run(write(run, at)).info.experiment_id == found.info.experiment_id
    with pytest.raises(ConfigError, match="MLflow does not take the run"):
        write(run, "nowhere://x")


def test_wandb_offline(run: Run) -> None:
    pytest.importorskip("wandb")
    done = track(run, "--to", "wandb", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    (path,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    history = history_of(path)
    assert {(row["step"], row["loss"]) for row in history if "loss" in row} == {(0, 0.5), (1, 10.5)}
    assert {(row["step"], row["site-2/train/loss"]) for row in history if "site-2/train/loss" in row} == {(0, 1.0), (1, 11.0)}
    assert [row["site-1/batch/loss"] for row in history] == [1.0, 0.5, pytest.approx(1 / 3), 0.25]


def history_of(path: Path) -> list[dict[str, Any]]:
    """What an offline run's file holds: seven bytes, then LevelDB's log, whose records are protobuf messages, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, rows, whole = path.read_bytes(), 7, [], b""
    assert data.startswith(b":W&B")
    while at < len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def test_a_receiver_that_is_not_there(run: Run) -> None:
    done = track(run, "--to", "graphite")
    assert (done.returncode, done.stderr) == (2, "error: --to is 'graphite': it must be one of mlflow, tensorboard, wandb\n")
