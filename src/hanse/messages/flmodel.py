"""`FLModel`, the one carrier of parameters, metrics and metadata, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hanse.errors import ConfigError


class ParamsType(StrEnum):
    """Whether `params` are the parameters themselves or a difference from those of the task."""

    FULL = "FULL"
    DIFF = "DIFF"


@dataclass(slots=True)
class FLModel:
    """Named arrays with what is said about them.

    params: names to arrays (NumPy, or the trainer's own tensors until they are sent). Nested dictionaries, lists, numbers, strings,
        bytes and None travel too: see `hanse.messages.params`. None where there are no parameters yet, as in round 0 without a first model.
    params_type: FULL, the parameters; DIFF, what to add to those the task brought.
    optimizer_params: the server optimizer's moments, so that a restarted job goes on with the same bits; not sent to sites.
    metrics: names to numbers.
    start_round, current_round, total_rounds: rounds count from 0; `current_round` is None before the first.
    meta: JSON values. Known keys: `examples` and `steps`, the weights of an update.
    """

    params: Any = None
    params_type: ParamsType = ParamsType.FULL
    optimizer_params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    start_round: int = 0
    current_round: int | None = None
    total_rounds: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.params_type) is not ParamsType:
            try:
                self.params_type = ParamsType(self.params_type or ParamsType.FULL)
            except ValueError:
                raise ConfigError(f"params_type is {self.params_type!r}: it must be FULL or DIFF") from None
        for name in ("optimizer_params", "metrics", "meta"):
            value = getattr(self, name)
            if value is None:
                setattr(self, name, {})
            elif type(value) is not dict and name != "optimizer_params" and not isinstance(value, Mapping):
                raise ConfigError(f"{name} is a {type(value).__name__}: it must be a mapping of names")


def bearing(model: FLModel, params: Any, *, metrics: Mapping[str, float] | None = None, meta: Mapping[str, Any] | None = None) -> FLModel:
    """The model with these in place of its own, and without the server optimizer's; `replace` takes four times as long."""
    metrics, meta = model.metrics if metrics is None else metrics, model.meta if meta is None else meta
    return FLModel(params, model.params_type, {}, metrics, model.start_round, model.current_round, model.total_rounds, meta)
