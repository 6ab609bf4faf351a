from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hanse.errors import ConfigError

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, SGDClassifier
from sklearn.naive_bayes import ComplementNB, GaussianNB, MultinomialNB
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from hanse.adapters.sklearn import fit_sums, fit_support, params_of, set_params_of, sums_of, support_of
from hanse.aggregation.mean import WeightedMean
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Update

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


DIGITS, LABELS = load_digits(return_X_y=True)
THIRDS = [slice(rank, None, 3) for rank in range(3)]


@pytest.mark.parametrize(
    ("estimator", "x", "y"),
    [
        (GaussianNB(), DIGITS, LABELS),
        (GaussianNB(var_smoothing=1e-3, priors=[0.1] * 10), DIGITS, LABELS),
        (MultinomialNB(alpha=0.5), DIGITS, LABELS),
        (MultinomialNB(fit_prior=False), DIGITS, LABELS),
        (ComplementNB(norm=True), DIGITS, LABELS),
        (LinearRegression(), X, X @ [1.0, -2.0, 0.5] + 3),
        (LinearRegression(fit_intercept=False), X + 1, Y),
        (Ridge(alpha=2.0), X, Y),
        (Ridge(alpha=2.0, fit_intercept=False), X + 1, Y),
    ],
    ids=lambda value: str(value) if hasattr(value, "fit") else "",
)
def test_a_fit_by_sums_is_the_fit_on_all_records_in_one_place(estimator: Any, x: Any, y: Any) -> None:
    classes = None if isinstance(estimator, LinearRegression | Ridge) else sorted(set(y.tolist()))
    mean = WeightedMean("equal").fresh()
    for number, rows in enumerate(THIRDS):
        site = f"site-{number}"
        sums = sums_of(estimator, x[rows], y[rows], classes=classes, sites=3)
        mean.add(Update(site, TaskId("job", 0, 0, site), FLModel(sums)))
    found, pooled = fit_sums(clone(estimator), mean.result().params, classes=classes), clone(estimator).fit(x, y)
    np.testing.assert_allclose(found.predict(x), pooled.predict(x), rtol=1e-9)
    for name, value in vars(pooled).items():
        if name.endswith("_") and not name.startswith(("_", "n_", "singular_", "rank_", "solver_")):
            np.testing.assert_allclose(getattr(found, name), value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_sums_by_hand() -> None:
    x, y = np.array([[1.0, 2], [3, 4], [5, 7]]), np.array([1, 0, 1])
    sums = sums_of(GaussianNB(), x, y, classes=[0, 1, 2])
    np.testing.assert_array_equal(sums["count"], [1, 2, 0])
    np.testing.assert_array_equal(sums["sum"], [[3, 4], [6, 9], [0, 0]])
    np.testing.assert_array_equal(sums["squares"], [[9, 16], [26, 53], [0, 0]])
    np.testing.assert_array_equal(sums_of(Ridge(), x, y, sites=2)["moment"], [4, 12, 18])


def test_what_sums_cannot_do() -> None:
    with pytest.raises(ConfigError, match="a SVC cannot be fitted from sums"):
        sums_of(SVC(), X, Y)
    with pytest.raises(ConfigError, match=r"SVC\(\) cannot be fitted from sums"):
        fit_sums(SVC(), {})
    with pytest.raises(ConfigError, match="y holds 1, which is not among the classes"):
        sums_of(GaussianNB(), X, Y, classes=[0])
    with pytest.raises(ConfigError, match=r"y \(60, 1\)"):
        sums_of(Ridge(), X, Y[:, None])
    with pytest.raises(ConfigError, match="every class needs some"):
        fit_sums(GaussianNB(), sums_of(GaussianNB(), X, Y, classes=[0, 1, 2]), classes=[0, 1, 2])
    with pytest.raises(ConfigError, match="without positive=True"):
        fit_sums(Ridge(positive=True), sums_of(Ridge(), X, Y))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_support_vectors_are_records_and_make_the_same_machine(kernel: str) -> None:
    """Those of one site hold the border alone, as the theory has it, where the kernel does not hang on them as gamma="scale" does."""
    machine = SVC(kernel=kernel, gamma=0.5, tol=1e-8)
    params = support_of(machine, X, Y)
    assert 0 < len(params["x"]) < len(X)
    assert {row.tobytes() for row in params["x"]} < {row.tobytes() for row in X}
    again = fit_support(clone(machine), params)
    np.testing.assert_allclose(again.decision_function(X), machine.decision_function(X), atol=1e-4)
