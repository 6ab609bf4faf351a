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


HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import hanse, importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {package!r} else found(name, package)
try:
    {code}
except hanse.HanseError as error:
    print(type(error).__name__, error)
"""
JOB = "app = hanse.App(); app.train(lambda model, site: model); hanse.FedAvgRecipe(name='a', app=app, rounds=1, framework='torch')"


@pytest.mark.parametrize(
    ("package", "code", "says"),
    [
        ("grpc", "hanse.PocEnv", "PocEnv needs the package 'grpc'. Install it with: pip install 'hanse[server]'"),
        ("grpc", "hanse.ProdEnv", "ProdEnv needs the package 'grpc'. Install it with: pip install 'hanse[site]'"),
        (
            "sqlalchemy",
            "hanse.PocEnv(num_clients=2)",
            "PocEnv needs the package 'sqlalchemy'. Install it with: pip install 'hanse[server]'",
        ),
        ("torch", JOB, "framework 'torch' needs the package 'torch', which is not installed here."),
    ],
)
def test_a_package_that_is_missing_is_named_with_what_brings_it(package: str, code: str, says: str) -> None:
    code = HIDDEN.format(package=package, code=code)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == f"NotInstalled {says}\n", result.stderr


def test_this_test_can_fail() -> None:
    assert "sklearn" in loaded_by("sklearn") & HEAVY
