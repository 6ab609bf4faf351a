"""Handwritten digits at eight sites, one of which sends nonsense: the mean is lost, the median is not."""

import functools

import numpy as np
from sklearn.datasets import load_digits

from hanse import App, FedAvgRecipe, FLModel, Median, SimEnv, WeightedMean

app = App()


@functools.cache
def digits(rank, count):
    """A site's part of the 1,797 digits, as images and labels."""
    x, y = load_digits(return_X_y=True)
    return (x[rank::count] / 16).astype(np.float32), y[rank::count]


def chances(params, x):
    """How likely each image is each of the ten digits, by softmax regression."""
    scores = x @ params["weight"] + params["bias"]
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    return likely / likely.sum(axis=1, keepdims=True)


@app.train
def train(model, site):
    x, y = digits(site.rank, site.count)
    seen = len(y) * 4 // 5  # the others are for the accuracy
    weight, bias = model.params["weight"].copy(), model.params["bias"].copy()
    for _ in range(5):
        for rows in np.array_split(site.rng.permutation(seen), seen // 16):
            error = chances({"weight": weight, "bias": bias}, x[rows]) - np.eye(10, dtype=np.float32)[y[rows]]
            weight -= 0.1 * x[rows].T @ error / len(rows)
            bias -= 0.1 * error.mean(axis=0)
    params = {"weight": weight, "bias": bias}
    if site.name == site.config["hostile"]:  # back along the way it came, and ten times as far
        params = {name: model.params[name] - 10 * (value - model.params[name]) for name, value in params.items()}
    return FLModel(params, meta={"examples": seen})


@app.evaluate
def evaluate(model, site):
    x, y = digits(site.rank, site.count)
    seen = len(y) * 4 // 5
    return {"accuracy": float((chances(model.params, x[seen:]).argmax(axis=1) == y[seen:]).mean())}


if __name__ == "__main__":
    first = {"weight": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}
    for name, aggregator in (("mean", WeightedMean()), ("median", Median())):
        recipe = FedAvgRecipe(
            name=f"robust-{name}", app=app, model=first, config={"hostile": "site-3"}, rounds=10, aggregator=aggregator, best="max accuracy"
        )
        run = recipe.execute(SimEnv(num_clients=8, console="quiet"))
        print(f"{name:6}  accuracy {run.metrics[-1]['accuracy']:.3f}")
