"""Filters: what happens to a model as it crosses an edge. They run in order, and change nothing but what they return.

There are four edges: the task leaves the server (`server_out`) and comes in at the site (`site_in`), the update leaves the site
(`site_out`) and comes in at the server (`server_in`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Protocol

import numpy as np

from hanse.aggregation.form import excluded_names
from hanse.compression.cast import cast, dtype_named, is_float
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import flatten, unflatten
from hanse.privacy.clipping import clip
from hanse.privacy.gaussian import add_gaussian_noise

Array = np.ndarray[Any, np.dtype[Any]]


class Filter(Protocol):
    """One step at an edge. A filter with settings is a frozen dataclass, so that a job file can name it."""

    def apply(self, model: FLModel, *, reference: FLModel, rng: Callable[[], np.random.Generator]) -> FLModel:
        """The model as it goes on. Never changes `model`; a model whose params are None passes.

        reference: the task's model as the site trained on it; for a task on its way down, the model itself.
        rng: the generator of this edge, site and task; ask for it only to draw.
        """


@dataclass(frozen=True)
class Exclude:
    """Leaves out every tensor whose flat name matches a pattern (`fnmatch`: `*`, `?`, `[…]`; case counts).

    Names left out, the reference's among them, are listed in `meta["excluded"]`, so that the mean knows they are not missing by
    mistake. What is left of nested params goes on as a flat mapping of flat names.
    """

    patterns: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.patterns, str) or not self.patterns or not all(self.patterns):
            raise ConfigError(f'patterns is {self.patterns!r}: it must be a list of one pattern or more, such as ["head.*"]')
        object.__setattr__(self, "patterns", tuple(self.patterns))

    def apply(self, model: FLModel, *, reference: FLModel, rng: Callable[[], np.random.Generator]) -> FLModel:
        if model.params is None:
            return model
        arrays, _ = flatten(model.params)
        expected = {} if reference.params is None else flatten(reference.params)[0]
        excluded = {name for name in (*arrays, *expected) if any(fnmatchcase(name, pattern) for pattern in self.patterns)}
        if not excluded:
            return model
        return replace(
            model,
            params={name: array for name, array in arrays.items() if name not in excluded},
            meta={**model.meta, "excluded": sorted(excluded | excluded_names(model, "Exclude"))},
        )


@dataclass(frozen=True)
class ClipNorm:
    """Scales the update's change down so that its L2 norm over all float tensors is at most `max_norm`.

    The change is a DIFF itself, or a FULL model minus the reference; FULL stays FULL. Integers, booleans, strings and bytes pass as
    they are: leave them out with `Exclude` if they may tell something.
    """

    max_norm: float

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < math.inf:
            raise ConfigError(f"max_norm is {self.max_norm!r}: it must be a finite number above 0")

    def apply(self, model: FLModel, *, reference: FLModel, rng: Callable[[], np.random.Generator]) -> FLModel:
        if model.params is None:
            return model
        if model.params_type is ParamsType.DIFF:
            return _with_floats(model, lambda floats: clip(floats, max_norm=self.max_norm))
        start = {} if reference.params is None else flatten(reference.params)[0]

        def clipped(floats: dict[str, Array]) -> dict[str, Array]:
            if unknown := [name for name, array in floats.items() if name not in start or start[name].shape != array.shape]:
                raise ConfigError(f"ClipNorm needs the change of tensor {unknown[0]!r}: the task's model has none of that name and shape")
            changes = {name: np.asarray(_wide(array) - _wide(start[name])) for name, array in floats.items()}
            shorter = clip(changes, max_norm=self.max_norm)
            if all(shorter[name] is changes[name] for name in changes):
                return floats
            return {name: np.asarray(_wide(start[name]) + shorter[name]).astype(array.dtype) for name, array in floats.items()}

        return _with_floats(model, clipped)


@dataclass(frozen=True)
class GaussianNoise:
    """Adds independent N(0, stddev²) noise to every element of every float tensor, in the order of the tensors' names."""

    stddev: float

    def __post_init__(self) -> None:
        if not 0 < self.stddev < math.inf:
            raise ConfigError(f"stddev is {self.stddev!r}: it must be a finite number above 0")

    def apply(self, model: FLModel, *, reference: FLModel, rng: Callable[[], np.random.Generator]) -> FLModel:
        def noisy(floats: dict[str, Array]) -> dict[str, Array]:
            generator = rng()
            return {name: add_gaussian_noise(floats[name], stddev=self.stddev, rng=generator) for name in sorted(floats)}

        return _with_floats(model, noisy)


@dataclass(frozen=True)
class CastTo:
    """Turns every float tensor to `dtype`: "float16" or "bfloat16" to send less, "float32" or "float64" on the other side to undo it.

    The undoing is needed only where code insists on the dtype: `WeightedMean` takes narrower floats than the model's.
    """

    dtype: str

    def __post_init__(self) -> None:
        dtype_named(self.dtype)

    def apply(self, model: FLModel, *, reference: FLModel, rng: Callable[[], np.random.Generator]) -> FLModel:
        return _with_floats(model, lambda floats: cast(floats, self.dtype))


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The filters of a job, or of a site's policy, at each of the four edges, in the order they run."""

    server_out: Sequence[Filter] = ()
    site_in: Sequence[Filter] = ()
    site_out: Sequence[Filter] = ()
    server_in: Sequence[Filter] = ()

    def __post_init__(self) -> None:
        for edge in ("server_out", "site_in", "site_out", "server_in"):
            filters = getattr(self, edge)
            if not isinstance(filters, Iterable) or not all(callable(getattr(each, "apply", None)) for each in filters):
                raise ConfigError(f"{edge} is {filters!r}: it must be a list of filters, such as [ClipNorm(1.0)]")
            object.__setattr__(self, edge, tuple(filters))


def apply(filters: Sequence[Filter], model: FLModel, *, reference: FLModel, rng: Callable[[], np.random.Generator]) -> FLModel:
    """`model` after all filters in order. They draw from one generator, made by `rng` when the first of them draws."""
    generator = cache(rng)
    for each in filters:
        model = each.apply(model, reference=reference, rng=generator)
    return model


def _with_floats(model: FLModel, change: Callable[[dict[str, Array]], dict[str, Array]]) -> FLModel:
    """`model` with its float tensors changed, in the same form."""
    if model.params is None:
        return model
    arrays, structure = flatten(model.params)
    floats = {name: array for name, array in arrays.items() if is_float(array.dtype)}
    return replace(model, params=unflatten(arrays | change(floats), structure))


def _wide(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array
