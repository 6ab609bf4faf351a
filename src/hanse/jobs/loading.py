"""From a job folder back to the recipe it was written from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hanse.errors import ConfigError
from hanse.filters import Filters
from hanse.jobs.bundle import CODE, below, import_name, job_file, read_folder
from hanse.jobs.parts import kinds, part_of
from hanse.jobs.recipe import Recipe


def read_job(folder: Path | str) -> Recipe:
    """The recipe in a job folder; its code is imported. Raises ConfigError, naming the file and the place in it, if something is wrong."""
    folder = Path(folder).resolve()
    job = read_folder(folder)
    if job.recipe not in kinds("recipes"):
        raise ConfigError(f"{job_file(folder)}: no recipe {job.recipe!r}; there are: {', '.join(sorted(kinds('recipes')))}")
    code = folder / CODE
    named = {
        "script": None if job.script is None else below(code, job.script),
        "app": None if job.app is None else import_name(code, job.app),
        "run": None if job.workflow is None else import_name(code, job.workflow),
        "model": None if job.model is None else below(folder, job.model),
    }
    kind = kinds("recipes")[job.recipe]
    if unknown := job.arguments.keys() - inspect.signature(kind).parameters.keys():
        known = ", ".join(name for name in inspect.signature(kind).parameters)
        raise ConfigError(f"{job_file(folder)}: recipe {job.recipe} has no argument {min(unknown)!r}; it has {known}")
    try:
        recipe = kind(
            name=job.name,
            argv=tuple(job.argv),
            code=tuple(path for path in sorted(code.iterdir()) if path.name != "__pycache__"),
            config=job.config,
            framework=job.framework,
            filters=Filters(**{edge: tuple(part_of("filters", part) for part in parts) for edge, parts in job.filters.items()}),
            seed=job.seed,
            **{name: _part(value) for name, value in job.arguments.items()},
            **{name: value for name, value in named.items() if value is not None},
        )
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{job_file(folder)}: {error}") from error
    assert isinstance(recipe, Recipe)
    return recipe


def _part(value: Any) -> Any:
    if not (isinstance(value, Mapping) and {"part", "kind"} <= value.keys()):
        return value
    return part_of(str(value["part"]), {name: inner for name, inner in value.items() if name != "part"})
