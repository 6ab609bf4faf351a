"""The command as a user has it: a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.server.run import Run

COMMAND = Path(sys.executable).with_name("hanse")


def hanse(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(COMMAND)] if COMMAND.exists() else [sys.executable, "-m", "hanse.cli.main"]
    environment = os.environ | {"COLUMNS": "140", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run([*command, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's jobs and runs are; `job` is a job folder."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "job" / "code").mkdir(parents=True)
    (folder / "job" / "code" / "job.py").write_text("""
import os
import numpy as np
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    if os.path.exists("broken") and model.current_round == 1:
        raise ValueError("no data")
    if os.path.exists("interrupted") and model.current_round == 1:
        os.kill(os.getppid(), 2)
        open("never").read()
    w = (np.zeros(3) if model.params is None else model.params["w"]) + site.rng.normal(size=3) + site.config.get("shift", 0)
    return FLModel({"w": w}, metrics={"loss": float(w[0])})
""")
    os.mkfifo(folder / "never")
    says = {"name": "job", "recipe": "fedavg", "arguments": {"rounds": 3, "best": "min loss"}, "app": {"file": "job.py", "name": "app"}}
    (folder / "job" / "job.json").write_text(json.dumps(says))
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[subprocess.CompletedProcess[str], Run]:
    """The outcome of `hanse run job --sites 3`."""
    done = hanse("run", "job", "--sites", 3, cwd=folder)
    return done, Run(folder / "runs" / "job-001")


def test_run(first: tuple[subprocess.CompletedProcess[str], Run]) -> None:
    done, run = first
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"job: 3 sites, \d workers?, 3 rounds, seed 0", lines[0])
    assert [line[:9] for line in lines[1:4]] == ["round 1/3", "round 2/3", "round 3/3"]
    assert lines[-5].startswith("completed in ")
    assert lines[-3:] == ["  model   runs/job-001/model.safetensors", "  report  runs/job-001/report.html", "  folder  runs/job-001"]
    assert run.get_status() == "completed"


def test_run_with_other_sites_and_workers(folder: Path, first: Any) -> None:
    (folder / "sites.yaml").write_text("ada: {shift: 100}\n")
    done = hanse("run", "job", "--sites", "ada,bob", "--site-config", "sites.yaml", "--workers", 1, "--runs", "named", "--json", cwd=folder)
    assert done.returncode == 0
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", *["update", "update", "round"] * 3, "end"]
    assert events[0]["workers"] == 1
    assert {event["site"]: event["metrics"]["loss"] > 50 for event in events[1:3]} == {"ada": True, "bob": False}
    assert events[-1]["folder"] == "named/job-001"
    same = hanse("run", "job", "--sites", 3, "--workers", 1, "--runs", "named", cwd=folder)
    assert same.returncode == 0
    assert (folder / "named/job-002/model.safetensors").read_bytes() == (folder / "runs/job-001/model.safetensors").read_bytes()


def test_show(folder: Path, first: tuple[subprocess.CompletedProcess[str], Run]) -> None:
    shown = hanse("show", "runs/job-001", cwd=folder)
    assert (shown.returncode, shown.stdout) == (0, first[0].stdout)
    as_json = hanse("show", "runs/job-001", "--json", cwd=folder)
    assert [json.loads(line)["event"] for line in as_json.stdout.splitlines()].count("round") == 3


def test_report(folder: Path, first: Any) -> None:
    path = folder / "runs" / "job-001" / "report.html"
    path.unlink()
    assert hanse("report", "runs/job-001", cwd=folder).stdout == "runs/job-001/report.html\n"
    assert "<html" in path.read_text()


def test_a_job_that_fails_and_goes_on(folder: Path, first: Any) -> None:
    (folder / "broken").touch()
    failed = hanse("run", "job", "--sites", 3, "--runs", "broken-runs", cwd=folder)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: job 'job' failed: round 2, task 'train': 0 good updates of 3 asked, 3 needed.")
    assert "Traceback" not in failed.stderr
    assert "go on   hanse resume broken-runs/job-001" in failed.stdout
    again = hanse("resume", "broken-runs/job-001", cwd=folder)
    assert again.returncode == 1
    (folder / "broken").unlink()
    resumed = hanse("resume", "broken-runs/job-001", "--workers", 1, "--json", cwd=folder)
    assert resumed.returncode == 0
    events = [json.loads(line) for line in resumed.stdout.splitlines()]
    assert (events[0]["resumed"], [event["round"] for event in events if event["event"] == "round"]) == (1, [1, 2])
    assert (folder / "broken-runs/job-001/model.safetensors").read_bytes() == (folder / "runs/job-001/model.safetensors").read_bytes()


def test_a_job_that_is_stopped(folder: Path) -> None:
    (folder / "interrupted").touch()
    stopped = hanse("run", "job", "--runs", "stopped-runs", cwd=folder)
    (folder / "interrupted").unlink()
    assert stopped.returncode == 128 + signal.SIGINT
    assert "go on   hanse resume stopped-runs/job-001" in stopped.stdout
    assert "Traceback" not in stopped.stderr
    shown = hanse("show", "stopped-runs/job-001", cwd=folder)
    assert "stopped after 1 of 3 rounds" in shown.stdout


def test_version() -> None:
    printed = hanse("version")
    assert printed.returncode == 0
    assert re.match(r"python 3\.\d+\.\d+\nhanse \d+\.\d+\.\d+\nnumpy ", printed.stdout)


def test_help_names_every_command() -> None:
    printed = hanse("--help")
    assert printed.returncode == 0
    assert set(re.findall(r"\b(run|resume|show|report|version)\b", printed.stdout)) == {"run", "resume", "show", "report", "version"}
    of_run = hanse("run", "--help").stdout
    assert all(option in of_run for option in ("--sites", "--site-config", "--workers", "--threads", "--runs", "--json"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nowhere"], "error: .*nowhere is no job folder"),
        (["run", "job", "--sites", "a,a"], "error: sites is .*: give a list of different names"),
        (["run", "job", "--sites", "0"], "error: SimEnv "),
        (["run", "job", "--workers", "0"], "Invalid value for '--workers'"),
        (["run", "job", "--site-config", "nowhere.yaml"], "error: "),
        (["run"], "Missing argument"),
        (["fly"], "No such command 'fly'"),
        (["resume", "job"], "error: job is no run folder: it has no run.json"),
        (["resume", "runs/job-001"], "error: runs/job-001 is complete: there is nothing to go on with"),
        (["show", "job"], "error: job is no run folder"),
        (["report", "job"], "error: job is no run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(folder: Path, first: Any, arguments: list[str], says: str) -> None:
    done = hanse(*arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(says, done.stderr)
    assert "Traceback" not in done.stderr


def test_what_execute_writes_can_be_run_again(app: App, folder: Path, tmp_path: Path) -> None:
    FedAvgRecipe(name="exported", app=app, model={"w": np.zeros(3, np.float32)}, rounds=1).export(tmp_path / "exported")
    assert hanse("run", tmp_path / "exported", "--runs", tmp_path / "runs").returncode == 0
    assert hanse("run", tmp_path / "runs" / "exported-001" / "job", "--runs", tmp_path / "runs").returncode == 0
    models = [(tmp_path / "runs" / f"exported-00{number}" / "model.safetensors").read_bytes() for number in (1, 2)]
    assert models[0] == models[1]


def test_what_help_loads() -> None:
    """`hanse --help` is quick because commands load what they need when they run."""
    code = "import sys, hanse.cli.main; print(sorted({'numpy', 'grpc', 'cryptography', 'sqlalchemy', 'yaml', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n")
