"""scikit-learn: a fitted estimator's parameters as named arrays, and back into an estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.naive_bayes import ComplementNB, GaussianNB, MultinomialNB
from sklearn.svm import SVC

from hanse.client.framework import Adapter
from hanse.errors import ConfigError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


_BAYES = (GaussianNB, MultinomialNB, ComplementNB)
_NOT_LEARNED = ("_", "n_", "singular_")  # private; counters; what only tells of the site's data, in a shape that hangs on its size


class SklearnAdapter(Adapter):
    """See `hanse.client.framework.Adapter`. scikit-learn computes with NumPy's arrays, so that there is nothing to turn, draws
    from NumPy's generator, and its threads are those of BLAS and OpenMP, which the process limits."""

    name = "sklearn"

    def params_of(self, model: Any) -> Mapping[str, Any] | None:
        return params_of(model)

    def to_array(self, value: Any) -> Array:
        raise ConfigError(f"a {type(value).__module__}.{type(value).__name__} cannot travel: send its params_of(…)")


ADAPTER = SklearnAdapter()


def params_of(estimator: BaseEstimator) -> dict[str, Any] | None:
    """What `fit` learned, by attribute: every public attribute ending in "_" that is a numeric array, a list of such, or a float.

    That is `coef_`, `intercept_` and `classes_` of a linear model, `theta_`, `var_` and `class_prior_` of naive Bayes, `coefs_` of a
    multi-layer perceptron. Arrays share the estimator's memory; a float is an array of shape (). Integers, `n_…_`, `singular_` and string
    classes are left out: they stay at the site. None if the estimator is not fitted.
    """
    if not isinstance(estimator, BaseEstimator):
        raise ConfigError(f"a {type(estimator).__name__} is no scikit-learn estimator: give one, or named arrays")
    learned = {name: value for name, value in vars(estimator).items() if _is_learned(name, value)}
    return {name: np.asarray(value) if isinstance(value, float) else value for name, value in learned.items()} or None


def set_params_of(estimator: BaseEstimator, params: Mapping[str, Any]) -> None:
    """Write parameters as `params_of` gives them into an estimator, as copies that it may change.

    An estimator that was never fitted takes them too, and can predict then if `params` hold all that `predict` reads (for a classifier,
    `classes_`).
    Raises ConfigError for a name that is not an attribute of the kind `params_of` reads.
    """
    for name, value in params.items():
        if not _is_learned(name, value):
            raise ConfigError(f"{name!r} is no learned parameter of a {type(estimator).__name__}: those end in '_' and are numeric arrays")
        if isinstance(value, list | tuple):
            setattr(estimator, name, [np.array(part) for part in value])
        else:
            setattr(estimator, name, np.array(value) if np.ndim(value) else float(value))


