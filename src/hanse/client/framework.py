"""Where a framework's tensors meet arrays. Nothing of a framework is loaded until a value of it shows up.

An adapter is installed by an entry point in the group `hanse.adapters`, named after the framework's top-level module: a value whose class,
or one of its bases, comes from module `torch` is given to the adapter `torch`.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from hanse.errors import ConfigError, NotInstalled

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

GROUP = "hanse.adapters"


class Adapter(Protocol):
    """One framework's side of the border. An adapter that inherits from it says only what is its framework's own: by default arrays stay
    as they are, and there is nothing to seed, to limit, to import ahead or to put back."""

    name: str

    def params_of(self, model: Any) -> Mapping[str, Any] | None:
        """A model object's parameters, in the framework's tensors; None if it has none yet. Raises ConfigError if it is not a model."""

    def to_array(self, value: Any) -> Array:
        """A tensor as an array, sharing memory where that is possible. Raises ConfigError for a tensor that has no such form."""

    def from_array(self, array: Array) -> Any:
        """An array as a tensor. It shares the memory of an array that may be written, and copies one that is read-only."""
        return array

    def twin(self, tensor: Any) -> Any:
        """A tensor of the same numbers that may be written without changing `tensor`; copied no sooner than that, if the framework can."""
        return tensor

    def seed(self, seed: int) -> None:
        """Seed the framework's own generators; 0 ≤ seed < 2⁶⁴."""
        return None

    def limit_threads(self, threads: int) -> None:
        """Let the framework compute with at most so many threads in this process."""
        return None

    def may_fork(self) -> bool:
        """Whether a process forked from this one, as it is now, can use the framework: not if it has threads, which a fork loses."""
        return True

    def preload(self) -> None:
        """Import what training will need and the framework puts off, so that forked processes share it."""
        return None

    def thread_state(self) -> Any:
        """What the framework holds per thread and training code may leave changed while it waits, such as "no gradients"."""
        return None

    def set_thread_state(self, state: Any) -> None:
        """Put back what `thread_state` gave."""
        return None


def load_adapter(name: str) -> Adapter:
    """The adapter installed under `name`. Raises NotInstalled, naming those that are."""
    if name not in _installed().names:
        raise NotInstalled(f"no adapter {name!r}; installed: {', '.join(sorted(_installed().names)) or 'none'}.")
    return _load(name)


def adapter_for(value: object) -> Adapter | None:
    """The adapter of the framework that `value` belongs to, by the classes it is made of; None for NumPy's and Python's own."""
    return _adapter_of(type(value))  # type: ignore[arg-type]


def loaded() -> list[Adapter]:
    """The adapters of the frameworks that this process has imported."""
    return [_load(name) for name in _names() if name in sys.modules]


def may_fork() -> bool:
    """Whether a process forked from this one can use every framework that this one has imported."""
    return all(adapter.may_fork() for adapter in loaded())


def params_of(model: object) -> tuple[Any, str | None]:
    """A model's parameters and the name of its framework, None for plain arrays.

    model: a model object of an installed framework, arrays or tensors in a mapping, or in mappings, lists and tuples of each other, or
    None. The parameters are in the framework's tensors, sharing the model's memory.
    Raises ConfigError for anything else.
    """
    if model is None:
        return None, None
    if isinstance(model, Mapping | list | tuple) and adapter_for(model) is None:
        leaves: list[Any] = []
        map_leaves(leaves.append, model)
        found = {adapter.name for leaf in leaves if (adapter := adapter_for(leaf))}
        if len(found) > 1:
            raise ConfigError(f"the model mixes tensors of {' and '.join(sorted(found))}: use those of one framework")
        return dict(model) if isinstance(model, Mapping) else model, next(iter(found), None)
    if adapter := adapter_for(model):
        return adapter.params_of(model), adapter.name
    raise ConfigError(
        f"a {type(model).__module__}.{type(model).__name__} is no model: give named arrays or a model object of"
        f" {', '.join(sorted(_names())) or 'an installed framework'}"
    )


def to_arrays(params: Any) -> Any:
    """`params` with every framework's tensor as an array, without a copy where memory allows. Containers are new."""

    def array(leaf: Any) -> Any:
        adapter = adapter_for(leaf)
        return leaf if adapter is None else adapter.to_array(leaf)

    return map_leaves(array, params)


def from_arrays(params: Any, framework: str | None) -> Any:
    """`params` with every array as a tensor of `framework`, see `Adapter.from_array`; as it is if that is None. Containers are new."""
    if framework is None:
        return map_leaves(lambda leaf: leaf, params)
    adapter = load_adapter(framework)
    return map_leaves(lambda leaf: adapter.from_array(leaf) if isinstance(leaf, np.ndarray) else leaf, params)


def twins(params: Any, framework: str | None) -> Any:
    """`params` of `framework` with every tensor's `Adapter.twin`; arrays stay as they are. Containers are new."""
    if framework is None:
        return map_leaves(lambda leaf: leaf, params)
    adapter = load_adapter(framework)
    return map_leaves(lambda leaf: leaf if adapter_for(leaf) is None else adapter.twin(leaf), params)


def map_leaves(change: Callable[[Any], Any], params: Any) -> Any:
    """`params` with `change` done to whatever is not a mapping, list or tuple; new dictionaries, lists and tuples hold the outcome."""
    if isinstance(params, Mapping):
        return {name: map_leaves(change, leaf) for name, leaf in params.items()}
    if isinstance(params, list):
        return [map_leaves(change, leaf) for leaf in params]
    if isinstance(params, tuple):
        return tuple([map_leaves(change, leaf) for leaf in params])
    return change(params)


def number(value: object) -> int | float | None:
    """A plain Python number for a scalar of any framework, an array or tensor with one element; None for all else."""
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:
        value = value.item()
    return value if isinstance(value, bool | int | float) else None


def seed_all(seed: int) -> None:
    """Seed Python's `random`, NumPy's global generator and every framework this process has imported; 0 ≤ seed < 2⁶⁴."""
    for adapter in loaded():
        adapter.seed(seed)
    random.seed(seed)  # after them, since some seed more than their own
    np.random.seed((seed ^ seed >> 32) & 0xFFFFFFFF)  # it takes 32 bits


@lru_cache(maxsize=1)
def _installed() -> EntryPoints:
    from importlib.metadata import entry_points  # 15 ms that a script without a framework need not pay

    return entry_points(group=GROUP)


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    return tuple(sorted(_installed().names))  # a set: its order, in which they are seeded, is not the same in every process


@lru_cache
def _load(name: str) -> Adapter:
    [entry] = [entry for entry in _installed() if entry.name == name]
    try:
        adapter: Adapter = entry.load()
    except ModuleNotFoundError as error:
        raise NotInstalled(f"framework {name!r} needs the package {error.name!r}, which is not installed here.") from error
    return adapter


@lru_cache(maxsize=4096)
def _adapter_of(kind: type) -> Adapter | None:
    modules = [base.__module__.partition(".")[0] for base in kind.__mro__]
    own = next((module for module in modules if module not in ("builtins", "numpy", "collections") and module in _names()), None)
    return None if own is None else _load(own)
