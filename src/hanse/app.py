"""The function form of training code: an `App` whose functions take the model and the site, and return an answer.

app = App()

@app.train
def train(model: FLModel, site: Site) -> FLModel:
    ...
    return FLModel(params=new_params, metrics={"loss": loss}, meta={"examples": len(data)})

@app.evaluate
def evaluate(model: FLModel, site: Site) -> dict[str, float]:
    return {"accuracy": accuracy}
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import numpy as np

from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.task import EVALUATE, TRAIN
from hanse.messages.update import Record
from hanse.seeds import generator

MAX_STATE_BYTES = 1 << 20
"""How much a site's `state` may hold: bytes of its arrays, and of the rest as JSON."""


@dataclass
class Site:
    """A site as a function sees it while it does one task.

    rank counts from 0 among the job's `count` sites; config holds JSON values, the task's laid over the site's.
    state lasts across rounds: JSON values and arrays under names, at most 1 MiB. A task that fails leaves it as it was.
    """

    name: str
    rank: int
    count: int
    job_id: str
    config: Mapping[str, Any]
    state: dict[str, Any]
    seed: int
    stream: tuple[object, ...]  # what spells out the site's and the task's own stream of random numbers
    records: list[Record] = field(default_factory=list)

    @cached_property
    def rng(self) -> np.random.Generator:
        """Random numbers of this site and task alone: the same when the task is run again."""
        return generator(self.seed, *self.stream)

    def log(self, key: str, value: float | str, step: int | None = None) -> None:
        """Send a number or a text to the server, with the answer."""
        if isinstance(value, str):
            self.records.append(Record(key, value, step, "text"))
            return
        try:
            self.records.append(Record(key, float(value), step))
        except (TypeError, ValueError):
            raise ConfigError(f"log({key!r}): a {type(value).__name__} is neither a number nor a text") from None


Handler: TypeAlias = Callable[[FLModel, Site], FLModel | Mapping[str, float]]
H = TypeVar("H", bound=Handler)


class App:
    """Training code as functions, one a task name."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def train(self, function: H) -> H:
        """Decorate the function that trains: `(model, site) -> FLModel`."""
        return self.task(TRAIN)(function)

    def evaluate(self, function: H) -> H:
        """Decorate the function that evaluates: `(model, site) -> FLModel`, or a plain dictionary of metrics."""
        return self.task(EVALUATE)(function)

    def task(self, name: str) -> Callable[[H], H]:
        """Decorate the function for the tasks of that name: `(model, site) -> FLModel`."""
        if not name or callable(name):  # @app.task without parentheses
            raise ConfigError(f"@app.task needs the task's name, as in @app.task('describe'); it got {name!r}")

        def register(function: H) -> H:
            if name in self._handlers:
                raise ConfigError(f"task {name!r} has a function already, {self._handlers[name].__qualname__}: one function a task")
            try:
                inspect.signature(function).bind(None, None)
            except TypeError:
                raise ConfigError(f"{function.__qualname__}{inspect.signature(function)} must take (model, site)") from None
            self._handlers[name] = function
            return function

        return register

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks there is a function for."""
        return tuple(self._handlers)

    @property
    def module(self) -> Mapping[str, Any]:
        """The names of the module that the functions are defined in; empty without functions."""
        return next((getattr(handler, "__globals__", {}) for handler in self._handlers.values()), {})

    def handles(self, task_name: str) -> bool:
        """Whether there is a function for tasks of that name."""
        return task_name in self._handlers

    def run(self, task_name: str, model: FLModel, site: Site) -> FLModel:
        """Call the function for `task_name`. Raises ConfigError if there is none or if what it returns is no answer."""
        if not self.handles(task_name):
            raise ConfigError(
                f"the app has no function for task {task_name!r}; it has {', '.join(map(repr, self.tasks)) or 'none'}.",
                hint=f"Add one with @app.{task_name}." if task_name in (TRAIN, EVALUATE) else f"Add one with @app.task({task_name!r}).",
            )
        function = self._handlers[task_name]
        answer = function(model, site)
        if isinstance(answer, FLModel):
            return answer
        if task_name == EVALUATE and isinstance(answer, Mapping):
            return FLModel(metrics=answer)
        wanted = "an FLModel or a dictionary of metrics" if task_name == EVALUATE else "an FLModel"
        raise ConfigError(f"{function.__qualname__} returned a {type(answer).__name__}: a function for task {task_name!r} returns {wanted}")
