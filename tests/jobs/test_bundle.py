from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
import tomli_w
import yaml

from hanse.errors import ConfigError
from hanse.jobs.bundle import CodeName, JobFile, Sources, below, digest, digests, import_name, read_folder, versions, write_folder
from hanse.messages.codec import read
from hanse.messages.flmodel import FLModel

MODEL = FLModel({"w": np.arange(3.0)})
WRITERS: dict[str, Callable[[Any], str]] = {"yaml": yaml.safe_dump, "toml": tomli_w.dumps, "json": json.dumps}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder written with a script, a package and a model."""
    (tmp_path / "train.py").write_text("import net\n")
    (tmp_path / "net" / "__pycache__").mkdir(parents=True)
    (tmp_path / "net" / "__init__.py").write_text("SIZE = 3\n")
    (tmp_path / "net" / "__pycache__" / "x.pyc").write_bytes(b"")
    sources = Sources()
    assert sources.add(tmp_path / "train.py") == sources.add(tmp_path / "net" / ".." / "train.py") == "train.py"
    assert sources.add(tmp_path / "net") == "net"
    folder = tmp_path / "job"
    write_folder(folder, JobFile(name="digits", recipe="fedavg", arguments={"rounds": 2}, script="train.py", seed=7), sources, MODEL)
    return folder


def test_a_folder_holds_all_that_the_job_needs(job: Path) -> None:
    files = {path.relative_to(job).as_posix() for path in job.rglob("*") if path.is_file()}
    assert files == {"job.yaml", "model.safetensors", "code/train.py", "code/net/__init__.py"}
    assert read(job / "model.safetensors")[0].params["w"].tolist() == [0, 1, 2]
    found = read_folder(job)
    assert (found.name, found.recipe, found.arguments, found.script, found.seed) == ("digits", "fedavg", {"rounds": 2}, "train.py", 7)
    assert found.model == "model.safetensors"
    assert found.digests == {name: digest(job / name) for name in files - {"job.yaml"}}
    assert digest(job / "code/train.py") == "blake3:" + blake3.blake3(b"import net\n").hexdigest()
    assert list(yaml.safe_load((job / "job.yaml").read_text())) == ["name", "recipe", "arguments", "script", "model", "seed", "digests"]


def test_it_may_be_written_as_json_and_without_a_model(tmp_path: Path) -> None:
    write_folder(tmp_path / "job", JobFile(name="é", recipe="fedavg"), Sources(), FLModel(), format="json")
    assert digests(tmp_path / "job").keys() == {"job.json"}
    assert read_folder(tmp_path / "job") == JobFile(name="é", recipe="fedavg")


def test_a_folder_of_its_own(job: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty: a job is written to a folder of its own"):
        write_folder(job, JobFile(name="a", recipe="fedavg"), Sources(), MODEL)
    with pytest.raises(ConfigError, match="format is 'toml'"):
        write_folder(job / "new", JobFile(name="a", recipe="fedavg"), Sources(), MODEL, format="toml")
    assert not (job / "new").exists()


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_says_the_same(tmp_path: Path, format: str) -> None:
    says = {
        "name": "a",
        "recipe": "fedopt",
        "arguments": {"rounds": 3, "server_optimizer": {"part": "server_optimizers", "kind": "yogi", "learning_rate": 0.05}},
        "app": {"file": "job.py", "name": "app"},
        "config": {"lr": 0.1, "deep": {"list": [1, "ü", True]}},
        "filters": {"site_out": [{"kind": "clip_norm", "max_norm": 1.0}]},
    }
    (tmp_path / f"job.{format}").write_text(WRITERS[format](says), encoding="utf-8")
    assert read_folder(tmp_path) == JobFile(**{**says, "app": CodeName("job.py", "app")})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("job.yaml", "name: a\nrecipe: fedavg\nround: 3", "job.yaml: Object contains unknown field `round`"),
        ("job.yaml", "name: a", "job.yaml: Object missing required field `recipe`"),
        ("job.yaml", "name: a\nrecipe: fedavg\nseed: high", r"job.yaml: Expected `int`, got `str` - at `\$.seed`"),
        ("job.yaml", "name: a\nrecipe: fedavg\napp: {file: job.py}", r"missing required field `name` - at `\$.app`"),
        ("job.yaml", "name: [", "job.yaml: while parsing"),
        ("job.yaml", "!!python/object:os.system {}", "could not determine a constructor"),
        ("job.yaml", "", "job.yaml holds a NoneType: it must map names to values"),
        ("job.json", "{", "job.json: Expecting"),
        ("job.toml", "name = ", "job.toml: Invalid value"),
        ("job.yaml", "name: a\nrecipe: fedavg\nhanse: 2", "is of format 2; this version of Hanse reads 1"),
        ("job.txt", "", "must hold one of job.yaml, job.toml and job.json, and has 0"),
    ],
)
def test_what_is_no_job_file(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_folder(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"job.yaml: 'utf-8' codec"):
        read_folder(tmp_path)


def test_two_job_files_are_one_too_many(job: Path) -> None:
    (job / "job.json").write_text("{}")
    with pytest.raises(ConfigError, match="and has 2"):
        read_folder(job)


@pytest.mark.parametrize("name", ["code/train.py", "code/net/__init__.py", "model.safetensors"])
def test_a_file_that_is_not_what_was_exported(job: Path, name: str) -> None:
    content = (job / name).read_bytes()
    (job / name).write_bytes(content + b"\n")
    with pytest.raises(ConfigError, match=f"{name} is missing, or not what was exported; if you changed it on purpose"):
        read_folder(job)
    (job / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        read_folder(job)
    (job / name).write_bytes(content)
    read_folder(job)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "code/../../secret.txt", "link/secret.txt"])
def test_no_path_leads_out_of_the_folder(job: Path, name: str) -> None:
    secret = job.parent / "secret.txt"
    secret.write_text("mine")
    (job / "link").symlink_to(job.parent)
    with pytest.raises(ConfigError, match="lies outside its folder"):
        below(job, name)
    text = (job / "job.yaml").read_text()
    (job / "job.yaml").write_text(text.replace("code/train.py:", f"{name}:"))
    with pytest.raises(ConfigError, match="lies outside its folder"):
        read_folder(job)


def test_two_pieces_of_code_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.py").touch()
    sources = Sources()
    sources.add(tmp_path / "a" / "train.py")
    with pytest.raises(ConfigError, match=r"two different pieces of code are called 'train.py': .*/a/train.py and .*/b/train.py"):
        sources.add(tmp_path / "b" / "train.py")


def test_code_that_lies_beside_and_is_not_in_the_job(tmp_path: Path) -> None:
    for name in ("network", "data", "plots", "faster", "json"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "__init__.py").touch()
    main = tmp_path / "main.py"
    main.write_text(
        "import json, numpy, network\nfrom layers.deep import Layer\ntry:\n    import faster\nexcept ImportError:\n    faster = None\n"
        "def train():\n    from data import digits\nif __name__ == '__main__':\n    import plots\n"
    )
    sources = Sources()
    sources.add(main)
    missing = [str(tmp_path / name) for name in ("data.py", "layers", "network.py")]
    says = re.escape(f"main.py imports what lies beside it and is not in the job. Name it in the recipe: code={missing}")
    with pytest.raises(ConfigError, match=says):
        write_folder(tmp_path / "job", JobFile(name="a", recipe="fedavg"), sources, MODEL)
    assert not (tmp_path / "job").exists()
    for name in ("data.py", "layers", "network.py"):
        sources.add(tmp_path / name)
    write_folder(tmp_path / "job", JobFile(name="a", recipe="fedavg"), sources, MODEL)


def test_a_definition_is_known_by_its_file_and_name(tmp_path: Path) -> None:
    part, sources = object(), Sources()
    (tmp_path / "job.py").touch()
    module = {"__file__": str(tmp_path / "job.py"), "other": 1, "app": part}
    assert sources.add_definition(part, module, "app") == CodeName("job.py", "app")
    for missing in ({"__file__": "job.py"}, {"app": part}):
        with pytest.raises(ConfigError, match=r"the app is defined in no file at module level: put it in a \.py file"):
            sources.add_definition(part, missing, "app")


def test_code_is_imported_once_with_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_main.py").write_text("VALUE = 42\n")
    (tmp_path / "main.py").write_text("from neighbour_of_main import VALUE\nfirst = object()\n")
    assert import_name(tmp_path, CodeName("main.py", "VALUE")) == 42
    first = import_name(tmp_path, CodeName("main.py", "first"))
    assert import_name(tmp_path, CodeName("main.py", "first")) is first
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "name", "says"),
    [
        ("main.py", "missing", "main.py has nothing called 'missing'"),
        ("other.py", "app", "other.py is no Python file"),
        ("notes.txt", "app", "notes.txt is no Python file"),
        ("../main.py", "app", "lies outside its folder"),
    ],
)
def test_code_that_is_not_there(tmp_path: Path, file: str, name: str, says: str) -> None:
    (tmp_path / "code").mkdir()
    for path in ("code/main.py", "main.py", "code/notes.txt"):
        (tmp_path / path).write_text("app = 1\n")
    with pytest.raises(ConfigError, match=says):
        import_name(tmp_path / "code", CodeName(file, name))
    sys.path[:] = [path for path in sys.path if not path.startswith(str(tmp_path))]


def test_code_that_raises_can_be_mended(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("app = 1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            import_name(tmp_path, CodeName("main.py", "app"))
    (tmp_path / "main.py").write_text("app = 100 / 10\n")
    assert import_name(tmp_path, CodeName("main.py", "app")) == 10
    sys.path.remove(str(tmp_path))


def test_versions() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert "hanse" in found
