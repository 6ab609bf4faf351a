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
from hanse.server.track import Target, track

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


def command(run: Run, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`hanse track`, as it is typed."""
    typed = [sys.executable, "-m", "hanse.cli.main", "track", str(run.folder), *options]
    return subprocess.run(typed, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_tensorboard(run: Run, tmp_path: Path, board: Callable[[Path], dict[tuple[str, int], float]]) -> None:
    folder = Path(track(run.folder, Target("tensorboard", str(tmp_path / "board"))))
    assert folder == tmp_path / "board" / run.folder.name
    assert board(folder / "global") == {("loss", 0): 0.5, ("loss", 1): 10.5}
    assert board(folder / "sites" / "site-2") == {
        ("train/loss", 0): 1.0, ("train/loss", 1): 11.0,
        ("batch/loss", 0): 1.0, ("batch/loss", 1): 0.5, ("batch/loss", 2): pytest.approx(1 / 3), ("batch/loss", 3): 0.25,
    }  # fmt: skip
    small = Path(track(run.folder, Target("tensorboard", str(tmp_path / "small")), sites=False))
    assert [path.name for path in small.iterdir()] == ["global"]


def test_tensorboard_shows_the_job_texts_and_times(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(track(run.folder, Target("tensorboard")))
    assert folder == run.folder / "tensorboard"
    read = EventAccumulator(str(folder / "global"))
    read.Reload()
    (job,) = read.Tensors("job/text_summary")
    assert b"seed: 7" in job.tensor_proto.string_val[0]
    assert [event.wall_time for event in read.Scalars("loss")] == [event["time"] for event in run.events("round")]
    site = EventAccumulator(str(folder / "sites" / "site-1"))
    site.Reload()
    notes = [event.tensor_proto.string_val[0] for event in site.Tensors("note/text_summary")]
    assert notes == [b"round 0 at site-1", b"round 1 at site-1"]


def test_tensorboard_mixes_no_two_runs_and_loses_none(run: Run) -> None:
    (run.folder / "tensorboard" / "other").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not empty"):
        track(run.folder, Target("tensorboard"))
    (run.folder / "tensorboard" / "other").rmdir()
    place = Path(track(run.folder, Target("tensorboard")))
    place.rename(run.folder / "elsewhere")
    (run.folder / ".track-tensorboard.json").write_text(json.dumps({"at": None, "key": str(place), "place": str(place), "bytes": 0}))
    with pytest.raises(ConfigError, match=r"is gone, .*delete .*/.track-tensorboard.json"):
        track(run.folder, Target("tensorboard"))


@pytest.fixture
def file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where MLflow may keep runs in plain folders."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def test_mlflow(run: Run, file_store: str) -> None:
    from mlflow import MlflowClient

    place = track(run.folder, Target("mlflow", file_store))
    client = MlflowClient(file_store)
    (found,) = client.search_runs([client.get_experiment_by_name("tracked").experiment_id])
    assert found.info.run_id in place
    assert (found.info.status, found.info.run_name) == ("FINISHED", run.folder.name)
    losses = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, m.value, m.timestamp) for m in losses] == [
        (event["round"], event["metrics"]["loss"], round(event["time"] * 1000)) for event in run.events("round")
    ]
    assert {(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "site-2/train/loss")} == {(0, 1.0), (1, 11.0)}
    assert len(client.get_metric_history(found.info.run_id, "site-1/batch/loss")) == 4
    assert (found.data.params["seed"], found.data.params["rounds"], found.data.params["recipe"]) == ("7", "2", "fedavg")
    assert found.data.tags["site-1/note"] == "round 1 at site-1"
    with pytest.raises(ConfigError, match="MLflow does not take the run"):
        track(run.folder, Target("mlflow", "nowhere://x"))


def test_wandb_offline(run: Run) -> None:
    done = command(run, "--to", "wandb", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    (path,) = Path(done.stdout.strip()).glob("run-*.wandb")
    assert path.parent.parent == run.folder / "wandb"
    history = history_of(path)
    assert {(row["step"], row["loss"]) for row in history if "loss" in row} == {(0, 0.5), (1, 10.5)}
    assert {(row["step"], row["site-2/train/loss"]) for row in history if "site-2/train/loss" in row} == {(0, 1.0), (1, 11.0)}
    assert [row["site-1/batch/loss"] for row in history] == [1.0, 0.5, pytest.approx(1 / 3), 0.25]


def history_of(path: Path) -> list[dict[str, Any]]:
    """What an offline run's file holds: seven bytes, then LevelDB's log, whose records are protobuf messages, in blocks of 32 KiB.

    wandb 0.31 reads it in Go alone, to upload it: there is no reader to call.
    """
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
    done = command(run, "--to", "graphite")
    assert done.returncode == 2
    assert done.stderr == "error: there is no receiver 'graphite': it must be one of mlflow, tensorboard, wandb\n"


def test_wandb_offline_goes_on_under_the_same_id(run: Run) -> None:
    """In a folder of its own, as `wandb sync` takes it."""
    facts = json.loads((run.folder / "run.json").read_text())
    first_round = next(end for end, text in ends_of((run.folder / "metrics.jsonl").read_text()) if json.loads(text)["event"] == "round")
    for known in ({**facts, "status": "running", "events": first_round}, facts):
        (run.folder / "run.json").write_text(json.dumps(known))
        done = command(run, "--to", "wandb", WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    first, second = sorted(run.folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name
    assert [[row["loss"] for row in history_of(path) if "loss" in row] for path in (first, second)] == [[0.5], [10.5]]


def ends_of(text: str) -> list[tuple[int, str]]:
    """Where each line ends, and the line."""
    lines = text.splitlines(keepends=True)
    return [(sum(map(len, lines[: at + 1])), line) for at, line in enumerate(lines)]
