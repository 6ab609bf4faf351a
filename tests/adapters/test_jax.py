"""JAX's first array starts threads, after which this process could fork no simulated sites: so its tests run in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")


def test_in_a_process_of_its_own() -> None:
    tests = Path(__file__).with_name("jax_by_itself.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_importing_the_adapter_starts_no_threads() -> None:
    code = "import hanse.adapters.jax as a; a.ADAPTER.limit_threads(1); a.ADAPTER.preload(); print(a.ADAPTER.may_fork())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr
