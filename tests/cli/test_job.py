"""`hanse job`, with a federation of real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hanse.server.run import Run

Hanse = Callable[..., subprocess.CompletedProcess[str]]
Job = Callable[..., Path]


@pytest.fixture
def ask(hanse: Hanse, federation: Path, tmp_path: Path) -> Hanse:
    """`hanse job …` with the admin's kit."""
    kit = {"HANSE_KIT": str(federation / "admins" / "poc-admin")}
    return lambda *arguments: hanse("job", *arguments, env=kit, cwd=tmp_path)


def test_a_job_from_submission_to_result(ask: Hanse, job: Job, tmp_path: Path) -> None:
    done = ask("submit", job("whole"), "--follow")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["whole-0001", "whole: 2 sites, 3 rounds, seed 0"]
    assert {"north: round 2 at north", "south: round 2 at south"} <= set(lines)
    assert [line[:9] for line in lines if line.startswith("round")] == ["round 1/3", "round 2/3", "round 3/3"]
    listed = ask("list").stdout
    assert re.search(r"whole-0001 +completed +3/3 +2 ", listed)
    shown = ask("show", "whole-0001").stdout
    assert re.search(r"status +completed\n", shown)
    assert re.search(r"north +accepted +yes", shown)
    assert "round 3/3" in ask("logs", "whole-0001").stdout
    assert ask("download", "whole-0001").stdout == "runs/whole-001\n"
    run = Run(tmp_path / "runs" / "whole-001")
    assert run.get_result().params["w"].tolist() == [3, 3, 3]
    assert (run.folder / "job" / "code" / "job.py").is_file()


def test_as_json(ask: Hanse, job: Job, tmp_path: Path) -> None:
    submitted = ask("submit", job("plain"), "--sites", "north", "--follow", "--json").stdout.splitlines()
    assert json.loads(submitted[0]) == {"job": "plain-0001", "refusals": {}}
    assert [event["event"] for event in map(json.loads, submitted[1:])].count("round") == 3
    about = json.loads(ask("show", "plain-0001", "--json").stdout)
    assert (about["status"], about["sites"]) == ("completed", ["north"])
    assert about["job"] in [row["job"] for row in json.loads(ask("list", "--json").stdout)]
    assert json.loads(ask("download", "plain-0001", "--json", "--runs", "elsewhere").stdout) == {"folder": "elsewhere/plain-001"}


def test_a_job_that_fails_and_goes_on(ask: Hanse, job: Job, tmp_path: Path) -> None:
    broken = tmp_path / "broken-now"
    broken.touch()
    failed = ask("submit", job("broken", broken=broken), "-f")
    assert failed.returncode == 1
    assert re.search(r"error: job broken-0001 failed: round 2, task 'train': 0 good updates of 2 asked", failed.stderr)
    assert ask("logs", "-f", "broken-0001").returncode == 1
    broken.unlink()
    assert ask("resume", "broken-0001").stdout == "broken-0001 goes on\n"
    followed = ask("logs", "-f", "broken-0001")
    assert followed.returncode == 0
    assert "resumed after 1 commit" in followed.stdout


def test_a_job_that_is_stopped(ask: Hanse, job: Job, tmp_path: Path) -> None:
    os.mkfifo(until := tmp_path / "until")
    folder = job("stopped", until=until)
    assert ask("submit", folder, "--min-sites", 1).stdout == "stopped-0001\n"
    assert ask("abort", "stopped-0001").stdout == "stopped-0001 is stopped; go on with: hanse job resume stopped-0001\n"
    assert ask("logs", "-f", "stopped-0001").returncode == 130
    again = ask("abort", "stopped-0001")
    assert again.returncode == 1
    assert "error: job 'stopped-0001' is stopped: there is nothing to stop." in again.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["show", "nothing"], 1, "error: there is no job 'nothing'"),
        (["submit", "nowhere"], 2, "error: nowhere is no job folder"),
        (["submit", "{job}", "--sites", "east"], 1, "not in this federation, or disabled or revoked: east"),
        (["submit", "{job}", "--gpus", "1000"], 1, "north: Resources"),
        (["submit", "{job}", "--cores", "1000", "--memory-bytes", "1"], 1, "north: Resources"),
        (["submit", "{job}", "--sites", "north,north"], 2, "give a list of different names"),
        (["submit", "{job}", "--site-config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["list", "--kit", "nowhere"], 2, "nowhere is no kit"),
        (["list", "--kit", "{federation}/sites/north"], 2, "is the kit of a site"),
    ],
    ids=str,
)
def test_wrong_input(ask: Hanse, job: Job, federation: Path, arguments: list[str], status: int, says: str) -> None:
    folder = job("wrong")
    done = ask(*(argument.format(job=folder, federation=federation) for argument in arguments))
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_no_kit(hanse: Hanse, tmp_path: Path) -> None:
    done = hanse("job", "list", cwd=tmp_path)
    assert done.returncode == 2
    assert "Missing option '--kit'" in done.stderr
