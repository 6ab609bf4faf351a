from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from hanse.aggregation.server_optimizer import SGD, Adagrad, Adam, ServerOptimizer, Yogi
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType

F32 = np.float32
ALL: list[ServerOptimizer] = [SGD(), SGD(0.5), SGD(1.0, 0.9), Adagrad(), Adagrad(beta1=0.5), Adam(), Yogi()]


def model(*values: float, dtype: object = F32) -> FLModel:
    return FLModel({"w": np.array(values, dtype)})


def test_sgd_takes_a_full_mean_as_it_is():
    mean = model(0.1, -0.0)
    assert SGD(1.0).step(model(1e8, 5), mean).params["w"].tobytes() == mean.params["w"].tobytes()


def test_sgd_steps_part_of_the_way():
    assert_array_equal(SGD(0.5).step(model(1, 2), model(3, 6)).params["w"], [2, 4])  # 1 + 0.5·2,  2 + 0.5·4


def test_momentum_by_hand():
    optimizer = SGD(0.5, momentum=0.5)
    first = optimizer.step(model(0), FLModel({"w": np.array([4], F32)}, "DIFF"))
    assert first.params["w"] == 2  # m = 4, 0 + 0.5·4
    second = optimizer.step(first, model(6))
    assert second.optimizer_params["momentum/w"] == 6  # 0.5·4 + (6 - 2)
    assert second.params["w"] == 5  # 2 + 0.5·6


def test_adaptive_steps_by_hand():
    tau, delta = 0.5, 2.0  # v starts at 0.25, Δ² is 4
    cases = {
        Adagrad(0.1, tau=tau): (0.1 * delta / (math.sqrt(4.25) + tau), {"variance/w": 4.25}),
        Adam(0.1, 0.75, 0.5, tau): (0.1 * 0.5 / (math.sqrt(2.125) + tau), {"momentum/w": 0.5, "variance/w": 2.125}),
        Yogi(0.1, 0.75, 0.5, tau): (0.1 * 0.5 / (math.sqrt(2.25) + tau), {"momentum/w": 0.5, "variance/w": 2.25}),
    }
    for optimizer, (change, state) in cases.items():
        new = optimizer.step(model(1), model(3))
        assert_allclose(new.params["w"], [1 + change], rtol=1e-6)
        assert {name: float(value[0]) for name, value in new.optimizer_params.items()} == state


@given(st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=6))
def test_adaptive_steps_agree_with_a_slow_plain_reference(deltas):
    rate, beta1, beta2, tau = 0.1, 0.9, 0.99, 1e-3
    for optimizer, second in (
        (Adagrad(rate, beta1, tau), lambda v, d: v + d * d),
        (Adam(rate, beta1, beta2, tau), lambda v, d: beta2 * v + (1 - beta2) * d * d),
        (Yogi(rate, beta1, beta2, tau), lambda v, d: v - (1 - beta2) * d * d * (1 if v > d * d else -1 if v < d * d else 0)),
    ):
        state = model(0, 0, 0, dtype=np.float64)
        w, m, v = [0.0] * 3, [0.0] * 3, [tau**2] * 3
        for delta in deltas:
            state = optimizer.step(state, FLModel({"w": np.array(delta)}, "DIFF"))
            for k, d in enumerate(delta):
                m[k] = beta1 * m[k] + (1 - beta1) * d
                v[k] = second(v[k], d)
                w[k] += rate * m[k] / (math.sqrt(v[k]) + tau)
        assert_allclose(state.params["w"], w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ALL)
