"""A run's values, each handed on once: while it goes on, after a crash, after it was resumed. Read again as TensorBoard reads them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.server.run_folder import RunFolder
from hanse.server.track import Target, track

BOARD = Target("tensorboard")
Board = Callable[[Path], dict[tuple[str, int], float]]


def opened(path: Path, sites: Any = ("a", "b")) -> RunFolder:
    """The run folder, as a process that begins or goes on with the job has it."""
    sites = list(sites) if isinstance(sites, tuple) else sites
    facts = {"job": {"name": "x", "recipe": "fedavg", "arguments": {}}, "rounds": {"done": 0, "total": 9}, "model": None, "started": 1.0}
    known = json.loads((path / "run.json").read_text()) if (path / "run.json").is_file() else {}
    folder = RunFolder(path, {**facts, "seed": 0, "sites": sites, **known}, listen=lambda event: None, progress=lambda *_: None)
    path.mkdir(exist_ok=True)
    folder.write_facts(status="running", reason="")
    return folder


def note(folder: RunFolder, round: int, *, loss: float) -> None:
    folder.event("update", round=round, task="train", site="a", seconds=1.0, metrics={"loss": loss}, weight=1.0)


def commit(folder: RunFolder, round: int, *, loss: float) -> None:
    note(folder, round, loss=loss)
    folder.event("round", round=round, metrics={"loss": loss})
    folder.commit(FLModel({"w": np.zeros(1)}, current_round=round))


def test_what_is_new_is_added(tmp_path: Path, board: Board) -> None:
    folder = opened(tmp_path)
    place = Path(track(tmp_path, BOARD))
    assert board(place / "global") == {}
    commit(folder, 0, loss=4.0)
    track(tmp_path, BOARD)
    assert board(place / "global") == {("loss", 0): 4.0}
    commit(folder, 1, loss=2.0)
    folder.finish("completed")
    for _ in range(2):
        track(tmp_path, BOARD)
        assert board(place / "global") == {("loss", 0): 4.0, ("loss", 1): 2.0}
        assert board(place / "sites" / "a") == {("train/loss", 0): 4.0, ("train/loss", 1): 2.0}


def test_a_crash_while_it_commits(tmp_path: Path, board: Board) -> None:
    """What is in the file and not committed is void: it comes again, and another length."""
    folder = opened(tmp_path)
    commit(folder, 0, loss=4.0)
    note(folder, 1, loss=1234567.0)
    folder._write_events()
    place = Path(track(tmp_path, BOARD))
    assert board(place / "sites" / "a") == {("train/loss", 0): 4.0}
    again = opened(tmp_path)
    assert again.resume() is not None
    commit(again, 1, loss=2.0)
    track(tmp_path, BOARD)
    assert board(place / "sites" / "a") == {("train/loss", 0): 4.0, ("train/loss", 1): 2.0}


def test_a_crash_before_the_first_commit(tmp_path: Path, board: Board) -> None:
    folder = opened(tmp_path)
    note(folder, 0, loss=8.0)
    folder._write_events()
    place = Path(track(tmp_path, BOARD))
    again = opened(tmp_path)
    assert again.resume() is None
    commit(again, 0, loss=8.0)
    track(tmp_path, BOARD)
    assert board(place / "sites" / "a") == {("train/loss", 0): 8.0}


def test_a_failed_run_is_handed_on_to_its_end_and_goes_on_when_it_is_resumed(tmp_path: Path, board: Board) -> None:
    folder = opened(tmp_path)
    commit(folder, 0, loss=4.0)
    note(folder, 1, loss=float("inf"))
    folder.finish("failed", "it diverged")
    place = Path(track(tmp_path, BOARD))
    assert board(place / "sites" / "a") == {("train/loss", 0): 4.0, ("train/loss", 1): float("inf")}
    files = sorted(path.stat().st_size for path in place.rglob("*") if path.is_file())
    track(tmp_path, BOARD)
    assert sorted(path.stat().st_size for path in place.rglob("*") if path.is_file()) == files
    again = opened(tmp_path)
    assert again.resume() is not None
    track(tmp_path, BOARD)
    commit(again, 1, loss=2.0)
    again.finish("completed")
    track(tmp_path, BOARD)
    assert board(place / "global") == {("loss", 0): 4.0, ("loss", 1): 2.0}


def test_it_follows_until_the_run_ends(tmp_path: Path, board: Board) -> None:
    folder = opened(tmp_path)
    said: list[tuple[str, str]] = []
    places: list[str] = []

    def follow() -> None:
        places.append(track(tmp_path, BOARD, follow=True, say=lambda *message: said.append(message)))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        for round in range(3):
            commit(folder, round, loss=float(round))
            until(lambda seen=round: ("loss", seen) in board(tmp_path / "tensorboard" / "global"))
        with pytest.raises(ConfigError, match=r"another process writes the values of .* to tensorboard already"):
            track(tmp_path, BOARD)
    finally:
        note(folder, 3, loss=3.0)
        folder.finish("stopped")
        thread.join(60)
    assert places == [str(tmp_path / "tensorboard")]
    assert said == [("info", f"values go to {places[0]}")]
    assert ("train/loss", 3) in board(tmp_path / "tensorboard" / "sites" / "a")


def until(condition: Callable[[], bool]) -> None:
    """Look until it is so: nobody tells."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_command_follows_until_it_is_interrupted(tmp_path: Path, board: Board) -> None:
    folder = opened(tmp_path)
    commit(folder, 0, loss=1.0)
    command = [sys.executable, "-m", "hanse.cli.main", "track", str(tmp_path), "--to", "tensorboard", "--follow"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == f"info: values go to {tmp_path / 'tensorboard'}\n"
    process.send_signal(2)
    assert process.communicate(timeout=60)[0] == f"{tmp_path / 'tensorboard'}\n"
    assert process.returncode == 0
    assert board(tmp_path / "tensorboard" / "global") == {("loss", 0): 1.0}


@pytest.mark.parametrize(
    ("sites", "wanted", "shown"), [({"count": 101}, None, False), ({"count": 101}, True, True), (("a",), False, False)]
)
def test_sites_are_shown_where_they_are_few_or_asked_for(tmp_path: Path, sites: Any, wanted: bool | None, shown: bool) -> None:
    folder = opened(tmp_path, sites)
    commit(folder, 0, loss=1.0)
    place = Path(track(tmp_path, BOARD, sites=wanted))
    assert (place / "sites").exists() is shown


def test_more_values_than_are_taken_at_once(tmp_path: Path, board: Board) -> None:
    folder = opened(tmp_path)
    for step in range(2_500):
        folder.event("record", round=0, site="a", key="k", value=float(step), step=step, kind="scalar")
    commit(folder, 0, loss=0.5)
    place = Path(track(tmp_path, BOARD))
    assert board(place / "sites" / "a") == {("k", step): float(step) for step in range(2_500)} | {("train/loss", 0): 0.5}


@pytest.mark.parametrize("site", ["../../../x", "..", "a\0b"])
def test_a_job_that_makes_up_a_site_writes_nowhere_else(tmp_path: Path, site: str) -> None:
    folder = opened(tmp_path / "run")
    folder.event("update", round=0, task="train", site=site, seconds=1.0, metrics={"loss": 1.0}, weight=1.0)
    commit(folder, 0, loss=1.0)
    with pytest.raises(ConfigError, match="is no site's name"):
        track(tmp_path / "run", BOARD)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run" / "tensorboard").iterdir()] == ["global"]


def test_a_job_that_links_to_what_it_may_not_read(tmp_path: Path) -> None:
    other, folder = opened(tmp_path / "other"), opened(tmp_path / "run")
    for each in (other, folder):
        commit(each, 0, loss=1.0)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "other" / "metrics.jsonl")
    with pytest.raises(OSError, match="symbolic link"):
        track(tmp_path / "run", BOARD)


def test_targets() -> None:
    assert Target.of("tensorboard") == Target("tensorboard", None)
    assert Target.of("mlflow=http://me:pass=word@x:5000") == Target("mlflow", "http://me:pass=word@x:5000")
    with pytest.raises(ConfigError, match="no receiver 'graphite': it must be one of mlflow, tensorboard, wandb"):
        Target.of("graphite=x")
    with pytest.raises(ConfigError, match="say where to"):
        Target.of("mlflow=")
    with pytest.raises(ConfigError, match="must be a receiver's name"):
        Target.of(True)  # type: ignore[arg-type]


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        track(tmp_path, BOARD)
    assert list(tmp_path.iterdir()) == []
