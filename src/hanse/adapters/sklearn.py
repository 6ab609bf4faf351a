"""scikit-learn: a fitted estimator's parameters as named arrays, and back into an estimator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from sklearn.base import BaseEstimator

from hanse.errors import ConfigError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


_NOT_LEARNED = ("_", "n_", "singular_")  # private; counters; what only tells of the site's data, in a shape that hangs on its size


class SklearnAdapter:
    """See `hanse.client.framework.Adapter`. scikit-learn computes with NumPy's arrays, so that there is nothing to turn."""

    name = "sklearn"

    def params_of(self, model: Any) -> Mapping[str, Any] | None:
        return params_of(model)

    def to_array(self, value: Any) -> Array:
        raise ConfigError(f"a {type(value).__module__}.{type(value).__name__} cannot travel: send its params_of(…)")

    def from_array(self, array: Array) -> Array:
        return array

    def twin(self, tensor: Array) -> Array:
        return tensor

    def seed(self, seed: int) -> None:
        """It draws from NumPy's global generator, which is seeded anyway."""

    def limit_threads(self, threads: int) -> None:
        """Its threads are those of BLAS and OpenMP, which the process limits."""

    def preload(self) -> None:
        """Its modules are imported one by one, by whoever needs them."""

    def thread_state(self) -> None:
        """It holds none."""

    def set_thread_state(self, state: None) -> None:
        """There is none."""


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
