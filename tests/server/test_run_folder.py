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

from hanse.cohort import Best
from hanse.errors import ConfigError
from hanse.messages.codec import read
from hanse.messages.flmodel import FLModel
from hanse.server.run_folder import MAPPED_FROM_BYTES, RunFolder, open_run

Open = Callable[[], RunFolder]


@pytest.fixture
def heard() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def folder(tmp_path: Path, heard: list[dict[str, Any]]) -> Open:
    """Opens the run folder, each time as a new process would."""

    def opened() -> RunFolder:
        facts = {"status": "running", "job": {"name": "a"}, "rounds": {"done": 0, "total": 3}, "model": None, "started": 0.0}
        return RunFolder(tmp_path, facts, listen=heard.append, progress=lambda *_: None)

    return opened


def model(round: int) -> FLModel:
    return FLModel(
        {"w": np.full(2, round)}, optimizer_params={"m": np.ones(1)}, metrics={"loss": float("nan")}, current_round=round, total_rounds=3
    )


def lines(path: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def facts(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "run.json").read_text()))


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "runs"
    for name in ("a", "a", "a-b", "a"):
        RunFolder.new_path(root, name)
    (root / "a-007").mkdir()
    (root / "a-old").mkdir()
    (root / "a-1234").mkdir()
    assert RunFolder.new_path(root, "a") == root / "a-1235"
    assert {path.name for path in root.iterdir()} == {"a-001", "a-002", "a-003", "a-007", "a-old", "a-1234", "a-1235", "a-b-001"}


def test_events_are_told_at_once_and_written_with_the_commit(folder: Open, tmp_path: Path, heard: list[dict[str, Any]]) -> None:
    run = folder()
    run.event("start", job="a")
    run.event("update", round=0, metrics={"loss": np.float32(0.5), "n": np.int64(3)}, weight=np.ones(1))
    run.event("round", round=0, metrics={})
    assert [event["event"] for event in heard] == ["start", "update", "round"]
    assert [("time" in event) for event in heard] == [True, False, True]
    assert not (tmp_path / "metrics.jsonl").exists()
    run.commit(model(0))
    assert lines(tmp_path) == ["start", "update", "round"]
    update = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert update == {"event": "update", "round": 0, "metrics": {"loss": 0.5, "n": 3}, "weight": 1.0}
    assert facts(tmp_path)["rounds"] == {"done": 1, "total": 3}


def test_statistics_are_a_file_too(folder: Open, tmp_path: Path) -> None:
    run = folder()
    run.event("statistics", round=0, columns={"age": {"count": np.int64(3)}}, members={"": ["oslo"]})
    assert not (tmp_path / "statistics.json").exists()
    run.commit(model(0))
    written = json.loads((tmp_path / "statistics.json").read_text())
    assert written == {"columns": {"age": {"count": 3}}, "members": {"": ["oslo"]}}


