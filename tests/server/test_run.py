from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hanse.app import App
from hanse.environments import SimEnv
from hanse.errors import ConfigError
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.server.run import Run


@pytest.fixture
def run(app: App, tmp_path: Path) -> Run:
    recipe = FedAvgRecipe(name="a", app=app, model={"w": np.zeros(3, np.float32)}, rounds=2, best="min loss")
    return recipe.execute(SimEnv(num_clients=3, runs=tmp_path, console="quiet"))


def test_a_run_is_what_its_folder_says(run: Run) -> None:
    again = Run(str(run.folder))
    assert again.get_status() == "completed"
    assert [metrics["rounds"] for metrics in again.metrics] == [1.0, 2.0]
    assert len(again.events("update")) == 6
    assert again.events("start")[0]["job"] == "a"
    result = again.get_result()
    assert (result.current_round, result.params["w"].shape, result.metrics) == (1, (3,), again.metrics[-1])
    assert not result.params["w"].flags.writeable
    best = again.facts["best"]
    assert best["value"] == min(metrics["loss"] for metrics in again.metrics)
    if best["round"] == 0:
        assert again.get_best().params["w"].tolist() == [0.0] * 3  # the model that the first round's sites received


def test_its_report_can_be_written_anew(run: Run) -> None:
    (run.folder / "report.html").unlink()
    assert run.report() == run.folder / "report.html"
    assert "<html" in (run.folder / "report.html").read_text()


def test_it_can_be_shown_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.show("plain")
    printed = capsys.readouterr().out
    assert printed.startswith("a: 3 sites")
    assert "round 2/2" in printed
    assert f"model   {run.folder / 'model.safetensors'}" in printed
    run.show("json")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "update"] == ["start", "round", "round", "end"]
    assert events[-1]["best"] == run.facts["best"]


def test_what_is_not_there(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run folder: it has no run.json"):
        Run(tmp_path)
    (run.folder / "best.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"best.safetensors is not there: the job is completed and has made no such model"):
        run.get_best()
    (run.folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model.safetensors is not there"):
        run.get_result()
