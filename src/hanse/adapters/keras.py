"""Keras 3, on any of its backends: a model's weights as named arrays, and back into a model.

Where TensorFlow is not installed and KERAS_BACKEND is not set, PyTorch is the backend: a site's sandbox hands no variables on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np

from hanse.client.framework import Adapter
from hanse.errors import ConfigError

if "keras" not in sys.modules and "KERAS_BACKEND" not in os.environ and find_spec("tensorflow") is None and find_spec("torch"):
    os.environ["KERAS_BACKEND"] = "torch"

import keras

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class KerasAdapter(Adapter):
    """See `hanse.client.framework.Adapter`. Keras takes NumPy's arrays on every backend, so that there is nothing to turn at a site.
    Its threads, and what they hold, are the backend's."""

    name = "keras"

    def params_of(self, model: Any) -> Mapping[str, Any] | None:
        return params_of(model)

    def to_array(self, value: Any) -> Array:
        if not isinstance(value, keras.Variable | keras.KerasTensor):
            raise ConfigError(f"a {type(value).__module__}.{type(value).__name__} cannot travel: send params_of(model), arrays or numbers")
        if isinstance(value, keras.KerasTensor):
            raise ConfigError("a KerasTensor has no numbers: send params_of(model), arrays or numbers")
        return np.asarray(keras.ops.convert_to_numpy(value))

    def seed(self, seed: int) -> None:
        keras.utils.set_random_seed((seed ^ seed >> 32) & 0xFFFFFFFF)  # it takes 32 bits

    def may_fork(self) -> bool:
        return bool(keras.backend.backend() != "tensorflow")  # which starts threads; the others have adapters of their own


ADAPTER = KerasAdapter()


def params_of(model: Any) -> dict[str, Array] | None:
    """A built model's weights, trainable or not, in the order of `model.weights`: names such as "0.kernel", a place and what it is.

    Keras's own paths are no names: they count the layers that the process has made. Arrays are copies. None if the model is not built yet.
    Raises ConfigError for what is no Keras model or layer.
    """
    if not isinstance(model, keras.Layer):
        raise ConfigError(f"a {type(model).__name__} is no Keras model: give one, or named arrays")
    return {_name(place, weight): np.array(keras.ops.convert_to_numpy(weight)) for place, weight in enumerate(model.weights)} or None


def set_params_of(model: Any, params: Mapping[str, Any]) -> None:
    """Write weights as `params_of` gives them into a built model. Raises ConfigError, before it writes, if names or shapes do not fit."""
    if not isinstance(model, keras.Layer):
        raise ConfigError(f"a {type(model).__name__} is no Keras model")
    own = {_name(place, weight): weight for place, weight in enumerate(model.weights)}
    if own.keys() != params.keys():
        hint = "A model must be built first: begin it with keras.Input." if not own else ""
        raise ConfigError(
            f"the params do not fit: {sorted(own.keys() ^ params.keys())} is in the model or in them, not in both.", hint=hint
        )
    for name, weight in own.items():
        if tuple(weight.shape) != np.shape(params[name]):
            raise ConfigError(f"{name!r} has shape {np.shape(params[name])}, and in the model, as {weight.path!r}, {tuple(weight.shape)}")
    for name, weight in own.items():
        weight.assign(params[name])


def _name(place: int, weight: Any) -> str:
    return f"{place}.{weight.name}"
