"""A job as a folder: `job.yaml` (or .toml, or .json), the code, and the first model. What is written is all that running it needs."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import sys
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import blake3
import msgspec
import yaml

from hanse.errors import ConfigError
from hanse.messages.codec import write
from hanse.messages.flmodel import FLModel

FORMAT = 1
CODE = "code"
MODEL = "model.safetensors"
_VERSIONED = ("hanse", "numpy", "torch", "scikit-learn")
_importing: list[Path] = []
_PARSERS: Mapping[str, Callable[[str], Any]] = {".yaml": yaml.safe_load, ".json": json.loads, ".toml": tomllib.loads}


class CodeName(msgspec.Struct, forbid_unknown_fields=True):
    """Something in the job's code: a file below `code`, and the name it has there."""

    file: str
    name: str


class JobFile(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What `job.yaml` holds.

    recipe: the kind. arguments: the recipe's own. script or app: what the sites run. workflow: a workflow of the job's own.
    digests: BLAKE3 of each file; one that does not match is refused. versions: what the job was made with, for the record.
    """

    name: str
    recipe: str
    hanse: int = FORMAT
    arguments: dict[str, Any] = {}
    script: str | None = None
    argv: list[str] = []
    app: CodeName | None = None
    workflow: CodeName | None = None
    model: str | None = None
    framework: str | None = None
    config: dict[str, Any] = {}
    filters: dict[str, list[dict[str, Any]]] = {}
    seed: int = 0
    versions: dict[str, str] = {}
    digests: dict[str, str] = {}


class Sources:
    """The files and folders that become a job's `code`."""

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}

    def add(self, path: Path) -> str:
        """Take in a file or folder; returns its name below `code`. Raises ConfigError if another one has that name."""
        if self._paths.setdefault(path.name, path.resolve()) != path.resolve():
            raise ConfigError(f"two different pieces of code are called {path.name!r}: {self._paths[path.name]} and {path}")
        return path.name

    def add_definition(self, part: object, module: Mapping[str, Any], what: str) -> CodeName:
        """Take in the file that defines `part` at module level."""
        name = next((name for name, value in module.items() if value is part), None)
        file = module.get("__file__")
        if name is None or file is None:
            raise ConfigError(
                f"the {what} is defined in no file at module level: put it in a .py file, so that it can be written into a job folder"
            )
        return CodeName(self.add(Path(file)), name)

    def check_complete(self) -> None:
        """Raises ConfigError if a file of the code imports one that lies beside it and is not among the code: elsewhere it would be missed.

        What only a file's own `if __name__ == "__main__":` imports is not run elsewhere, and what a `try` imports may be missing.
        """
        for path in self._paths.values():
            beside = [found for name in _imported(path) if (found := _beside(path, name)) is not None]
            if missing := sorted({str(found) for found in beside if found.name not in self._paths}):
                raise ConfigError(f"{path.name} imports what lies beside it and is not in the job. Name it in the recipe: code={missing}")

    def copy_to(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, path in self._paths.items():
            if path.is_dir():
                shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(path, folder / name)


def _imported(path: Path) -> Iterator[str]:
    """The top-level names of the modules that a Python file imports by their full names."""
    try:
        left: list[ast.AST] = [ast.parse(path.read_bytes())] if path.is_file() and path.suffix == ".py" else []
    except (SyntaxError, ValueError):
        return  # who imports it will say so
    while left:
        match left.pop():
            case ast.Try() | ast.TryStar() | ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
                pass
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case node:
                left += ast.iter_child_nodes(node)


def _beside(path: Path, name: str) -> Path | None:
    """The file or folder beside `path` that `import name` there means; None if there is none, or it means another one."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    for found, file in ((path.parent / name, path.parent / name / "__init__.py"), (path.parent / f"{name}.py",) * 2):
        if file.is_file() and (loaded is None or Path(loaded).resolve() == file.resolve()):
            return found
    return None


def write_folder(folder: Path, job: JobFile, sources: Sources, model: FLModel, *, format: str = "yaml") -> None:
    """Write the job folder, which must not exist yet or be empty; `job` gets the model's place and the digests."""
    if format not in ("yaml", "json"):
        raise ConfigError(f"format is {format!r}: a job is written as yaml or json")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: a job is written to a folder of its own")
    sources.check_complete()
    sources.copy_to(folder / CODE)
    if model.params is not None:
        write(folder / MODEL, model)
        job.model = MODEL
    job.digests = digests(folder)
    plain = msgspec.to_builtins(job)
    text = json.dumps(plain, indent=2) if format == "json" else yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    (folder / f"job.{format}").write_text(text)


def read_folder(folder: Path, *, may_lack: Container[str] = ()) -> JobFile:
    """What a job folder says, its digests checked. Raises ConfigError, naming the file and the place in it, if something is wrong.

    may_lack: files that need not be there, such as the first model at a site.
    """
    path = job_file(folder)
    try:
        job = msgspec.convert(read_mapping(path), JobFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
    if job.hanse != FORMAT:
        raise ConfigError(f"{path} is of format {job.hanse}; this version of Hanse reads {FORMAT}")
    for name, expected in job.digests.items():
        file = below(folder, name)
        if name in may_lack and not file.exists():
            continue
        if not file.is_file() or digest(file) != expected:
            raise ConfigError(
                f"{file} is missing, or not what was exported; if you changed it on purpose, take it out of `digests` in {path.name}"
            )
    return job


def read_mapping(path: Path) -> dict[str, Any]:
    """What a .yaml, .toml or .json file maps names to. Raises ConfigError, naming the place, if it does not."""
    if path.suffix not in _PARSERS:
        raise ConfigError(f"{path} is none of {', '.join(_PARSERS)}")
    try:
        mapping = _PARSERS[path.suffix](path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:  # the errors of json and tomllib are ValueErrors
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path} holds a {type(mapping).__name__}: it must map names to values")
    return mapping


def job_file(folder: Path) -> Path:
    """The folder's job.yaml, job.toml or job.json. Raises ConfigError if there is not exactly one."""
    found = [path for suffix in _PARSERS if (path := folder / f"job{suffix}").is_file()]
    if len(found) != 1:
        raise ConfigError(f"{folder} is no job folder: it must hold one of job.yaml, job.toml and job.json, and has {len(found)}")
    return found[0]


def below(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`. Raises ConfigError if it leads out of it."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ConfigError(f"the job names {name!r}, which lies outside its folder")
    return path


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file in a folder, by its path there."""
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def digest(path: Path) -> str:
    """BLAKE3 of a file, as `blake3:` and 64 hexadecimal digits."""
    return f"blake3:{blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path).hexdigest()}"


def versions() -> dict[str, str]:
    """Of Python and of what decides a result's bits, where it is installed."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def import_name(code: Path, where: CodeName) -> Any:
    """What the job's own code calls by that name. Raises ConfigError if it is not there."""
    module = _import_file(below(code, where.file))
    if not hasattr(module, where.name):
        raise ConfigError(f"{code / where.file} has nothing called {where.name!r}")
    return getattr(module, where.name)


def _import_file(path: Path) -> ModuleType:
    """The job's own code, imported under a name of its own; its folder is put on the path, so that files import their neighbours."""
    name = f"hanse_job_{blake3.blake3(str(path).encode()).hexdigest(8)}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{path} is no Python file")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    _importing.append(path)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        _importing.pop()
    return module


def check_not_importing() -> None:
    """Raises ConfigError while a job's code is being imported: a file that runs its own job then would do so without end."""
    if _importing:
        name = _importing[-1].name
        raise ConfigError(f'{name} runs a job when it is imported: put that part under `if __name__ == "__main__":`, below the app')
