"""Keras models as named arrays, and a job that gives the same bits in both environments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras

from hanse import FedAvgRecipe, PocEnv, SimEnv
from hanse.adapters.keras import ADAPTER, params_of, set_params_of
from hanse.client.framework import adapter_for, to_arrays
from hanse.client.framework import params_of as framework_params_of
from hanse.errors import ConfigError

CODE = """
import os
os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np
from hanse import App, FLModel
from hanse.adapters.keras import params_of, set_params_of

app = App()

def network():
    layers = [keras.layers.Dense(4, activation="relu"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    net = keras.Sequential([keras.Input((3,)), *layers])
    net.compile(keras.optimizers.SGD(0.01), "mse")
    return net

@app.train
def train(model, site):
    assert all(isinstance(array, np.ndarray) for array in model.params.values())
    net = network()
    set_params_of(net, model.params)
    x = np.sin(np.arange(60.0, dtype="f4")).reshape(20, 3) + site.rank
    net.fit(x, x.sum(1), batch_size=5, verbose=0)
    noise = float(keras.ops.convert_to_numpy(keras.random.normal(())))
    return FLModel(params=params_of(net), metrics={"noise": noise}, meta={"examples": 10 + site.rank})
"""


def network() -> Any:
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((3,)), *layers])


NAMES = ["0.kernel", "1.bias", "2.gamma", "3.beta", "4.moving_mean", "5.moving_variance", "6.kernel", "7.bias"]


def test_names_do_not_hang_on_what_was_made_before() -> None:
    first, second = params_of(network()), params_of(network())
    assert first is not None
    assert second is not None
    assert list(first) == list(second) == NAMES
    assert first["0.kernel"].shape == (3, 4)
    assert framework_params_of(network())[1] == "keras"


def test_there_and_back() -> None:
    net, other = network(), network()
    given = {
        name: np.random.default_rng(place).normal(size=array.shape) for place, (name, array) in enumerate((params_of(net) or {}).items())
    }
    set_params_of(net, given)
    set_params_of(other, params_of(net) or {})
    x = np.ones((2, 3), "f4")
    np.testing.assert_array_equal(net.predict(x, verbose=0), other.predict(x, verbose=0))
    np.testing.assert_allclose(net.get_weights()[2], given["2.gamma"], rtol=1e-6)
    copies = params_of(net)
    assert copies is not None
    copies["1.bias"] += 1
    np.testing.assert_allclose((params_of(net) or {})["1.bias"], given["1.bias"], rtol=1e-6)


def test_a_variable_travels_and_a_symbol_does_not() -> None:
    assert adapter_for(network().weights[0]) is ADAPTER
    np.testing.assert_array_equal(to_arrays({"w": keras.Variable(np.arange(3.0, dtype="f4"))})["w"], [0, 1, 2])
    for value, says in [(keras.Input((3,)), "KerasTensor has no numbers"), (keras.optimizers.SGD(), "SGD cannot travel")]:
        with pytest.raises(ConfigError, match=says):
            to_arrays({"w": value})


def test_what_does_not_fit_changes_nothing() -> None:
    net = network()
    before, params = net.get_weights(), params_of(net) or {}
    with pytest.raises(ConfigError, match=r"\['7.bias'\]"):
        set_params_of(net, {name: array + 1 for name, array in params.items() if name != "7.bias"})
    with pytest.raises(ConfigError, match=r"'7.bias' has shape \(2,\), and in the model"):
        set_params_of(net, {name: array + 1 for name, array in params.items()} | {"7.bias": np.zeros(2)})
    for old, new in zip(before, net.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(ConfigError, match=r"built first: begin it with keras\.Input"):
        set_params_of(keras.Sequential([keras.layers.Dense(1)]), params)
    assert params_of(keras.Sequential([keras.layers.Dense(1)])) is None
    for model in (3, [net]):
        with pytest.raises(ConfigError, match="no Keras model"):
            params_of(model)
        with pytest.raises(ConfigError, match="no Keras model"):
            set_params_of(model, params)


def test_the_backend_where_nobody_has_said_one(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"} | {"HOME": str(tmp_path)}
    code = "import hanse.adapters.keras, keras; print(keras.backend.backend())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch"


def test_same_bits_in_both_environments(load: Any, tmp_path: Path) -> None:
    code = load(CODE)
    recipe = FedAvgRecipe(name="keras", app=code.app, model=code.network(), rounds=2)
    assert recipe.first_model()[1] == "keras"
    runs = [recipe.execute(SimEnv(num_clients=2, workers=workers, runs=tmp_path, console="quiet")) for workers in (1, 2)]
    runs.append(recipe.execute(PocEnv(num_clients=2, runs=tmp_path, console="quiet")))
    bits = [[array.tobytes() for array in run.get_result().params.values()] for run in runs]
    assert bits[0] == bits[1] == bits[2]
    assert runs[0].metrics == runs[1].metrics == runs[2].metrics
    assert list(runs[0].get_result().params) == NAMES
