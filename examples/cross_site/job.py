"""Whose model is good where? Three sites know some digits each; all of them score each one's own model, and the one they made together."""

import numpy as np
from sklearn.datasets import load_digits

from hanse import App, FedAvgRecipe, FedEvalRecipe, FLModel, SimEnv

app = App()


def digits(site):
    """The pictures of the site's digits (0 to 5, 2 to 7 or 4 to 9), and which they are."""
    x, y = load_digits(return_X_y=True)
    known = (y >= 2 * site.rank) & (y < 2 * site.rank + 6)
    return x[known] / 16, y[known]


def descend(w, x, y, steps):
    """Softmax regression: so many steps from `w`, of shape (64, 10)."""
    for _ in range(steps):
        odds = np.exp(x @ w)
        w = w - x.T @ (odds / odds.sum(axis=1, keepdims=True) - np.eye(10)[y]) / len(y)
    return w


@app.train
def train(model, site):
    x, y = digits(site)
    return FLModel(params={"w": descend(model.params["w"], x[::2], y[::2], steps=20)}, meta={"examples": len(y[::2])})


@app.task("submit_model")
def submit(model, site):
    x, y = digits(site)
    return FLModel(params={"w": descend(np.zeros((64, 10)), x[::2], y[::2], steps=400)})


@app.evaluate
def evaluate(model, site):
    x, y = digits(site)
    return {"accuracy": np.mean((x[1::2] @ model.params["w"]).argmax(axis=1) == y[1::2])}


if __name__ == "__main__":
    env = SimEnv(sites=["ada", "bob", "cy"])
    together = FedAvgRecipe(name="together", app=app, model={"w": np.zeros((64, 10))}, rounds=10).execute(env)
    FedEvalRecipe(name="cross-site", app=app, model=together.get_best(), cross_site=True).execute(env)