def test_a_new_process_finds_the_last_commit(folder: Open, tmp_path: Path) -> None:
    run = folder()
    assert run.resume() is None
    states = {"site-1": b"\x00state", "site-2": b""}
    run.states = lambda: states
    for number in range(2):
        run.event("round", round=number)
        run.keep_best(model(number), Best("loss", 0.1, number))
        run.commit(model(number))
    run.event("update", round=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "upd')  # killed while it wrote the next round's
    again = folder()
    restored = again.resume()
    assert restored is not None
    found, found_states = restored
    assert (found.current_round, found.total_rounds, found.params["w"].tolist()) == (1, 3, [1, 1])
    assert found.optimizer_params["m"].tolist() == [1.0]
    assert np.isnan(found.metrics["loss"])
    assert found_states == states
    assert (again.commits, again.best) == (2, Best("loss", 0.1, 1))
    assert lines(tmp_path) == ["round", "round"]
    again.event("round", round=2)
    again.commit(model(2))
    assert lines(tmp_path) == ["round"] * 3


def test_without_a_commit_it_begins_anew(folder: Open, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "start"}\n')
    assert folder().resume() is None
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_best_is_kept_apart_and_without_the_moments(folder: Open, tmp_path: Path) -> None:
    run = folder()
    run.keep_best(model(1), Best("loss", 0.1, 1))
    best = read(tmp_path / "best.safetensors")[0]
    assert (best.params["w"].tolist(), best.optimizer_params) == ([1, 1], {})
    run.keep_best(FLModel(), Best("loss", 0.05, 2))  # there is nothing to write
    assert read(tmp_path / "best.safetensors")[0].params["w"].tolist() == [1, 1]
    assert run.best == Best("loss", 0.05, 2)


def test_a_completed_run(folder: Open, tmp_path: Path, heard: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    run = folder()
    run.commit(model(2))
    run.finish("completed")
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "metrics.jsonl", "model.safetensors", "report.html"}
    last = read(tmp_path / "model.safetensors")[0]
    assert (last.params["w"].tolist(), last.optimizer_params, last.current_round) == ([2, 2], {}, 2)
    assert lines(tmp_path) == ["end"]
    here = tmp_path.name
    assert heard[-1] | {"time": 0} == {
        "event": "end", "time": 0, "status": "completed", "reason": "", "folder": here,
        "model": f"{here}/model.safetensors", "best": None, "report": f"{here}/report.html",
    }  # fmt: skip
    assert (facts(tmp_path)["status"], facts(tmp_path)["model"]) == ("completed", "model.safetensors")
    assert facts(tmp_path)["ended"] == json.loads((tmp_path / "metrics.jsonl").read_text())["time"]


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_run_that_can_be_gone_on_with(folder: Open, tmp_path: Path, heard: list[dict[str, Any]], status: str) -> None:
    run = folder()
    run.commit(model(1))
    run.event("failure", site="a")
    run.finish(status, "for a reason")
    assert read(tmp_path / "model.safetensors")[0].params["w"].tolist() == [1, 1]
    assert lines(tmp_path) == ["failure", "end"]
    assert heard[-1]["resume"].startswith("hanse resume ")
    assert open_run(tmp_path)["reason"] == "for a reason"
    assert folder().resume() is not None
    assert lines(tmp_path) == []


def test_a_run_that_reached_nothing(folder: Open, tmp_path: Path, heard: list[dict[str, Any]]) -> None:
    folder().finish("failed", "at once")
    assert not (tmp_path / "model.safetensors").exists()
    assert heard[-1]["model"] is None


def test_the_last_commit_is_there_until_the_run_is_said_to_be_complete(folder: Open, tmp_path: Path) -> None:
    """Wherever a process dies at the end, the next one goes on from the last round."""
    run = folder()
    run.write_facts()
    run.commit(model(2))
    if (pid := os.fork()) == 0:
        run.write_facts = lambda **_: os._exit(9)  # type: ignore[assignment]
        run.finish("completed")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert open_run(tmp_path)["status"] == "running"
    again = folder()
    assert again.resume() is not None
    again.finish("completed")
    assert lines(tmp_path) == ["end"]


def test_facts_follow_the_commit_even_if_it_was_killed_between_the_two(folder: Open, tmp_path: Path) -> None:
    run = folder()
    run.commit(model(0))
    if (pid := os.fork()) == 0:
        run.write_facts = lambda **_: os._exit(9)  # type: ignore[assignment]
        run.keep_best(model(1), Best("loss", 0.1, 1))
        run.commit(model(1))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert facts(tmp_path)["rounds"] == {"done": 1, "total": 3}
    again = folder()
    again.resume()
    again.finish("completed")
    assert facts(tmp_path)["rounds"] == {"done": 2, "total": 3}
    assert facts(tmp_path)["best"] == {"metric": "loss", "value": 0.1, "round": 1}


def test_what_cannot_be_gone_on_with(folder: Open, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run folder: it has no run.json"):
        open_run(tmp_path)
    run = folder()
    run.finish("completed")
    with pytest.raises(ConfigError, match="is complete: there is nothing to go on with"):
        open_run(tmp_path)


def test_facts_are_changed_in_one_step(folder: Open, tmp_path: Path) -> None:
    run = folder()
    run.write_facts(seed=np.int64(3))
    before = (tmp_path / "run.json").open()
    run.write_facts(status="completed")
    assert json.loads(before.read())["status"] == "running"
    assert (facts(tmp_path)["status"], facts(tmp_path)["seed"]) == ("completed", 3)
    before.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_two_processes_do_not_run_in_one_folder(folder: Open, tmp_path: Path) -> None:
    other = f"""
from pathlib import Path
from hanse.server.run_folder import RunFolder
with RunFolder(Path({str(tmp_path)!r}), {{}}, listen=print, progress=print).held():
    pass
"""
    with folder().held():
        refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
    assert f"another process is running in {tmp_path}" in refused.stderr
    assert subprocess.run([sys.executable, "-c", other]).returncode == 0
    assert not (tmp_path / ".lock").exists()


def test_a_large_commit_is_written_over_an_earlier_one_unless_that_is_still_mapped(folder: Open, tmp_path: Path) -> None:
    run, spare = folder(), tmp_path / ".commit-spare.safetensors"
    elements = MAPPED_FROM_BYTES // 4

    def commit(round: int) -> FLModel:
        return run.commit(FLModel({"w": np.full(elements - round, round, np.float32)}, current_round=round))

    files = []
    mapped = commit(0)
    for round in range(1, 6):
        files.append((tmp_path / "commit.safetensors").stat().st_ino)
        mapped = commit(round)
        assert mapped.params["w"].size == elements - round
    assert files[2:4] == files[:2]
    kept = mapped
    for round in (6, 7, 8):
        mapped = commit(round)
        assert (kept.params["w"] == 5).all()
    assert (mapped.params["w"] == 8).all()
    assert mapped.params["w"].size == elements - 8
    assert spare.is_file()
    run.finish("completed")
    assert not spare.exists()


def test_a_spare_that_was_being_written_is_no_commit(folder: Open, tmp_path: Path) -> None:
    run = folder()
    run.commit(model(0))
    for name in (".commit-spare.safetensors", ".commit.safetensors.part"):
        (tmp_path / name).write_bytes(b"half of it")
    restored = folder().resume()
    assert restored is not None
    assert restored[0].params["w"].tolist() == [0, 0]
    assert not (tmp_path / ".commit-spare.safetensors").exists()
    again = folder()
    again.resume()
    again.commit(model(1))
    assert read(tmp_path / "commit.safetensors")[0].params["model"]["w"].tolist() == [1, 1]
