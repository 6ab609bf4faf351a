"""Staleness functions against Xie et al., 2019, section 5.2, worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hanse.aggregation.staleness import Staleness, scaled_difference, whole
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType


@pytest.mark.parametrize(
    ("text", "staleness", "weight"),
    [
        ("constant", 0, 1.0),
        ("constant", 9, 1.0),
        ("polynomial 0.5", 0, 1.0),
        ("polynomial 0.5", 3, 0.5),  # 4 ** -0.5
        ("polynomial 2", 1, 0.25),  # 2 ** -2
        ("polynomial 0", 7, 1.0),
        ("hinge 10 4", 0, 1.0),
        ("hinge 10 4", 4, 1.0),
        ("hinge 10 4", 5, 1 / 11),  # 1 / (10 · 1 + 1)
        (" hinge  0.5 2 ", 6, 1 / 3),  # 1 / (0.5 · 4 + 1)
    ],
)
def test_weights_by_hand(text: str, staleness: int, weight: float) -> None:
    assert Staleness(text)(staleness) == pytest.approx(weight, rel=1e-15)


@pytest.mark.parametrize(
    "text", ["", "linear", "constant 1", "polynomial", "polynomial a", "polynomial -1", "polynomial nan", "hinge 1", "hinge 1 inf", 3, None]
)
def test_malformed(text: Any) -> None:
    with pytest.raises(ConfigError, match="is no staleness function: write 'constant'"):
        Staleness(text)


SENT = FLModel({"w": np.array([1.0, 2.0], "f4"), "seen": np.array(5), "on": np.array([True, False])})


def test_a_difference_is_scaled_and_integers_are_not() -> None:
    update = FLModel({"w": np.array([3.0, 0.0], "f4"), "seen": np.array(8), "on": np.array([False, False])}, meta={"examples": 3})
    found = scaled_difference(update, SENT, 0.25)
    assert found.params_type is ParamsType.DIFF
    assert found.meta == {"examples": 3}
    assert found.params["w"].tolist() == [0.5, -0.5]
    assert found.params["w"].dtype == np.float32
    assert found.params["seen"] == 3
    assert found.params["on"].tolist() == [False, False]
    assert update.params["w"].tolist() == [3.0, 0.0]  # as it was


def test_a_difference_of_narrow_floats_is_taken_in_wider_ones() -> None:
    sent, update = (FLModel({"w": np.array([value], "f2")}) for value in (2048.0, 2050.0))
    found = scaled_difference(update, sent, 1 / 8)
    assert (found.params["w"].tolist(), found.params["w"].dtype) == ([0.25], np.float16)


def test_a_diff_is_scaled_and_a_fresh_one_is_taken_as_it_is() -> None:
    diff = FLModel({"w": np.array([4.0, -4.0], "f4")}, ParamsType.DIFF)
    assert scaled_difference(diff, SENT, 1.0) is diff
    assert scaled_difference(diff, SENT, 0.5).params["w"].tolist() == [2.0, -2.0]


def test_a_diff_made_whole() -> None:
    diff = FLModel({"w": np.array([4.0, -4.0], "f4"), "seen": np.array(2)}, ParamsType.DIFF)
    found = whole(diff, SENT)
    assert (found.params_type, found.params["w"].tolist(), found.params["seen"]) == (ParamsType.FULL, [5.0, -2.0], 7)
    assert whole(SENT, FLModel()) is SENT


def test_nested_params_keep_their_form_and_what_does_not_fit_is_left_to_be_refused() -> None:
    sent = FLModel({"a": {"w": np.ones(2)}, "b": [np.ones(1)]})
    found = scaled_difference(FLModel({"a": {"w": np.full(2, 3.0)}, "b": [np.ones(4)]}), sent, 1.0)
    assert found.params["a"]["w"].tolist() == [2.0, 2.0]
    assert found.params["b"][0].shape == (4,)
    assert scaled_difference(FLModel(metrics={"x": 1.0}), sent, 0.5).params is None
