"""Jobs whose values are written to a receiver while they run, and what does not harm them."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import hanse.server.tracker
from hanse.environments import SimEnv, resume
from hanse.errors import ConfigError, JobFailed, NotInstalled
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.server.run import Run
from hanse.server.track import Target, track

pytestmark = pytest.mark.usefixtures("clean")
Board = Callable[..., dict[tuple[str, int], float]]

APP = """
import time
from pathlib import Path
from hanse import App, FLModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

app = App()


def wait(folder, step):
    while True:
        if Path(folder).is_dir():
            events = EventAccumulator(folder).Reload()
            if "loss" in events.Tags()["scalars"] and step in [event.step for event in events.Scalars("loss")]:
                return
        time.sleep(0.05)


@app.train
def train(model, site):
    round = model.current_round
    if round and site.rank == 0 and "board" in site.config:
        wait(site.config["board"], round - 1)
    if round == 2 and "gate" in site.config:
        open(site.config["gate"]).read()
    if round == 2 and Path(site.config.get("broken", "nowhere")).exists():
        raise ValueError("no data today")
    return FLModel({"w": model.params["w"] + site.rng.normal(size=2).astype("f4")}, metrics={"loss": float(model.params["w"][0]) + round})
"""


@pytest.fixture
def recipe(load: Callable[[str], Any]) -> Callable[..., FedAvgRecipe]:
    """Four rounds; with `board`, each waits until the one before can be seen there, with `gate`, the third until that is written to."""

    def made(**config: str) -> FedAvgRecipe:
        app = load(APP).app
        return FedAvgRecipe(name="live", app=app, model={"w": np.zeros(2, np.float32)}, rounds=4, config=config)

    return made


def simulated(tmp_path: Path, **settings: Any) -> SimEnv:
    return SimEnv(**{"num_clients": 2, "workers": 2, "runs": tmp_path / "runs", "console": "quiet", **settings})


def losses(run: Run) -> dict[tuple[str, int], float]:
    return {("loss", event["round"]): float(np.float32(event["metrics"]["loss"])) for event in run.events("round")}


def messages(run: Run) -> list[str]:
    return [event["text"] for event in run.events("message")]


def the_tracker() -> psutil.Process:
    """The process that is below this one."""
    (found,) = (each for each in psutil.Process().children() if "hanse.server.track" in each.cmdline())
    return found


def test_each_round_is_in_tensorboard_before_the_next_one_ends(tmp_path: Path, recipe: Any, board: Board) -> None:
    shown = tmp_path / "board" / "live-001"
    run = recipe(board=str(shown / "global")).execute(simulated(tmp_path, track=f"tensorboard={tmp_path / 'board'}"))
    assert board(shown / "global") == losses(run)
    assert len(board(shown / "sites" / "site-2")) == 4
    assert messages(run) == [f"values go to {shown}"]
    plain = recipe().execute(simulated(tmp_path))
    assert "track" not in plain.facts["environment"]
    assert run.facts["environment"]["track"] == f"tensorboard={tmp_path / 'board'}"
    np.testing.assert_array_equal(run.get_result().params["w"], plain.get_result().params["w"])


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "gate")
    return tmp_path / "gate"


def test_a_tracker_that_is_killed_is_replaced(tmp_path: Path, recipe: Any, gate: Path, board: Board) -> None:
    shown = tmp_path / "runs" / "live-001" / "tensorboard" / "global"

    def kill() -> None:
        with gate.open("w"):
            the_tracker().kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    run = recipe(gate=str(gate), board=str(shown)).execute(simulated(tmp_path, num_clients=1, track="tensorboard"))
    thread.join()
    assert run.get_status() == "completed"
    assert board(shown, killed=True) == losses(run)
    assert sum("was killed by SIGKILL" in text and "It is started again." in text for text in messages(run)) == 1


def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, recipe: Any, gate: Path, board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what it did not write is written later."""
    monkeypatch.setattr(hanse.server.tracker, "FINISH_WITHIN_S", 0.5)

    def stop() -> None:
        with gate.open("w"):
            the_tracker().send_signal(signal.SIGSTOP)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    run = recipe(gate=str(gate)).execute(simulated(tmp_path, num_clients=1, track="tensorboard", console="plain"))
    thread.join()
    assert run.get_status() == "completed"
    assert "the process that writes the run's values to tensorboard was killed by SIGKILL" in " ".join(capsys.readouterr().out.split())
    track(run.folder, Target("tensorboard"))
    assert board(run.folder / "tensorboard" / "global", killed=True) == losses(run)


def test_a_receiver_that_is_not_reached(
    tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = recipe().execute(simulated(tmp_path, track="mlflow=http://127.0.0.1:9", console="plain"))
    assert run.get_status() == "completed"
    said = " ".join(capsys.readouterr().out.split())
    assert "the run's values are not written to mlflow: MLflow does not take the run: API request" in said


def test_a_run_that_is_resumed_goes_on_in_the_same_mlflow_run(tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    at, broken = (tmp_path / "mlruns").as_uri(), tmp_path / "broken"
    broken.touch()
    with pytest.raises(JobFailed):
        recipe(broken=str(broken)).execute(simulated(tmp_path, track=f"mlflow={at}"))
    client = MlflowClient(at)
    (experiment,) = (each.experiment_id for each in client.search_experiments() if each.name == "live")
    (found,) = client.search_runs([experiment])
    assert (found.info.status, len(client.get_metric_history(found.info.run_id, "loss"))) == ("FAILED", 2)
    broken.unlink()
    run = resume(tmp_path / "runs" / "live-001", console="quiet")
    (found,) = client.search_runs([experiment])
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {("loss", m.step): float(np.float32(m.value)) for m in history} == losses(run)
    assert len(history) == 4
    assert json.loads((run.folder / ".track-mlflow.json").read_text())["key"] == found.info.run_id


def test_settings_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no receiver 'graphite'"):
        simulated(tmp_path, track="graphite")
    monkeypatch.setattr("hanse.server.track.find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match=r"pip install 'hanse\[wandb\]'"):
        simulated(tmp_path, track="wandb")
