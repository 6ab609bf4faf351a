"""No pickle, anywhere, ever; no code made from data. The linter says so too; this reads the syntax tree, so no `noqa` gets by."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("src", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

BANNED_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "copyreg", "jsonpickle"}
PICKLES_WHAT_IT_PASSES = {"multiprocessing", "concurrent.futures.process"}  # queues, pipes and arguments of processes
PICKLES_NOTHING = {"multiprocessing.shared_memory", "multiprocessing.resource_tracker"}
BANNED_CALLS = {
    "eval": "runs data as code",
    "exec": "runs data as code",
    "builtins.eval": "runs data as code",
    "builtins.exec": "runs data as code",
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "joblib.load": "unpickles",
    "joblib.dump": "pickles",
    "pandas.read_pickle": "unpickles",
    "concurrent.futures.ProcessPoolExecutor": "pickles what it passes",
    "yaml.unsafe_load": "makes objects from data",
    "yaml.full_load": "makes objects from data",
}
SAFE_YAML_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}

# Path to what it may call, with the reason. Add a line only with a reason that holds for a hospital's auditor.
ALLOWED = {
    "src/hanse/site/script.py": {"exec"},  # runs the training script itself: code that the site has chosen to run
}


def full_names(tree: ast.AST) -> dict[str, str]:
    """Local names to the dotted names that they were imported from."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def bans_module(module: str) -> bool:
    def within(packages: set[str]) -> bool:
        return any(module == package or module.startswith(package + ".") for package in packages)

    return within(BANNED_MODULES) or (within(PICKLES_WHAT_IT_PASSES) and not within(PICKLES_NOTHING))


def offences(source: str, allowed: frozenset[str] | set[str] = frozenset()) -> Iterator[str]:
    """Each forbidden import or call in `source`, as `line: what and why`."""
    tree = ast.parse(source)
    names = full_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if bans_module(alias.name):
                    yield f"{node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if bans_module(name) or name in BANNED_CALLS:
                    yield f"{node.lineno}: from {node.module} import {alias.name}"
        elif isinstance(node, ast.Call):
            head, dot, rest = ast.unparse(node.func).partition(".")
            name = names.get(head, head) + dot + rest
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in BANNED_CALLS and name not in allowed:
                yield f"{node.lineno}: {name} {BANNED_CALLS[name]}"
            elif name in {"yaml.load", "yaml.load_all"}:
                loader = given.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
                head, dot, rest = (ast.unparse(loader) if loader else "").partition(".")
                if names.get(head, head) + dot + rest not in SAFE_YAML_LOADERS:
                    yield f"{node.lineno}: {name} without SafeLoader makes objects from data"
            elif "allow_pickle" in given and ast.unparse(given["allow_pickle"]) != "False":
                yield f"{node.lineno}: {name} with allow_pickle"
            elif name == "numpy.save" and "allow_pickle" not in given:
                yield f"{node.lineno}: numpy.save pickles objects unless allow_pickle=False"
            elif name == "numpy.load" and len(node.args) > 2:
                yield f"{node.lineno}: numpy.load: name its arguments"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_and_no_code_from_data(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert [f"{name}:{offence}" for offence in offences(path.read_text("utf-8"), ALLOWED.get(name, set()))] == []


def test_every_exception_is_still_needed() -> None:
    for name, calls in ALLOWED.items():
        found = " ".join(offences((ROOT / name).read_text("utf-8")))
        assert all(f" {call} " in found for call in calls), f"{name} needs its exception no more: {calls}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import cloudpickle",
        "import multiprocessing",
        "from multiprocessing import Queue",
        "from concurrent.futures import ProcessPoolExecutor",
        "eval('1')",
        "exec('1')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.save('x', a)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "import yaml\nyaml.load(text, yaml.Loader)",
    ],
)
def test_what_is_found(source: str) -> None:
    assert len(list(offences(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from multiprocessing.shared_memory import SharedMemory",
        "from multiprocessing import shared_memory",
        "model.eval()",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.CSafeLoader)",
        "from yaml import SafeLoader, load\nload(text, SafeLoader)",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.save('x', a, allow_pickle=False)",
    ],
)
def test_what_is_let_be(source: str) -> None:
    assert list(offences(source)) == []
