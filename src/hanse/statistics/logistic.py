"""Logistic regression by Newton's method, of which a site's part is a sum over its rows.

n = rows, p = weights: the intercept, then one a column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hanse.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]


class Derivatives(NamedTuple):
    """Of the log loss, summed over rows: its value, its gradient, shape (p,), and its Hessian, shape (p, p)."""

    loss: float
    gradient_p: Array
    hessian_pp: Array


def derivatives(rows_nd: Array, labels_n: Array, weights_p: Array) -> Derivatives:
    """Of Σ log(1 + exp(−z)) over rows with label 1 and Σ log(1 + exp(z)) over those with 0, where z = w₀ + x·w. All float64."""
    x = np.column_stack([np.ones(len(rows_nd)), rows_nd])
    z = x @ weights_p
    chance = 1 / (1 + np.exp(-np.abs(z)))
    chance = np.where(z >= 0, chance, 1 - chance)
    loss = float((np.logaddexp(0.0, z) - labels_n * z).sum())
    return Derivatives(loss, x.T @ (chance - labels_n), x.T @ (x * (chance * (1 - chance))[:, None]))


def penalised(sums: Derivatives, weights_p: Array, ridge: float) -> Derivatives:
    """With ridge / 2 · ‖w‖² added to the loss; the intercept is free."""
    charge = np.full(len(weights_p), ridge)
    charge[0] = 0.0
    pull = charge * weights_p
    return Derivatives(sums.loss + float(pull @ weights_p) / 2, sums.gradient_p + pull, sums.hessian_pp + np.diag(charge))


def newton_step(sums: Derivatives) -> Array:
    """−H⁻¹ g, shape (p,), with H scaled to a unit diagonal first, so that columns of any unit do.

    Raises ConfigError if H has no inverse: columns depend on each other, or a line parts the labels without error.
    """
    hint = "Leave a column out, or give ridge."
    diagonal = np.diagonal(sums.hessian_pp)
    if not (np.isfinite(diagonal).all() and (diagonal > 0).all()):
        raise ConfigError("the Hessian has no inverse: a column is constant, or a line parts the labels.", hint=hint)
    scale = 1 / np.sqrt(diagonal)
    scaled = sums.hessian_pp * scale[:, None] * scale
    if np.linalg.cond(scaled) > 1e13:
        raise ConfigError("the Hessian has no inverse: columns depend on each other, or a line parts the labels.", hint=hint)
    return np.asarray(-scale * np.linalg.solve(scaled, scale * sums.gradient_p))
