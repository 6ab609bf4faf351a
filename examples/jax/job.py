"""Handwritten digits with JAX and Optax: the model is a pytree, and comes back as one.

The four sites are simulated; `python job.py poc` makes them processes of their own, with certificates and mutual TLS.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from hanse import App, FedAvgRecipe, FLModel, PocEnv, SimEnv
from hanse.adapters.jax import key

app = App()
adam = optax.adam(3e-3)


def first_model():
    """Two layers, drawn with NumPy: JAX is left alone until a site trains, so that the simulator may fork."""
    rng = np.random.default_rng(0)
    shapes = [(64, 32), (32, 10)]
    return {"layers": [{"w": rng.normal(0, m**-0.5, (m, n)).astype("f4"), "b": np.zeros(n, "f4")} for m, n in shapes]}


def scores(params, x):
    *hidden, last = params["layers"]
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


@jax.jit
def step(params, state, x, y):
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(scores(params, x), y).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = adam.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


@functools.cache
def share(rank, count):
    x, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(y))[rank::count]
    x, y, seen = x[rows].astype("f4") / 16, y[rows], len(rows) * 4 // 5
    return x[:seen], y[:seen], x[seen:], y[seen:]


@app.train
def train(model, site):
    x, y, _, _ = share(site.rank, site.count)
    params, state = model.params, adam.init(model.params)
    for rows in jax.random.choice(key(), len(y), (40, 32)):
        params, state, loss = step(params, state, x[rows], y[rows])
    return FLModel(params=params, metrics={"loss": loss}, meta={"examples": len(y)})


@app.evaluate
def evaluate(model, site):
    _, _, x, y = share(site.rank, site.count)
    return FLModel(metrics={"accuracy": jnp.mean(scores(model.params, x).argmax(1) == y)}, meta={"examples": len(y)})


if __name__ == "__main__":
    Env = PocEnv if "poc" in sys.argv[1:] else SimEnv
    recipe = FedAvgRecipe(name="jax", app=app, model=first_model(), framework="jax", rounds=10)
    recipe.execute(Env(num_clients=4))
