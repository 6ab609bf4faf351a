"""A recipe: a Python object that describes a job, checked when it is made."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec

from hanse.app import App
from hanse.client.framework import load_adapter, params_of, to_arrays
from hanse.client.script import Script
from hanse.cohort import Cohort
from hanse.errors import ConfigError
from hanse.filters import Filters
from hanse.jobs.bundle import JobFile, Sources, check_not_importing, versions, write_folder
from hanse.jobs.parts import describe_part
from hanse.messages.codec import read
from hanse.messages.flmodel import FLModel
from hanse.messages.params import flatten

Workflow = Callable[[Cohort, FLModel], Awaitable[FLModel]]
R_co = TypeVar("R_co", covariant=True)


class Environment(Protocol[R_co]):
    """Where a recipe runs."""

    def execute(self, recipe: Recipe) -> R_co:
        """Run the job to its end. Raises JobFailed if it does not do what it was asked."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every job has. Raises ConfigError at once if something is wrong with it.

    name: of the job; letters, digits, - and _.
    model: the first model, taken by its parameters only: a `torch.nn.Module`, a fitted scikit-learn estimator, named arrays, an FLModel,
        the path of a `.safetensors` file, or None if the sites bring it. The parameters are read when the job is executed or exported.
    framework: whose tensors the sites get, such as "torch"; None: that of `model`, and arrays if it has none.
    app or script: what the sites run: an `App`, or the path of a script that uses `hanse.client`, with its arguments `argv`.
    code: further files and folders that the sites' code or the workflow imports; they are put beside it.
    config: JSON values that every site sees. filters: what happens at the four boundaries. seed: of all randomness in the job.
    """

    kind: ClassVar[str] = ""

    name: str
    model: Any = None
    framework: str | None = None
    app: App | None = None
    script: str | Path | None = None
    argv: Sequence[str] = ()
    code: Sequence[str | Path] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    filters: Filters = field(default_factory=Filters)
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"name is {self.name!r}: use letters, digits, - and _")
        if (self.app is None) == (self.script is None):
            raise ConfigError(f"recipe {self.name!r} must have what the sites run: either app=, an App, or script=, the path of a script")
        if self.app is not None and not isinstance(self.app, App):
            raise ConfigError(f"app is a {type(self.app).__name__}: it must be a hanse.App")
        for name, kind, example in (("argv", str, "['--epochs', '1']"), ("code", str | Path, "['net.py']")):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(each, kind) for each in value):
                raise ConfigError(f"{name} is {value!r}: give a list of strings, such as {example}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed is {self.seed!r}: it must be a whole number from 0")
        if not isinstance(self.filters, Filters):
            raise ConfigError(f"filters is {self.filters!r}: give Filters(...), which says at which edge each one stands")
        json_values("config", self.config)
        for path in self.code:
            if not Path(path).exists():
                raise ConfigError(f"code names {str(path)!r}, which does not exist")
        if self.script is not None:
            _compiles(self.script)
        if self.framework is not None:
            load_adapter(self.framework)
        self.first_model()

    def sites_run(self) -> App | Script:
        """The training code, as a site runs it."""
        if self.app is not None:
            return self.app
        return Script(Path(str(self.script)).resolve(), tuple(self.argv))

    def first_model(self) -> tuple[FLModel, str | None]:
        """The first model as named arrays, without a copy where memory allows, and the framework it came from."""
        model, framework = self.model, self.framework
        if isinstance(model, str | Path):
            if not Path(model).is_file():
                raise ConfigError(f"model names the file {str(model)!r}, which does not exist")
            model = read(Path(model))[0]
        about = model if isinstance(model, FLModel) else FLModel(model)
        params, found = about.params, None
        if about is not model or isinstance(params, Mapping):
            params, found = params_of(params)
        params = to_arrays(params)
        if params is not None:
            flatten(params)
        # Whatever it went through elsewhere, such as the rounds of another run, here it is at its beginning.
        return replace(about, params=params, metrics={}, current_round=None, total_rounds=None), framework or found

    def must_handle(self, *tasks: str) -> None:
        """Raises ConfigError if the app has no function for one of these tasks; what a script does shows only when it runs."""
        for task in tasks:
            if self.app is not None and not self.app.handles(task):
                raise ConfigError(f"recipe {self.name!r} needs an app with a function for {task!r}, and this one has none")

    def evaluates(self, wanted: bool | None) -> bool:
        """Whether sites are asked to evaluate each new model: by default, if the app can. A script does so only if it is said."""
        if wanted is not None and not isinstance(wanted, bool):
            raise ConfigError(f"recipe {self.name!r} has evaluate={wanted!r}: it must be True, False or None")
        if wanted:
            self.must_handle("evaluate")
        return (self.app is not None and self.app.handles("evaluate")) if wanted is None else wanted

    def workflow(self) -> Workflow:
        """The function that runs the job, with the recipe's arguments bound."""
        raise NotImplementedError(type(self).__name__)

    def check_sites(self, count: int) -> None:
        """Raises ConfigError if so many sites cannot do the job."""
        for name in ("sites_per_round", "min_updates"):
            wanted = getattr(self, name, None)
            if wanted is not None and wanted > count:
                raise ConfigError(f"recipe {self.name!r} has {name}={wanted}, and the number of sites is {count}")

    def total_rounds(self) -> int:
        """How many rounds the job has at most."""
        return int(getattr(self, "rounds", 1))

    def arguments_as_data(self) -> dict[str, Any]:
        """The recipe's own arguments as JSON values. Raises ConfigError for one that no job file can describe."""
        own = [field.name for field in fields(self) if field.name not in _COMMON and getattr(self, field.name) is not None]
        return {name: _as_data(name, getattr(self, name)) for name in own}

    def _add_code(self, sources: Sources, job: JobFile) -> None:
        if self.script is not None:
            job.script = sources.add(Path(self.script))
        if self.app is not None:
            job.app = sources.add_definition(self.app, self.app.module, "app")
        for extra in self.code:
            sources.add(Path(extra))

    def export(self, folder: str | Path, *, format: str = "yaml") -> Path:
        """Write the job folder that `hanse run` runs: job.yaml (or .json), the code, the first model. Returns it.

        Raises ConfigError if the folder is not empty, or the job cannot be written, such as one whose app is defined in no file.
        """
        model, framework = self.first_model()
        job = JobFile(
            name=self.name,
            recipe=self.kind,
            arguments=self.arguments_as_data(),
            argv=list(self.argv),
            framework=framework,
            config=dict(self.config),
            filters=_filters_as_data(self.filters),
            seed=self.seed,
            versions=versions(),
        )
        sources = Sources()
        self._add_code(sources, job)
        write_folder(Path(folder), job, sources, model, format=format)
        return Path(folder)

    def execute(self, env: Environment[R_co]) -> R_co:
        """Run the job in `env`, a SimEnv say, to its end. Raises JobFailed if it does not do what it was asked."""
        check_not_importing()
        return env.execute(self)


