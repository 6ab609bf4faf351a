"""FedDyn: a regularizer that changes with the rounds, so that what is best for each site is best for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from hanse.aggregation.form import sum_dtype
from hanse.aggregation.server_optimizer import SGD
from hanse.cohort import Cohort
from hanse.compression.cast import is_float
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import flatten, unflatten
from hanse.messages.update import Reduced
from hanse.workflows.fedavg import fedavg

RUNNING = ("*running_mean", "*running_var")
"""The names of batch normalization's running statistics in PyTorch, which are no parameters: they have a mean, and no gradient."""


async def feddyn(
    cohort: Cohort,
    model: FLModel,
    *,
    alpha: float,
    averaged: Sequence[str] = RUNNING,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> FLModel:
    """FedDyn (Acar et al., ICLR 2021, Algorithm 1).

    A site minimizes Lₖ(θ) − ⟨∇Lₖ(θₖᵗ⁻¹), θ⟩ + α/2 ‖θ − θᵗ⁻¹‖² and sends its parameters, FULL or DIFF. Then, with P of m sites,
    h ← h − α · P/m · mean(θₖ − θᵗ⁻¹) and θᵗ ← mean(θₖ) − h / α. h rides in the model's `optimizer_params`, so a restarted job goes on with
    the same bits. Tensors that are no floats, or whose flat name matches a pattern of `averaged`, have no h.

    alpha: α; it rides to the sites as `feddyn_alpha` in the task's config. settings: those of `fedavg`, but for `server_optimizer`.
    Without `examples` or `steps` in the updates' meta all sites count the same, as in the paper.
    Raises ConfigError if alpha is not above 0 or the model has no params.
    """
    if not alpha > 0:
        raise ConfigError(f"alpha is {alpha}: it must be above 0; 0.01 to 0.1 is usual")
    if model.params is None:
        raise ConfigError("FedDyn needs a first model.", hint="Give model= to the recipe.")
    sites = len(cohort.sites)

    def next_model(theta: FLModel, reduced: Reduced) -> FLModel:
        share = len(reduced.updates) / sites  # |P| / m
        mean = SGD().step(theta, reduced.model)
        is_full = reduced.model.params_type is ParamsType.FULL
        means = flatten(reduced.model.params)[0]
        before, structure = flatten(theta.params)
        after, h = flatten(mean.params)[0], dict(theta.optimizer_params)
        for name, value in means.items():
            dtype = sum_dtype(value.dtype)
            if dtype is None or not is_float(before[name].dtype) or any(fnmatchcase(name, pattern) for pattern in averaged):
                continue
            old = before[name].astype(dtype)
            delta = value - old if is_full else value
            key = f"h/{name}"
            h[key] = np.asarray(h.get(key, np.zeros_like(old)) - dtype.type(alpha * share) * delta)
            after[name] = np.asarray(old + delta - h[key] / dtype.type(alpha)).astype(before[name].dtype)
        return replace(mean, params=unflatten(after, structure), optimizer_params=h)

    return await fedavg(cohort, model, step=next_model, config={**(config or {}), "feddyn_alpha": alpha}, **settings)
