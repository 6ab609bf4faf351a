"""Logistic regression by Newton's method over sites: each step is that of the pooled rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hanse.aggregation.mean import WeightedMean
from hanse.cohort import Cohort
from hanse.messages.flmodel import FLModel
from hanse.messages.task import DERIVATIVES, Task
from hanse.statistics.logistic import Derivatives, newton_step, penalised
from hanse.workflows.condition import Condition


async def logistic_newton(
    cohort: Cohort,
    model: FLModel,
    *,
    features: Sequence[str],
    target: str,
    ridge: float = 0.0,
    rounds: int = 25,
    tolerance: float = 1e-9,
    min_updates: int | None = None,
    within_s: float | None = None,
) -> FLModel:
    """Newton's method (iteratively reweighted least squares) on the log loss summed over all sites, plus ridge / 2 · ‖w‖².

    The intercept has no penalty, so `ridge` is 1 / C of scikit-learn's `LogisticRegression`. A step that makes the loss larger is halved
    (Boyd and Vandenberghe, Convex Optimization, §9.5.2, with the halving spread over rounds).

    Returns `coef_`, float64 of shape (1, d), and `intercept_`, shape (1,). The metrics are the `loss` a row of the weights that the sites
    got, penalty and all, and the `gap`: half the Newton decrement squared, by row, about how much the loss is above its least.
    tolerance: the rounds end once the gap is at most this. within_s: seconds for a round.
    Raises TooFewUpdates if fewer than `min_updates` sites (default: all) answer; ConfigError if the Hessian has no inverse.
    """
    async for _ in cohort.rounds(model, rounds, until=Condition(f"gap <= {tolerance!r}")):
        weights = np.empty(0) if model.params is None else np.append(model.params["intercept_"], model.params["coef_"]).astype(np.float64)
        config = {"newton": {"features": list(features), "target": target, "weights": weights.tolist()}}
        task = Task(DERIVATIVES, FLModel(), config)
        reduced = await cohort.reduce(task, WeightedMean("equal"), min_updates=min_updates, within_s=within_s)
        sites, rows = len(reduced.updates), reduced.metrics["rows"] * len(reduced.updates)
        sums = Derivatives(
            reduced.metrics["loss"] * sites, reduced.model.params["gradient"] * sites, reduced.model.params["hessian"] * sites
        )
        weights = weights if weights.size else np.zeros(len(sums.gradient_p))
        sums = penalised(sums, weights, ridge)
        last = model.optimizer_params  # the step that led here, and the loss before it
        if last and not sums.loss / rows <= last["loss"] * (1 + 1e-12):
            step, loss, gap = last["step"] / 2, last["loss"], model.metrics["gap"]
            weights = weights - step
        else:
            step, loss = newton_step(sums), np.array(sums.loss / rows)
            gap = float(-(sums.gradient_p @ step)) / 2 / rows
            weights = weights + step
        params = {"coef_": weights[None, 1:], "intercept_": weights[:1]}
        model = await cohort.commit(FLModel(params, optimizer_params={"step": step, "loss": loss}), {"loss": sums.loss / rows, "gap": gap})
    return model