def test_inputs_stay_and_form_dtypes_rounds_and_meta_are_the_models(optimizer):
    params = {
        "net": [np.array([1, 2], F32), np.array(3, F32)],
        "half": np.array([1, 2], ml_dtypes.bfloat16),
        "n": np.array(4),
        "yes": np.array([True]),
        "name": "linear",
    }
    before = FLModel(params, start_round=1, current_round=2, total_rounds=5, meta={"a": 1}, metrics={"loss": 1.0})
    mean = FLModel(
        {
            "net": [np.array([2, 2], F32), np.array(4, F32)],
            "half": np.array([2, 2], ml_dtypes.bfloat16),
            "n": np.array(6),
            "yes": np.array([False]),
            "name": "linear",
        }
    )
    for _ in range(2):
        copies = [np.copy(before.params["net"][0]), {name: np.copy(value) for name, value in before.optimizer_params.items()}]
        after = optimizer.step(before, mean)
        assert_array_equal(before.params["net"][0], copies[0])
        for name, value in copies[1].items():
            assert_array_equal(before.optimizer_params[name], value)
        assert after.params["net"][1].shape == ()
        assert isinstance(after.params["net"][1], np.ndarray)
        assert after.params["half"].dtype == ml_dtypes.bfloat16
        assert (after.params["n"], after.params["yes"][0], after.params["name"]) == (6, False, "linear")
        assert (after.start_round, after.current_round, after.total_rounds, after.meta) == (1, 2, 5, {"a": 1})
        assert all(isinstance(value, np.ndarray) and value.dtype == F32 for value in after.optimizer_params.values())
        assert not any(name.endswith(("/n", "/yes")) for name in after.optimizer_params)
        before = after


@pytest.mark.parametrize("optimizer", ALL)
def test_a_diff_and_the_full_model_it_leads_to_make_the_same_step(optimizer):
    start = FLModel({"w": np.array([1, 2], F32), "n": np.array([5])})
    full = optimizer.step(start, FLModel({"w": np.array([2, 0], F32), "n": np.array([7])}))
    diff = optimizer.step(start, FLModel({"w": np.array([1, -2], F32), "n": np.array([2])}, "DIFF"))
    assert_array_equal(full.params["w"], diff.params["w"])
    assert full.params["n"] == diff.params["n"] == 7
    assert full.params["w"][0] > 1
    assert full.params["w"][1] < 2
    assert diff.params_type is ParamsType.FULL


@pytest.mark.parametrize("optimizer", ALL)
def test_tensors_that_the_mean_lacks_stay(optimizer):
    start = FLModel({"net": {"w": np.array([1], F32), "head": np.array([9], F32)}})
    start = optimizer.step(start, FLModel({"net": {"w": np.array([2], F32), "head": np.array([8], F32)}}))
    after = optimizer.step(start, FLModel({"net/w": np.array([3], F32)}))
    assert after.params["net"]["head"] == start.params["net"]["head"]
    for name in after.optimizer_params:
        same = np.array_equal(after.optimizer_params[name], start.optimizer_params[name])
        assert same == name.endswith("head")


def test_a_model_without_params_becomes_the_first_mean():
    after = Adam().step(FLModel(current_round=0, meta={"a": 1}), model(1))
    assert after.params["w"] == 1
    assert (after.current_round, after.meta) == (0, {"a": 1})
    with pytest.raises(ConfigError, match="no params yet"):
        Adam().step(FLModel(), FLModel({"w": np.array([1], F32)}, "DIFF"))


def test_a_mean_that_cannot_be_stepped_with():
    with pytest.raises(ConfigError, match="no update brought params"):
        SGD().step(model(1), FLModel())
    with pytest.raises(ConfigError, match="1 tensors that the model lacks, the first is 'v'"):
        SGD().step(model(1), FLModel({"v": np.array([1], F32)}))
    with pytest.raises(ConfigError, match="complex"):
        Adam().step(model(1, dtype=np.complex64), model(1, dtype=np.complex64))


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (SGD, {"learning_rate": 0}),
        (SGD, {"learning_rate": math.nan}),
        (SGD, {"momentum": 1}),
        (SGD, {"momentum": -0.1}),
        (Adagrad, {"tau": 0}),
        (Adam, {"beta1": 1}),
        (Adam, {"beta2": math.nan}),
        (Yogi, {"tau": math.inf}),
    ],
)
def test_wrong_settings(optimizer, arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        optimizer(**arguments)
