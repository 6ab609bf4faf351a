"""What a patched trainer does around its own methods: take the model of the task, and answer with what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import hanse.client as flare
from hanse.client.framework import from_arrays, number
from hanse.errors import ConfigError


class Exchange:
    """One trainer's part in the Client API. Metrics wait for the training that follows, or are the answer where only they are asked for."""

    def __init__(self) -> None:
        flare.init()
        self._metrics: dict[str, float] = {}
        self._measured: flare.FLModel | None = None

    def take(self, load: Callable[[Mapping[str, Any]], None]) -> None:
        """Give the parameters of the task at hand, as PyTorch tensors, to `load`; nothing where there are none yet."""
        received = flare.receive()
        if received is None:
            raise ConfigError("there is no task: the job is over.", hint="Train and evaluate in a loop: while flare.is_running().")
        if received is not self._measured:
            self._metrics, self._measured = {}, None
        if received.params is not None:
            load(from_arrays(received.params, "torch"))

    def measured(self, metrics: Mapping[str, Any]) -> None:
        """What an evaluation of the model just taken found. Values that are no finite numbers are left out."""
        plain = {name: number(value) for name, value in metrics.items()}
        self._metrics = {name: float(value) for name, value in plain.items() if value is not None and math.isfinite(value)}
        self._measured = flare.receive()
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics=self._metrics))

    def trained(self, params: Mapping[str, Any], steps: int) -> None:
        """Answer the task: the parameters after so many optimizer steps, and the metrics of those before."""
        flare.send(flare.FLModel(params=dict(params), metrics=self._metrics, meta={"steps": steps}))


def one_process(count: int) -> None:
    """Raises ConfigError if the trainer has more processes than one."""
    if count > 1:
        raise ConfigError(f"the trainer runs in {count} processes: a patched one trains in one process at a site")
