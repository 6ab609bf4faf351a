"""Running an example as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hanse import Run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run_example(name: str, folder: Path, *arguments: str, data: Path | str = "/nowhere") -> str:
    """What it prints. It must exit with status 0 and say nothing on standard error."""
    environment = os.environ | {"HANSE_DATA": str(data), "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-4000:]
    return done.stdout


def finished(folder: Path, job: str) -> Run:
    """The run that the job in `folder` made; complete, with its report, and the last lines name both."""
    run = Run(folder / "runs" / f"{job}-001")
    assert run.get_status() == "completed"
    assert "<html" in (run.folder / "report.html").read_text("utf-8")
    assert run.events("failure") == []
    return run
