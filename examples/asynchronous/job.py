"""Twenty hospitals, some with slow machines: how long until the digits are told apart, in simulated time? NumPy, and scikit-learn's digits.

The same training code runs synchronously, with a deadline, and asynchronously. `Devices` says how fast each site is; nobody waits for it.
"""

import functools

import numpy as np
from sklearn.datasets import load_digits

from hanse import App, Devices, FedAsyncRecipe, FedAvgRecipe, FedBuffRecipe, FLModel, SimEnv

SITES, TARGET = 20, "accuracy >= 0.9"
app = App()


@functools.cache
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return x[order] / 16, y[order]


def scores(x, params):
    return x @ params["w"] + params["b"]


@app.train
def train(model, site):
    x, y = (part[site.rank :: site.count] for part in digits())
    w, b = model.params["w"], model.params["b"]
    accuracy = np.mean(scores(x, model.params).argmax(1) == y)  # of the model as it came, before these pictures are trained on again
    for _ in range(5):
        z = np.exp(x @ w + b)
        error = (z / z.sum(1, keepdims=True) - np.eye(10)[y]) / len(y)
        w, b = w - 0.1 * x.T @ error, b - 0.1 * error.sum(0)
    return FLModel({"w": w, "b": b}, metrics={"accuracy": accuracy}, meta={"examples": len(y)})


if __name__ == "__main__":
    devices = Devices(  # the median site needs a minute; one in forty needs seven times as long
        seconds=60, spread=1.0, download_bytes_per_s=1_000, upload_bytes_per_s=250, bandwidth_spread=0.5, seed=6
    )
    common = {"app": app, "model": {"w": np.zeros((64, 10)), "b": np.zeros(10)}, "stop_when": TARGET}
    recipes = [
        FedAvgRecipe(name="all-together", rounds=100, **common),
        FedAvgRecipe(name="deadline", rounds=100, within_s=150, min_updates=5, **common),
        FedBuffRecipe(name="buffered", rounds=100, buffer=10, **common),
        FedAsyncRecipe(name="one-by-one", rounds=300, alpha=0.3, **common | {"stop_when": None}),  # one site's accuracy says little
    ]
    runs = [(recipe.name, recipe.execute(SimEnv(num_clients=SITES, devices=devices, console="quiet"))) for recipe in recipes]
    print(f"until {TARGET}, as the sites see it; one by one: 300 updates\n")
    print("               steps   updates   simulated   accuracy on all")
    x, y = digits()
    for name, run in runs:
        accuracy = np.mean(scores(x, run.get_result().params).argmax(1) == y)
        minutes = run.events("round")[-1]["virtual_s"] / 60
        print(f"{name:12}  {len(run.metrics):6d}  {len(run.events('update')):8d}  {minutes:6.1f} min   {accuracy:.3f}")
