"""Have the shares of the classes changed, and nothing else? Answered from a model's decisions alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from hanse.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]


def new_shares(confusion_kk: Array, decided_k: Array) -> Array:
    """Each class's share in data of which only the decisions are known, if p(x | class) is what it was: float64, shape (k,).

    Black box shift estimation (Lipton, Wang and Smola, Detecting and Correcting for Label Shift with Black Box Predictors, ICML 2018,
    equation 4): the weights w solve C w = μ, and the shares are w times the old ones; here cut to 0…1 and scaled to sum to 1.

    confusion_kk: C, counts or shares in the reference; row: what was decided, column: the true class.
    decided_k: μ, how often each class was decided in the new data, counts or shares.
    Raises: ConfigError if decisions do not depend on the class, so that nothing follows from them.
    """
    joint = np.asarray(confusion_kk, np.float64) / np.sum(confusion_kk)
    shares = joint.sum(0)
    if not (shares > 0).all() or np.linalg.cond(joint / shares) > 1e6:
        raise ConfigError("the model's decisions do not tell the classes apart in the reference: the shares cannot be estimated from them")
    decided = np.asarray(decided_k, np.float64) / np.sum(decided_k)
    new = np.clip(np.linalg.solve(joint, decided) * shares, 0, None)
    return np.asarray(new / new.sum())


def standard_error(confusion_22: Array, decided_2: Array) -> float:
    """Of the second class's share by `new_shares`, for two classes: that of the share decided so, divided by TPR − FPR."""
    rates = np.asarray(confusion_22, np.float64)[1] / np.sum(confusion_22, axis=0)
    n = float(np.sum(decided_2))
    share = float(decided_2[1]) / n
    return float(np.sqrt(share * (1 - share) / n) / abs(rates[1] - rates[0]))
