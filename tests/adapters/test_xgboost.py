from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hanse.client.framework import adapter_for, params_of
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel

xgb = pytest.importorskip("xgboost")

from hanse.adapters.xgboost import ADAPTER, boost, booster_of  # noqa: E402

X = np.random.default_rng(0).normal(size=(50, 3))
DATA = xgb.DMatrix(X, X[:, 0] > 0)
CONFIG = {"xgboost": {"params": {"objective": "binary:logistic", "base_score": 0.5, "subsample": 0.5, "nthread": 1}, "local_trees": 2}}


def trees(answer: FLModel) -> list[Any]:
    found: list[Any] = json.loads(answer.params["booster"])["learner"]["gradient_booster"]["model"]["trees"]
    return found


def test_a_round_sends_the_new_trees_alone() -> None:
    first = boost(FLModel(), CONFIG, DATA, metrics={"auc": 0.5})
    assert (len(trees(first)), first.meta, first.metrics) == (2, {"examples": 50}, {"auc": 0.5})
    second = boost(first, CONFIG, DATA)
    assert len(trees(second)) == 2
    assert trees(second) != trees(first)


def test_its_draws_come_from_the_seeded_generator() -> None:
    def grown(seed: int) -> bytes:
        np.random.seed(seed)
        found: bytes = boost(FLModel(), CONFIG, DATA).params["booster"]
        return found

    assert grown(1) == grown(1) != grown(2)


@pytest.mark.parametrize("config", [{}, {"xgboost": 3}, {"xgboost": {"params": {}}}])
def test_a_job_of_another_recipe(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the config says nothing of XGBoost"):
        boost(FLModel(), config, DATA)


def test_estimators_are_xgboosts_and_not_scikit_learns() -> None:
    classifier = xgb.XGBClassifier(n_estimators=2, n_jobs=1)
    assert adapter_for(classifier) is ADAPTER
    assert params_of(classifier) == (None, "xgboost")
    classifier.fit(X, X[:, 0] > 0)
    params, framework = params_of(classifier)
    assert framework == "xgboost"
    np.testing.assert_array_equal(booster_of(FLModel(params)).predict(DATA), classifier.get_booster().predict(DATA))
    assert params_of(classifier.get_booster())[0] == params


def test_what_is_no_model() -> None:
    assert booster_of(FLModel()) is None
    with pytest.raises(ConfigError, match="DMatrix is no XGBoost model"):
        params_of(DATA)
    with pytest.raises(ConfigError, match="cannot travel"):
        ADAPTER.to_array(DATA)
