"""What an import brings along, seen from a fresh process: the core is light, and a site runs nothing of the server."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMEWORKS = {"torch", "sklearn", "scipy", "pandas", "tensorflow", "jax", "xgboost", "lightning", "transformers"}
HEAVY = FRAMEWORKS | {"grpc", "sqlalchemy", "jinja2", "pydantic", "ray", "mlflow", "matplotlib"}
SERVER_SIDE = {"server", "workflows", "jobs", "simulation", "environments", "finetuning", "dashboard", "cli"}
BEYOND_A_SITE = {f"hanse.{part}" for part in SERVER_SIDE}


def loaded_by(module: str) -> set[str]:
    """Every module, and every package above it, that a fresh Python has after `import module`."""
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["hanse", "hanse.client", "hanse.client.tracking", "hanse.app", "hanse.site"])
def test_import_is_light(module: str) -> None:
    assert loaded_by(module) & HEAVY == set()


@pytest.mark.parametrize("module", ["hanse.client", "hanse.app"])
def test_training_code_brings_no_runtime(module: str) -> None:
    assert loaded_by(module) & (BEYOND_A_SITE | {"hanse.transport", "hanse.cohort"}) == set()


@pytest.mark.parametrize("module", ["hanse.site", "hanse.site.runner", "hanse.site.script"])
def test_a_site_runs_nothing_of_the_server(module: str) -> None:
    assert loaded_by(module) & BEYOND_A_SITE == set()


def test_this_test_can_fail() -> None:
    assert "sklearn" in loaded_by("sklearn") & HEAVY