def _is_learned(name: str, value: Any) -> bool:
    public = name.endswith("_") and not name.startswith(_NOT_LEARNED)
    return public and (isinstance(value, float) or _is_numeric(value))


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(part, np.ndarray) and _is_numeric(part) for part in value)
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def sums_of(estimator: BaseEstimator, x: Array, y: Array, *, classes: Sequence[Any] | None = None, sites: int = 1) -> dict[str, Array]:
    """What a fit needs to know of the records, as sums over them: float64. Of all sites' sums `fit_sums` makes the fitted estimator.

    estimator: a GaussianNB, MultinomialNB or ComplementNB; a LinearRegression or Ridge with one target. Its own settings are not looked at.
    x: shape (n, features). y: shape (n,). classes: all labels that any site may have, in one order; needed for naive Bayes.
    sites: the number of sites in the job, `site.count`. Each sum is taken so often, so that the mean over the sites is the sum over them.
    Raises ConfigError for other estimators and for a label that is not among the classes.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ConfigError(f"x has shape {x.shape} and y {y.shape}: (n, features) and (n,) are wanted")
    if isinstance(estimator, _BAYES):
        known = np.asarray([] if classes is None else classes)
        of_class = y[:, None] == known  # shape (n, classes)
        if not of_class.any(axis=1).all():
            raise ConfigError(f"y holds {y[~of_class.any(axis=1)].tolist()[0]!r}, which is not among the classes {known.tolist()}")
        rows = of_class.T.astype(np.float64)
        sums = {"count": rows.sum(axis=1), "sum": rows @ x}
        if isinstance(estimator, GaussianNB):
            sums["squares"] = rows @ x**2
    elif isinstance(estimator, LinearRegression | Ridge):
        one = np.column_stack([np.ones(len(x)), x])
        sums = {"gram": one.T @ one, "moment": one.T @ y.astype(np.float64)}
    else:
        raise ConfigError(f"a {type(estimator).__name__} cannot be fitted from sums: naive Bayes, LinearRegression and Ridge can")
    return {name: value * sites for name, value in sums.items()}


def fit_sums(estimator: Any, sums: Mapping[str, Array], *, classes: Sequence[Any] | None = None) -> Any:
    """Fit the estimator, by its own settings, to the records that `sums` are of, as `sums_of` gives them. Returns the estimator.

    It is what `fit` would give on all records in one place, up to rounding. Of GaussianNB the variance comes as E[x²] - E[x]²: where a
    feature's mean is above 10⁶ of its standard deviations, shift it first.
    Raises ConfigError for a setting that sums cannot serve, and for a class without records.
    """
    if isinstance(estimator, _BAYES):
        count, total = sums["count"], sums["sum"]
        if classes is None or len(classes) != len(count) or not (count > 0).all():
            raise ConfigError(f"the classes are {classes}, and the sums count {count.tolist()} records of each: every class needs some")
        if not isinstance(estimator, GaussianNB):  # which takes a class's mean record, with its weight, for all its records
            return estimator.fit(total / count[:, None], np.asarray(classes), sample_weight=count)
        estimator.classes_, estimator.class_count_ = np.asarray(classes), count.copy()
        estimator.class_prior_ = count / count.sum() if estimator.priors is None else np.asarray(estimator.priors)
        spread = sums["squares"].sum(axis=0) / count.sum() - (total.sum(axis=0) / count.sum()) ** 2
        estimator.epsilon_ = float(estimator.var_smoothing * spread.max())
        estimator.theta_ = total / count[:, None]
        estimator.var_ = np.maximum(sums["squares"] / count[:, None] - estimator.theta_**2, 0) + estimator.epsilon_
        estimator.n_features_in_ = total.shape[1]
        return estimator
    if not isinstance(estimator, LinearRegression | Ridge) or estimator.positive:
        raise ConfigError(f"{estimator} cannot be fitted from sums: naive Bayes, LinearRegression and Ridge can, without positive=True")
    gram, moment = np.asarray(sums["gram"]), np.asarray(sums["moment"])
    count, mean = gram[0, 0], gram[0] / gram[0, 0]
    if estimator.fit_intercept:
        gram, moment = gram - count * np.outer(mean, mean), moment - mean * moment[0]
    inner, right = gram[1:, 1:], moment[1:]
    if isinstance(estimator, Ridge):
        estimator.coef_ = np.linalg.solve(inner + estimator.alpha * np.eye(len(inner)), right)
    else:
        estimator.coef_ = np.linalg.lstsq(inner, right, rcond=None)[0]
    estimator.intercept_ = float(sums["moment"][0] / count - mean[1:] @ estimator.coef_) if estimator.fit_intercept else 0.0
    estimator.n_features_in_ = len(inner)
    return estimator


def support_of(machine: SVC, x: Array, y: Array) -> dict[str, Array]:
    """Fit the machine to a site's records, and give those of them, with their labels, that are its support vectors: x float64, and y.

    They are the site's own records, as they are: see `SVMRecipe`. Labels must be numbers.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y)
    machine.fit(x, y)
    return {"x": x[machine.support_], "y": y[machine.support_]}


def fit_support(machine: SVC, params: Mapping[str, Array]) -> Any:
    """Fit the machine to the support vectors of all sites, as `SVMRecipe` brings them together. Returns the machine.

    Give its kernel a `gamma` in numbers: "scale" and "auto" hang on the records, and would make another kernel of the support vectors.
    """
    return machine.fit(params["x"], params["y"])
