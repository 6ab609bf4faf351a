from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from hanse.aggregation.qffl import QFFL
from hanse.errors import ConfigError, UpdateRejected
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Update

F32 = np.float32


def combined(rows, losses, *, reference=None, params_type="DIFF", **settings) -> FLModel:
    total = QFFL(**settings).fresh(None if reference is None else FLModel({"w": reference}))
    for number, (row, loss) in enumerate(zip(rows, losses, strict=True)):
        model = FLModel({"w": np.asarray(row, F32)}, params_type, metrics={"loss": loss}, meta={"examples": 1 + number})
        total.add(Update(f"site-{number}", TaskId("job", 0, 0, f"site-{number}"), model))
    return total.result()


def plain(deltas: np.ndarray, losses: list[float], q: float, learning_rate: float) -> np.ndarray:
    """Algorithm 2 of the paper, in its symbols."""
    L = 1 / learning_rate
    F = np.array(losses)
    dw = -L * deltas.astype(float)  # Δw_k = L (w - w_k)
    delta = F[:, None] ** q * dw
    h = q * F ** (q - 1) * (dw**2).sum(axis=1) + L * F**q
    return -delta.sum(axis=0) / h.sum()


def test_by_hand():
    # L = 2, q = 1: Δw = -2, -6 and F = 1, 3: Δ = -2, -18; h = 4 + 2, 36 + 6; 20 / 48
    result = combined([[1], [3]], [1, 3], q=1, learning_rate=0.5)
    assert_allclose(result.params["w"], [20 / 48], rtol=1e-6)
    assert result.metrics == {"loss": 2.0}  # every site counts the same


def test_q_of_zero_is_the_plain_mean():
    assert_allclose(combined([[1], [4]], [9, 0], q=0).params["w"], [2.5])


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0, 5), st.floats(0.01, 1), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_as_the_plain_reference_does(losses, q, learning_rate, seed):
    rng = np.random.default_rng(seed)
    deltas, start = rng.standard_normal((len(losses), 3)).astype(F32), rng.standard_normal(3).astype(F32)
    expected = plain(deltas, losses, q, learning_rate)
    assert_allclose(combined(deltas, losses, q=q, learning_rate=learning_rate).params["w"], expected, rtol=1e-3, atol=1e-5)
    full = combined(start + deltas, losses, reference=start, params_type="FULL", q=q, learning_rate=learning_rate)
    assert_allclose(full.params["w"], start + expected, rtol=1e-3, atol=1e-4)


def test_the_site_with_the_greater_loss_counts_for_more():
    right, left = ([[1.0], [-1.0]], [5.0, 1.0]), ([[1.0], [-1.0]], [1.0, 5.0])
    assert combined(*right, q=2).params["w"] > 0 > combined(*left, q=2).params["w"]


@pytest.mark.parametrize("loss", [-1.0, math.nan, math.inf])
def test_a_loss_that_is_none(loss):
    with pytest.raises(UpdateRejected, match=r"site 'site-0'.*q-FFL needs the loss"):
        combined([[1]], [loss])
    with pytest.raises(UpdateRejected, match="its metric 'error' is None"):
        combined([[1]], [1.0], metric="error")


def test_a_loss_of_zero_can_be_combined():
    assert np.isfinite(combined([[1], [2]], [0.0, 1.0], q=0.5).params["w"]).all()


@pytest.mark.parametrize("settings", [{"q": -1}, {"q": math.inf}, {"learning_rate": 0}])
def test_wrong_settings(settings):
    with pytest.raises(ConfigError):
        QFFL(**settings)
