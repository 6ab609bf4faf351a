"""`hanse poc`: a federation in the background."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

Hanse = Callable[..., subprocess.CompletedProcess[str]]


def test_it_runs_until_it_is_stopped(hanse: Hanse, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("logs: false\n")
    started = hanse("poc", "start", "--policy", "policy.yaml", cwd=tmp_path)
    assert (started.returncode, started.stderr) == (0, "")
    assert started.stdout.splitlines()[:2] == ["running with 2 sites: site-1, site-2", "  kit   poc/admins/poc-admin"]
    pid = int((tmp_path / "poc" / "pid").read_text())
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    assert len(processes) == 4  # this one, the server, two agents
    assert (tmp_path / "poc" / "sites" / "site-1" / "policy.yaml").read_text() == "logs: false\n"
    status = json.loads(hanse("poc", "status", "--json", cwd=tmp_path).stdout)
    assert status == {"running": True, "sites": ["site-1", "site-2"], "kit": "poc/admins/poc-admin", "logs": "poc/logs"}
    assert hanse("poc", "status", cwd=tmp_path).stdout == started.stdout
    again = hanse("poc", "start", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (2, "error: a federation runs in poc already. Stop it with: hanse poc stop --folder poc\n")

    assert hanse("poc", "stop", cwd=tmp_path).stdout == "stopped\n"
    assert psutil.wait_procs(processes, timeout=30)[1] == []
    gone = hanse("poc", "status", cwd=tmp_path)
    assert (gone.returncode, gone.stdout) == (1, "no federation runs in poc\n")
    other = hanse("poc", "start", "--sites", "3", cwd=tmp_path)
    assert other.returncode == 2
    assert "poc holds a federation of site-1, site-2" in other.stderr
    assert hanse("poc", "stop", "--delete", cwd=tmp_path).stdout == "no federation runs in poc\n"
    assert not (tmp_path / "poc").exists()


def test_in_the_foreground(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hanse.cli.main", "poc", "start", "--foreground", "--sites", "1", "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["sites"] == ["site-1"]
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert [child for child in below if child.is_running()] == []


def test_one_that_loses_a_process_ends(hanse: Hanse, tmp_path: Path) -> None:
    assert hanse("poc", "start", "--sites", "1", cwd=tmp_path).returncode == 0
    pid = int((tmp_path / "poc" / "pid").read_text())
    process, children = psutil.Process(pid), psutil.Process(pid).children()
    children[0].kill()
    assert psutil.wait_procs([process, *children], timeout=30)[1] == []
    assert "was killed by SIGKILL" in (tmp_path / "poc" / "federation.log").read_text()
    assert hanse("poc", "status", "--json", cwd=tmp_path).stdout == '{"running": false}\n'


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sites", "0"], "--sites is 0"),
        (["--sites", "a,a"], "taken by"),
        (["--sites", "Bad Homburg"], "Bad Homburg"),
        (["--policy", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=str,
)
def test_wrong_input(hanse: Hanse, tmp_path: Path, arguments: list[str], says: str) -> None:
    done = hanse("poc", "start", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert not (tmp_path / "poc").exists()
