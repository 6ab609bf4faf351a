from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hanse.errors import ConfigError

pytest.importorskip("sklearn")
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier

from hanse.adapters.sklearn import params_of, set_params_of

X = np.random.default_rng(0).normal(size=(60, 3))
Y = (X @ [1.0, -2.0, 0.5] > 0).astype(int)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (LinearRegression, {"coef_", "intercept_"}),
        (LogisticRegression, {"coef_", "intercept_", "classes_"}),
        (SGDClassifier, {"coef_", "intercept_", "classes_"}),
        (GaussianNB, {"theta_", "var_", "class_prior_", "class_count_", "classes_"}),
    ],
)
def test_a_fresh_estimator_with_the_parameters_of_a_fitted_one_predicts_the_same(make: Any, names: set[str]) -> None:
    fitted, fresh = make().fit(X, Y), make()
    params = params_of(fitted)
    assert params is not None
    assert names <= params.keys()
    assert all(isinstance(value, np.ndarray) for value in params.values())
    assert not any(name.startswith("n_") for name in params)
    set_params_of(fresh, params)
    np.testing.assert_array_equal(fresh.predict(X), fitted.predict(X))


def test_what_is_written_back_may_be_trained_on() -> None:
    fitted, fresh = SGDClassifier(random_state=0).fit(X, Y), SGDClassifier(random_state=0)
    params = params_of(fitted)
    assert params is not None
    for value in params.values():
        value.flags.writeable = False
    set_params_of(fresh, params)
    fresh.partial_fit(X, Y, classes=[0, 1])
    assert not np.array_equal(fresh.coef_, params["coef_"])


def test_a_perceptron_has_lists_of_arrays() -> None:
    fitted = MLPClassifier((4,), max_iter=3, random_state=0)
    with pytest.warns(UserWarning, match="converged"):
        fitted.fit(X, Y)
    params = params_of(fitted)
    assert params is not None
    assert [part.shape for part in params["coefs_"]] == [(3, 4), (4, 1)]
    before = fitted.predict_proba(X)
    set_params_of(fitted, {"coefs_": [part * 0 for part in params["coefs_"]]})
    assert not np.array_equal(fitted.predict_proba(X), before)


def test_string_classes_stay_at_the_site() -> None:
    params = params_of(LogisticRegression().fit(X, np.where(Y, "yes", "no")))
    assert params is not None
    assert params.keys() >= {"coef_", "intercept_"}
    assert "classes_" not in params


def test_an_unfitted_estimator_has_none() -> None:
    assert params_of(LogisticRegression()) is None


@pytest.mark.parametrize("params", [{"coef": np.ones(3)}, {"_x_": np.ones(3)}, {"coef_": "text"}, {"n_iter_": 3}])
def test_only_learned_parameters_are_written(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no learned parameter of a LinearRegression"):
        set_params_of(LinearRegression(), params)
