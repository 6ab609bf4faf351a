"""SCAFFOLD: each site corrects its local steps by how its gradient differs from everybody's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hanse.aggregation.form import sum_dtype
from hanse.aggregation.server_optimizer import SGD
from hanse.cohort import Cohort
from hanse.compression.cast import is_float
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import flatten
from hanse.messages.task import TRAIN, Task
from hanse.messages.update import Reduced
from hanse.workflows.fedavg import fedavg

Array = np.ndarray[Any, np.dtype[Any]]

CONTROL = "control"
"""Under this name the control variates stand beside the parameters, in tasks and in updates: flat tensor name to array."""


async def scaffold(
    cohort: Cohort, model: FLModel, *, server_learning_rate: float = 1.0, config: Mapping[str, Any] | None = None, **settings: Any
) -> FLModel:
    """SCAFFOLD (Karimireddy et al., ICML 2020, Algorithm 1).

    A training task's params are the model's with one name more, "control": the server's control variate c, by flat tensor name. A site
    sends DIFF: Δy under the model's names and Δc under "control". Then x ← x + η_g · mean(Δy) and c ← c + |S|/N · mean(Δc). Only float
    tensors have a control variate. c rides in the model's `optimizer_params`, so a restarted job goes on with the same bits; a task to
    evaluate, the committed and the best model are without it.

    server_learning_rate: η_g. settings: those of `fedavg`, but for `server_optimizer`. Without `examples` or `steps` in the updates' meta
    all sites count the same, as in the paper.
    Raises ConfigError if the model has no params, is no mapping of names, or has a tensor named "control".
    """
    step = SGD(server_learning_rate)  # checks it
    sites = len(cohort.sites)

    def task(x: FLModel) -> Task:
        return Task(TRAIN, replace(x, params={**_named(x), CONTROL: control_of(x)}), config or {})

    def next_model(x: FLModel, reduced: Reduced) -> FLModel:
        share = len(reduced.updates) / sites  # |S| / N
        if reduced.model.params is not None and reduced.model.params_type is not ParamsType.DIFF:
            raise ConfigError("SCAFFOLD's sites send DIFF: what to add to the params and to the control variate.")
        means = {} if reduced.model.params is None else flatten(reduced.model.params)[0]
        c = {_path(name): array for name, array in control_of(x).items()}
        delta_c = {name: means.pop(name) for name in c if name in means}
        c |= {name: c[name] + c[name].dtype.type(share) * delta for name, delta in delta_c.items()}
        stepped = step.step(x, replace(reduced.model, params=means or None))
        return replace(stepped, optimizer_params=c)

    return await fedavg(cohort, model, task=task, step=next_model, **settings)


def control_of(model: FLModel) -> dict[str, Array]:
    """The server's control variate by flat tensor name: what rides in `optimizer_params`, and zeros in the beginning."""
    control = {}
    for name, array in flatten(model.params)[0].items():
        if is_float(array.dtype):
            zero = model.optimizer_params.get(_path(name))
            control[name] = np.zeros(array.shape, sum_dtype(array.dtype)) if zero is None else zero
    return control


def _named(model: FLModel) -> Mapping[str, Any]:
    if not isinstance(model.params, Mapping):
        raise ConfigError("SCAFFOLD needs a first model, whose params are a mapping of names.", hint="Give model= to the recipe.")
    if CONTROL in model.params:
        raise ConfigError(f"the model has params named {CONTROL!r}, which SCAFFOLD needs for its control variate: name them otherwise")
    return model.params


def _path(name: str) -> str:
    """The flat name, in a task's params, of the control variate of the tensor `name`; see `hanse.messages.params`."""
    return f"{CONTROL}/{name.replace('~', '~0').replace('/', '~1')}"
