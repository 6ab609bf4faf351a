from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from hanse.aggregation.fednova import FedNova
from hanse.errors import ConfigError, UpdateRejected
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Update

F32 = np.float32


def combined(rows, examples, steps, *, reference=None, momentum=0.0, params_type="DIFF") -> FLModel:
    total = FedNova(momentum).fresh(None if reference is None else FLModel({"w": reference}))
    for number, (row, n, tau) in enumerate(zip(rows, examples, steps, strict=True)):
        model = FLModel({"w": np.asarray(row, F32)}, params_type, metrics={"loss": float(number)}, meta={"examples": n, "steps": tau})
        total.add(Update(f"site-{number}", TaskId("job", 0, 0, f"site-{number}"), model))
    return total.result()


def test_a_site_with_more_steps_counts_no_more():
    # p = 1/4, 3/4; τ = 2, 6; τ_eff = 1/4·2 + 3/4·6 = 5; 5 · (1/4 · 4/2 + 3/4 · 12/6) = 10
    result = combined([[4]], [1], [2]), combined([[4], [12]], [1, 3], [2, 6])
    assert result[0].params["w"] == 4
    assert result[1].params["w"] == 10
    assert result[1].metrics == {"loss": 0.75}


def test_momentum_of_two_steps():
    # ρ = 1/2: ‖a‖ = 1 for one step, 1 + (1 + 1/2) = 5/2 for two; (1 + 5/2)/2 · (7/1 + 10/2.5)/2 = 9.625
    assert_allclose(combined([[7], [10]], [1, 1], [1, 2], momentum=0.5).params["w"], [9.625])


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 50)), min_size=1, max_size=8), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_as_the_plain_reference_does(sites, seed):
    examples, steps = zip(*sites, strict=True)
    rng = np.random.default_rng(seed)
    deltas, start = rng.standard_normal((len(sites), 3)).astype(F32), rng.standard_normal(3).astype(F32)
    p, tau = np.array(examples) / sum(examples), np.array(steps)
    expected = (p @ tau) * ((p / tau) @ deltas)
    assert_allclose(combined(deltas, examples, steps).params["w"], expected, rtol=1e-4, atol=1e-5)
    full = combined(start + deltas, examples, steps, reference=start, params_type="FULL")
    assert_allclose(full.params["w"], start + expected, rtol=1e-3, atol=1e-4)


def test_the_same_steps_everywhere_is_fedavg():
    assert_allclose(combined([[1], [5]], [3, 1], [7, 7]).params["w"], [2], rtol=1e-6)


def test_a_site_without_params_only_adds_metrics():
    total = FedNova().fresh()
    for site, params in (("a", {"w": np.array([6], F32)}), ("b", None)):
        model = FLModel(params, "DIFF", metrics={"loss": 1.0 if params else 3.0}, meta={"examples": 2, "steps": 3})
        total.add(Update(site, TaskId("job", 0, 0, site), model))
    result = total.result()
    assert (result.params["w"], result.metrics) == (6, {"loss": 2.0})


@pytest.mark.parametrize("meta", [{"examples": 3}, {"steps": 3}, {"examples": 1, "steps": 0}])
def test_examples_and_steps_must_be_there(meta):
    with pytest.raises(UpdateRejected, match="site 'a'"):
        FedNova().add(Update("a", TaskId("job", 0, 0, "a"), FLModel({"w": np.ones(1)}, "DIFF", meta=meta)))


def test_full_needs_the_tasks_model():
    with pytest.raises(UpdateRejected, match="model it started from is not known"):
        combined([[4]], [1], [2], params_type="FULL")


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_wrong_momentum(momentum):
    with pytest.raises(ConfigError, match="momentum"):
        FedNova(momentum)
