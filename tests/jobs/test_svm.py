from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.environments import PocEnv, SimEnv
from hanse.errors import ConfigError, JobFailed
from hanse.jobs.svm import SVMRecipe

pytest.importorskip("sklearn")
from sklearn.datasets import load_breast_cancer
from sklearn.svm import SVC

from hanse.adapters.sklearn import fit_support

CODE = """
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.svm import SVC
from hanse import App, FLModel
from hanse.adapters.sklearn import fit_support, support_of

app = App()

def share(rank, count):
    x, y = load_breast_cancer(return_X_y=True)
    mine = np.random.default_rng(0).permutation(len(y))[: len(y) * 4 // 5][rank::count]
    return x[mine, :10], y[mine]

@app.train
def train(model, site):
    x, y = share(site.rank, site.count)
    params = support_of(SVC(kernel="linear"), x, y)
    if site.config.get("wrong") == "narrow" and site.rank == 1:
        params["x"] = params["x"][:, 1:]
    if site.config.get("wrong") == "nan" and site.rank == 0:
        params["x"][3, 2] = np.nan
    if site.config.get("wrong") == "other" and site.rank == 0:
        params = {"coef_": np.zeros(3)}
    return FLModel(params=params)

@app.evaluate
def evaluate(model, site):
    x, y = share(site.rank, site.count)
    return {"accuracy": fit_support(SVC(kernel="linear"), model.params).score(x, y)}
"""


@pytest.fixture
def recipe(load: Callable[[str], Any]) -> SVMRecipe:
    return SVMRecipe(name="svm", app=load(CODE).app, share_support_vectors=True)


def test_it_is_the_machine_of_all_support_vectors(recipe: SVMRecipe, tmp_path: Path) -> None:
    x, y = load_breast_cancer(return_X_y=True)
    run, other = (recipe.execute(SimEnv(num_clients=3, workers=workers, runs=tmp_path, console="quiet")) for workers in (1, 2))
    real = recipe.execute(PocEnv(num_clients=3, runs=tmp_path, console="quiet"))
    params = run.get_result().params
    assert {row.tobytes() for row in params["x"]} <= {row.tobytes() for row in np.ascontiguousarray(x[:, :10])}
    assert len(params["x"]) < 0.7 * len(x)
    for again in (other, real):
        np.testing.assert_array_equal(again.get_result().params["x"], params["x"])
        np.testing.assert_array_equal(again.get_result().params["y"], params["y"])
    order = np.random.default_rng(0).permutation(len(y))
    seen, unseen = order[: len(y) * 4 // 5], order[len(y) * 4 // 5 :]
    pooled = SVC(kernel="linear").fit(x[seen, :10], y[seen]).score(x[unseen, :10], y[unseen])
    together = fit_support(SVC(kernel="linear"), params).score(x[unseen, :10], y[unseen])
    assert together > 0.9
    assert together > pooled - 0.03
    assert run.metrics == real.metrics


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("narrow", "'site-2': its support vectors have 9 features"),
        ("nan", "'site-1': .* NaN"),
        ("other", "'site-1': .* no support vectors"),
    ],
)
def test_what_does_not_fit_is_rejected(recipe: SVMRecipe, wrong: str, says: str, tmp_path: Path) -> None:
    env = SimEnv(num_clients=3, runs=tmp_path, console="quiet")
    with pytest.raises(JobFailed, match=says):
        replace(recipe, config={"wrong": wrong}).execute(env)
    run = replace(recipe, config={"wrong": wrong}, min_updates=2).execute(env)
    assert run.get_result().params["x"].shape[1] == 10


def test_it_must_be_said_that_records_are_shown(recipe: SVMRecipe) -> None:
    with pytest.raises(ConfigError, match="every site would get those of all others"):
        replace(recipe, share_support_vectors=False)
    with pytest.raises(ConfigError, match="takes no first model"):
        replace(recipe, model={"x": np.zeros((1, 2))})
    with pytest.raises(ConfigError, match="min_updates=0"):
        replace(recipe, min_updates=0)
