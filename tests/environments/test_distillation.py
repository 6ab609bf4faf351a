"""FedMD in real processes, which keep their models themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hanse.environments import PocEnv, SimEnv
from hanse.jobs.distillation import FedMDRecipe
from hanse.server.run import Run

CODE = """
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from hanse import App, FLModel

app = App()
X, Y = load_digits(return_X_y=True)


def model_of(site):
    x, y = X[200 + site.rank : 800 : 4], Y[200 + site.rank : 800 : 4]
    if "labels" in site.state:
        x, y = np.concatenate([x, X[site.state["rows"]]]), np.concatenate([y, site.state["labels"]])
    return (GaussianNB(var_smoothing=1e-2) if site.rank else LogisticRegression(max_iter=200)).fit(x, y)


@app.task("score")
def score(model, site):
    return FLModel({"scores": model_of(site).predict_proba(X[site.config["rows"]])})


@app.task("digest")
def digest(model, site):
    site.state |= {"rows": site.config["rows"], "labels": model.params["scores"].argmax(1)}
    return FLModel(metrics={"rank": site.rank})


@app.evaluate
def evaluate(model, site):
    return {"accuracy": model_of(site).score(X[800:], Y[800:])}
"""


def test_processes_give_the_same_bits(
    load: Callable[[str], Any], tmp_path: Path, clean: None, check_same: Callable[[Run, Run], None]
) -> None:
    recipe = FedMDRecipe(name="fedmd", app=load(CODE).app, rounds=2, public_examples=200, examples_per_round=150)
    simulated = recipe.execute(SimEnv(num_clients=2, runs=tmp_path / "sim", console="quiet"))
    real = recipe.execute(PocEnv(num_clients=2, runs=tmp_path / "poc", console="quiet"))
    check_same(simulated, real)
    assert real.metrics[-1]["accuracy"] > 0.7
