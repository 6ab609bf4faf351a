"""Conditions on metrics, as a job file can hold them: data, never code."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from hanse.errors import ConfigError

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(r"\s*(?P<metric>[^\s<>=]+)\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>\S+)\s*")
_GOAL = re.compile(r"\s*(?P<goal>max|min)\s+(?P<metric>[^\s<>=]+)\s*")


@dataclass(frozen=True)
class Condition:
    """A bound on one metric, such as `accuracy >= 0.95`. False while it is missing or NaN. Raises ConfigError if malformed."""

    text: str
    metric: str = field(init=False)
    sign: str = field(init=False)
    bound: float = field(init=False)

    def __post_init__(self) -> None:
        match = _CONDITION.fullmatch(self.text) if isinstance(self.text, str) else None
        try:
            bound = float(match["bound"]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or math.isnan(bound):
            raise ConfigError(f"{self.text!r} is no condition: write a metric, one of >= <= > <, and a number, such as 'accuracy >= 0.95'")
        for name, value in (("metric", match["metric"]), ("sign", match["sign"]), ("bound", bound)):
            object.__setattr__(self, name, value)

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        return bool(_COMPARE[self.sign](metrics.get(self.metric, math.nan), self.bound))

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Goal:
    """What makes a model the best: `max accuracy` or `min loss`. Raises ConfigError if it is malformed."""

    text: str
    metric: str = field(init=False)
    lowest: bool = field(init=False)

    def __post_init__(self) -> None:
        match = _GOAL.fullmatch(self.text) if isinstance(self.text, str) else None
        if match is None:
            raise ConfigError(f"{self.text!r} is no goal: write 'max' or 'min' and a metric, such as 'max accuracy'")
        object.__setattr__(self, "metric", match["metric"])
        object.__setattr__(self, "lowest", match["goal"] == "min")
