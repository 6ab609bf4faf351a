"""Handwritten digits with Keras 3, on PyTorch.

The four sites are simulated; `python job.py poc` makes them processes of their own, with certificates and mutual TLS.
"""

import functools
import os
import sys

os.environ["KERAS_BACKEND"] = "torch"  # here, not in the shell: a site's sandbox hands no variables on

import keras
import numpy as np
from sklearn.datasets import load_digits

from hanse import App, FedAvgRecipe, FLModel, PocEnv, SimEnv
from hanse.adapters.keras import params_of, set_params_of

app = App()


def network():
    layers = [keras.Input((8, 8, 1)), keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.Flatten(), keras.layers.Dropout(0.1)]
    net = keras.Sequential([*layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.Adam(5e-3), loss, metrics=["accuracy"])
    return net


@functools.cache
def share(rank, count):
    x, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(y))[rank::count]
    x, y, seen = x[rows].reshape(-1, 8, 8, 1).astype("f4") / 16, y[rows], len(rows) * 4 // 5
    return x[:seen], y[:seen], x[seen:], y[seen:]


@app.train
def train(model, site):
    x, y, _, _ = share(site.rank, site.count)
    net = network()
    set_params_of(net, model.params)
    history = net.fit(x, y, batch_size=32, epochs=2, verbose=0)
    return FLModel(params=params_of(net), metrics={"loss": history.history["loss"][-1]}, meta={"examples": len(y)})


@app.evaluate
def evaluate(model, site):
    _, _, x, y = share(site.rank, site.count)
    net = network()
    set_params_of(net, model.params)
    return {"accuracy": net.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]}


if __name__ == "__main__":
    keras.utils.set_random_seed(0)  # for the first model
    Env = PocEnv if "poc" in sys.argv[1:] else SimEnv
    recipe = FedAvgRecipe(name="keras", app=app, model=network(), rounds=5)
    recipe.execute(Env(num_clients=4))