@dataclass(frozen=True, kw_only=True)
class WorkflowRecipe(Recipe):
    """A job with a workflow of your own: an async function `(cohort, model, **arguments) -> FLModel`.

    arguments: JSON values for the workflow; `rounds` among them tells how many rounds there are.
    """

    kind: ClassVar[str] = "workflow"

    run: Callable[..., Awaitable[FLModel]]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not inspect.iscoroutinefunction(self.run):
            raise ConfigError(f"run is {self.run!r}: it must be an async function (cohort, model, …)")
        json_values("arguments", self.arguments)
        try:
            inspect.signature(self.run).bind(None, None, **self.arguments)
        except TypeError as error:
            raise ConfigError(f"arguments do not fit {self.run.__name__}: {error}") from error

    def arguments_as_data(self) -> dict[str, Any]:
        return {"arguments": _as_data("arguments", self.arguments)}

    def _add_code(self, sources: Sources, job: JobFile) -> None:
        super()._add_code(sources, job)
        job.workflow = sources.add_definition(self.run, self.run.__globals__, "workflow")

    def workflow(self) -> Workflow:
        return lambda cohort, model: self.run(cohort, model, **self.arguments)

    def total_rounds(self) -> int:
        return int(self.arguments.get("rounds", 1))


def positive(recipe: Recipe, **values: float | None) -> None:
    """Raises ConfigError for the first value that is neither None nor above 0."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise ConfigError(f"recipe {recipe.name!r} has {name}={value!r}: it must be a number above 0")


def counts(recipe: Recipe, **values: int | None) -> None:
    """Raises ConfigError for the first value that is neither None nor a whole number above 0; `rounds` may not be None."""
    for name, value in values.items():
        if (value is None and name == "rounds") or (value is not None and (type(value) is not int or value < 1)):
            raise ConfigError(f"recipe {recipe.name!r} has {name}={value!r}: it must be a whole number above 0")


def part(recipe: Recipe, name: str, method: str) -> None:
    """Raises ConfigError if the recipe's field `name` is no object with that method."""
    value = getattr(recipe, name)
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        hint = f"Give an object of it: {value.__name__}(…)." if isinstance(value, type) else ""
        raise ConfigError(f"recipe {recipe.name!r} has {name}={value!r}: it must be an object with a method {method}.", hint=hint)


def json_values(name: str, values: Mapping[str, Any]) -> None:
    """Raises ConfigError if `values` does not map texts to JSON values."""
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{name} is {values!r:.80}: it must map names to JSON values")
    try:
        json.dumps(dict(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must hold JSON values only: {error}") from error


_COMMON = {field.name for field in fields(Recipe)}


def _as_data(name: str, value: Any) -> Any:
    for group in ("aggregators", "server_optimizers", "selections"):
        if (part := describe_part(group, value)) is not None:
            return {"part": group, **part}
    try:
        return msgspec.to_builtins(value)
    except TypeError as error:
        raise ConfigError(f"{name} is a {type(value).__name__}, which no job file can describe: register it as an entry point") from error


def _filters_as_data(filters: Filters) -> dict[str, list[dict[str, Any]]]:
    described: dict[str, list[dict[str, Any]]] = {}
    for edge in fields(filters):
        for part in getattr(filters, edge.name):
            if (description := describe_part("filters", part)) is None:
                raise ConfigError(f"the filter {type(part).__name__} is not registered: no job file can describe it")
            described.setdefault(edge.name, []).append(description)
    return described


def _compiles(script: str | Path) -> None:
    if not isinstance(script, str | Path) or not Path(script).is_file():
        raise ConfigError(f"script names {str(script)!r}, which does not exist")
    try:
        compile(Path(script).read_bytes(), str(script), "exec")
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"script {str(script)!r} is not valid Python: {error}") from error
