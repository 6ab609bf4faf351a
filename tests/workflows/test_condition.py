from __future__ import annotations

import math

import pytest

from hanse.errors import ConfigError
from hanse.workflows.condition import Condition, Goal


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("accuracy >= 0.95", 0.95, True),
        ("accuracy >= 0.95", 0.9499, False),
        ("accuracy > 0.95", 0.95, False),
        ("accuracy>0.95", 0.96, True),
        (" accuracy <= 1e-3 ", 0.001, True),
        ("accuracy < -2", -2.0, False),
        ("accuracy < inf", 1e300, True),
        ("accuracy >= 0", math.nan, False),
        ("accuracy < 0", math.nan, False),
    ],
)
def test_a_bound_on_a_metric(text: str, value: float, holds: bool) -> None:
    condition = Condition(text)
    assert condition({"accuracy": value, "loss": 0.0}) is holds
    assert not condition({})


def test_what_it_reads_and_prints() -> None:
    condition = Condition("val/accuracy_1>=0.950")
    assert (condition.metric, condition.sign, condition.bound) == ("val/accuracy_1", ">=", 0.95)
    assert str(condition) == "val/accuracy_1 >= 0.95"


@pytest.mark.parametrize(
    "text", ["", "accuracy", "accuracy >= ", ">= 3", "accuracy == 1", "accuracy = 1", "accuracy >= high", "a b > 1", "a > 1 > 0", "a > nan"]
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ConfigError, match="is no condition: write a metric"):
        Condition(text)


@pytest.mark.parametrize(
    ("text", "metric", "lowest"),
    [
        ("max accuracy", "accuracy", False),
        (" min  val/loss ", "val/loss", True),
    ],
)
def test_a_goal(text: str, metric: str, lowest: bool) -> None:
    goal = Goal(text)
    assert (goal.metric, goal.lowest) == (metric, lowest)


@pytest.mark.parametrize("text", ["", "best accuracy", "accuracy", "loss", "max", "min", "max a b", "loss < 3"])
def test_what_is_no_goal(text: str) -> None:
    with pytest.raises(ConfigError, match="is no goal: write 'max' or 'min'"):
        Goal(text)
