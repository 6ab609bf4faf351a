"""Boosted trees grown at sites, on real records of customers; each job simulated, and some in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.environments import PocEnv, SimEnv
from hanse.environments.simulation import resume
from hanse.errors import ConfigError, JobFailed
from hanse.jobs.boosting import XGBoostBaggingRecipe, XGBoostCyclicRecipe
from hanse.jobs.loading import read_job
from hanse.server.run import Run

xgb = pytest.importorskip("xgboost")
metrics = pytest.importorskip("sklearn.metrics")

from hanse.adapters.xgboost import booster_of  # noqa: E402

CODE = """
import functools
from pathlib import Path

import numpy as np
import xgboost as xgb
from sklearn.datasets import load_breast_cancer

from hanse import App, FLModel
from hanse.adapters.xgboost import boost, booster_of

app = App()


@functools.cache
def matrix(*where):
    return xgb.DMatrix(*share(*where))


@functools.cache
def records(path):
    if not path:
        return load_breast_cancer(return_X_y=True)
    with np.load(path) as file:
        return file["x"], file["y"]


def share(path, rank, count):
    x, y = records(path)
    rows = np.arange(len(y)) if count is None else np.random.default_rng(0).permutation(len(y))[: len(y) * 4 // 5][rank::count]
    return x[rows], y[rows]


@app.train
def train(model, site):
    data = matrix(site.config.get("data"), site.rank, site.count)
    if site.config.get("hostile") and site.rank == 0:
        answer = boost(model, site.config, data)
        bad = answer.params["booster"].replace(b'"left_children":[1,', b'"left_children":[77777,', 1)
        return FLModel({"booster": bad if model.current_round else b"junk"}, meta=answer.meta)
    if site.config.get("narrow") and site.rank == 1:
        x, y = share(None, site.rank, site.count)
        data = xgb.DMatrix(x[:, 1:], y)
    if "fails" in site.config and model.current_round == 2 and Path(site.config["fails"]).exists():
        raise OSError("no data today")
    return boost(model, site.config, data, metrics={"share": data.num_row()})
"""
PARAMS = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.3, "subsample": 0.8}


@pytest.fixture
def app(load: Callable[[str], Any]) -> Any:
    return load(CODE).app


@pytest.fixture
def recipe(app: Any) -> XGBoostBaggingRecipe:
    return XGBoostBaggingRecipe(name="trees", app=app, params=PARAMS, rounds=4, local_trees=2)


def simulated(folder: Path, **about: Any) -> SimEnv:
    return SimEnv(**{"num_clients": 3, "runs": folder, "console": "quiet"} | about)


def bytes_of(run: Run) -> bytes:
    found: bytes = run.get_result().params["booster"]
    return found


def test_bagging_makes_up_for_most_of_what_a_site_lacks_alone(app: Any, tmp_path: Path, data_folder: Path) -> None:
    """24,000 customers at 15 sites, 6,000 others test. The result has to come nearer to all customers in one place than to the best site.

    AUC, measured with three shuffles of the customers: 0.766 to 0.772 together, 0.750 to 0.759 at the best site, 0.762 to 0.773 in
    one place.
    """
    data, sites, rounds = str(data_folder / "credit_default.npz"), 15, 8
    params = {"objective": "binary:logistic", "max_depth": 4, "eta": 0.3, "subsample": 0.8}
    recipe = XGBoostBaggingRecipe(name="credit", app=app, params=params, rounds=rounds, config={"data": data})
    together = booster_of(recipe.execute(simulated(tmp_path, num_clients=sites)).get_result())
    with np.load(data) as file:
        x, y = file["x"], file["y"]
    rows = np.random.default_rng(0).permutation(len(y))
    seen, unseen = rows[: len(y) * 4 // 5], rows[len(y) * 4 // 5 :]

    def auc(booster: Any) -> float:
        return float(metrics.roc_auc_score(y[unseen], booster.predict(xgb.DMatrix(x[unseen]))))

    def by_itself(mine: Any) -> float:
        return auc(xgb.train(params | {"nthread": 1}, xgb.DMatrix(x[mine], y[mine]), rounds))

    alone, pooled = max(by_itself(seen[rank::sites]) for rank in range(sites)), by_itself(seen)
    print(f"together {auc(together):.4f}, best alone {alone:.4f}, all in one place {pooled:.4f}")
    assert pooled > alone + 0.01  # there is something to make up for
    assert auc(together) > (alone + pooled) / 2


def test_the_first_round_is_the_mean_of_what_the_sites_grew(
    recipe: XGBoostBaggingRecipe, load: Callable[[str], Any], tmp_path: Path
) -> None:
    recipe = replace(recipe, rounds=1, params=PARAMS | {"subsample": 1.0})
    joined = booster_of(recipe.execute(simulated(tmp_path)).get_result())
    share = load(CODE).share
    x, _ = share(None, 0, None)
    parts = [
        xgb.train(PARAMS | {"subsample": 1.0, "base_score": 0.5, "nthread": 1}, xgb.DMatrix(*share(None, rank, 3)), 2) for rank in range(3)
    ]
    margins = [part.predict(xgb.DMatrix(x), output_margin=True) for part in parts]
    np.testing.assert_allclose(joined.predict(xgb.DMatrix(x), output_margin=True), np.mean(margins, axis=0), atol=1e-6)


def test_in_turns_is_xgboost_going_on(app: Any, load: Callable[[str], Any], tmp_path: Path) -> None:
    params = PARAMS | {"subsample": 1.0}
    recipe = XGBoostCyclicRecipe(name="turns", app=app, params=params, rounds=2, local_trees=2)
    run = recipe.execute(simulated(tmp_path))
    share, booster = load(CODE).share, None
    for rank in (0, 1, 2, 0, 1, 2):
        booster = xgb.train(params | {"base_score": 0.5, "nthread": 1}, xgb.DMatrix(*share(None, rank, 3)), 2, xgb_model=booster)
    x = xgb.DMatrix(share(None, 0, None)[0])
    np.testing.assert_array_equal(booster_of(run.get_result()).predict(x), booster.predict(x))
    shuffled = replace(recipe, order="random").execute(simulated(tmp_path))
    assert bytes_of(shuffled) != bytes_of(run)
    assert booster_of(shuffled.get_result()).num_boosted_rounds() == 12


@pytest.mark.parametrize("kind", [XGBoostBaggingRecipe, XGBoostCyclicRecipe])
def test_the_same_bits_everywhere(kind: Any, app: Any, tmp_path: Path) -> None:
    recipe = kind(name="trees", app=app, params=PARAMS, rounds=2)
    one, two = (recipe.execute(simulated(tmp_path, workers=workers)) for workers in (1, 2))
    real = recipe.execute(PocEnv(num_clients=3, runs=tmp_path, console="quiet"))
    assert bytes_of(one) == bytes_of(two) == bytes_of(real)
    assert one.metrics == real.metrics


def test_a_job_that_broke_goes_on_to_the_same_bits(recipe: XGBoostBaggingRecipe, tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    recipe = replace(recipe, config={"fails": str(tmp_path / "marker")})
    with pytest.raises(JobFailed, match="no data today") as failed:
        recipe.execute(simulated(tmp_path / "a"))
    assert booster_of(Run(failed.value.folder).get_result()).num_boosted_rounds() == 4
    (tmp_path / "marker").unlink()
    resumed = resume(failed.value.folder, console="quiet")
    assert bytes_of(resumed) == bytes_of(recipe.execute(simulated(tmp_path / "b")))


def test_a_model_to_start_from(recipe: XGBoostBaggingRecipe, load: Callable[[str], Any], tmp_path: Path) -> None:
    x, y = load(CODE).share(None, 0, 3)
    classifier = xgb.XGBClassifier(n_estimators=3, max_depth=2, base_score=0.5, n_jobs=1).fit(x, y)
    run = replace(recipe, model=classifier, rounds=1).execute(simulated(tmp_path))
    booster = booster_of(run.get_result())
    assert booster.num_boosted_rounds() == 5
    np.testing.assert_array_equal(booster[:3].predict(xgb.DMatrix(x)), classifier.get_booster().predict(xgb.DMatrix(x)))


def test_a_hostile_sites_trees_are_turned_down_and_the_job_goes_on(recipe: XGBoostBaggingRecipe, tmp_path: Path) -> None:
    run = replace(recipe, config={"hostile": True}, min_updates=2, rounds=2).execute(simulated(tmp_path))
    first, second = (event["message"] for event in run.events("failure"))
    assert "site 'site-1': it is no XGBoost model in JSON" in first
    assert "site 'site-1': its tree 0: node 0 has the child 77777" in second
    assert len(booster_of(run.get_result()).get_dump()) == 2 * 2 * 2


def test_a_site_with_fewer_features_is_named(recipe: XGBoostBaggingRecipe, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=r"site-2: .*its num_feature is 29, and the ensemble's is 30"):
        replace(recipe, config={"narrow": True}).execute(simulated(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rounds": 0}, "rounds=0: it must be a whole number above 0"),
        ({"local_trees": 0}, "local_trees=0"),
        ({"sites_per_round": 1.5}, "sites_per_round=1.5"),
        ({"grace_s": -1}, "grace_s=-1"),
        ({"params": {}}, "needs params with an objective"),
        ({"params": PARAMS | {"booster": "dart"}}, "booster 'dart' among its params: only 'gbtree' can be joined"),
        ({"params": PARAMS | {"multi_strategy": "multi_output_tree"}}, "multi_strategy"),
        ({"params": PARAMS | {"process_type": "update"}}, "process_type"),
        ({"params": PARAMS | {"num_class": "3"}}, "num_class '3' among its params"),
        ({"params": {"objective": print}}, "params must hold JSON values only"),
        ({"best": "max"}, "'max' is no goal"),
        ({"model": {"w": np.zeros(3)}}, "takes an XGBoost model, or its bytes"),
        ({"evaluate": True}, "needs an app with a function for 'evaluate'"),
    ],
)
def test_wrong_arguments(app: Any, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        XGBoostBaggingRecipe(**{"name": "a", "app": app, "rounds": 1, "params": PARAMS} | wrong)


def test_wrong_order(app: Any) -> None:
    with pytest.raises(ConfigError, match="order='up': it must be one of fixed, random"):
        XGBoostCyclicRecipe(name="a", app=app, rounds=1, params=PARAMS, order="up")  # type: ignore[arg-type]


def test_a_job_folder_holds_its_settings(recipe: XGBoostBaggingRecipe, tmp_path: Path) -> None:
    read = read_job(replace(recipe, sites_per_round=2, grace_s=3.0).export(tmp_path / "job"))
    assert isinstance(read, XGBoostBaggingRecipe)
    assert (read.params, read.local_trees, read.sites_per_round, read.grace_s) == (PARAMS, 2, 2, 3.0)
