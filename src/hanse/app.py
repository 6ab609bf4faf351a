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
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.task import EVALUATE, TRAIN
from hanse.messages.update import Record
from hanse.seeds import generator

MAX_STATE_BYTES = 1 << 20
"""How much a site's `state` may hold besides its arrays: bytes, as JSON."""
MAX_STATE_ARRAY_BYTES = 256 << 20
"""How much the arrays in a site's `state` may hold together: a control variate or a model of 64 million float32 numbers, say."""


@dataclass
class Site:
    """A site as a function sees it while it does one task.

    rank counts from 0 among the job's `count` sites; config holds JSON values, the task's laid over the site's.
    state lasts across rounds: arrays of at most 256 MiB and JSON values of at most 1 MiB, under names. A task that fails leaves it as it
    was.
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


@dataclass(frozen=True, slots=True)
class Stack:
    """What several sites made of one task at once. S = sites.

    rows: which of the sites that were given. params: names to tensors, float, shape (S, …); metrics and meta: names to S numbers.
    """

    rows: Sequence[int]
    params: Mapping[str, Any]
    metrics: Mapping[str, Sequence[float]]
    meta: Mapping[str, Sequence[int]]


@runtime_checkable
class Together(Protocol):
    """A function that can also do its task for many sites at once, as a simulation has them."""

    def stacks(self) -> bool:
        """Whether it is quicker that way."""

    def together(self, model: FLModel, sites: Iterable[Site]) -> Iterator[Stack]:
        """Do the task for many sites that have no state, as stacks of some of them. What each makes is what it would have made by itself,
        but for rounding. Sites that are left out, such as one that fails, are then run one by one."""

    def __call__(self, model: FLModel, site: Site) -> FLModel:
        """Do the task for one site."""


Handler: TypeAlias = Callable[[FLModel, Site], FLModel | Mapping[str, float]]
H = TypeVar("H", bound=Handler)


class App:
    """Training code as functions, one a task name."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._made_in: Mapping[str, Any] = sys._getframe(1).f_globals

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
                raise ConfigError(f"task {name!r} has a function already, {_called(self._handlers[name])}: one function a task")
            try:
                inspect.signature(function).bind(None, None)
            except TypeError:
                raise ConfigError(f"{_called(function)}{inspect.signature(function)} must take (model, site)") from None
            self._handlers[name] = function
            return function

        return register

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks there is a function for."""
        return tuple(self._handlers)

    @property
    def module(self) -> Mapping[str, Any]:
        """The names of the first module, of those the functions are defined in and the one that made the app, which has it by name; if none
        has, of the first of them."""
        made_of = map(inspect.unwrap, self._handlers.values())
        homes = [*(function.__globals__ for function in made_of if hasattr(function, "__globals__")), self._made_in]
        return next((home for home in homes if any(value is self for value in home.values())), homes[0])

    def handles(self, task_name: str) -> bool:
        """Whether there is a function for tasks of that name."""
        return task_name in self._handlers

    def together(self, task_name: str) -> Together | None:
        """The function for tasks of that name, if it can do them for many sites at once and that is quicker."""
        handler = self._handlers.get(task_name)
        return handler if isinstance(handler, Together) and handler.stacks() else None

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
        raise ConfigError(
            f"{_called(function)} returned a {type(answer).__name__}: a function for task {task_name!r} returns {wanted}.",
            hint="Such as FLModel(params=net.state_dict(), meta={'examples': 120})." if task_name == TRAIN else "",
        )


def _called(function: Handler) -> str:
    """What a function is called in messages."""
    return str(getattr(function, "__qualname__", type(function).__name__))
