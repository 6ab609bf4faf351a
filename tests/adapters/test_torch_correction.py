"""The PyTorch site's part of SCAFFOLD and FedDyn, against the formulas written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hanse.adapters.torch_correction import FedDyn, Scaffold  # noqa: E402
from hanse.client.framework import to_arrays  # noqa: E402
from hanse.errors import ConfigError  # noqa: E402
from hanse.messages.flmodel import FLModel, ParamsType  # noqa: E402

CURVE, POINT = 2.0, 3.0  # the loss is ½ · 2 · (w − 3)²


def net_at(value: float = 0.0) -> Any:
    net = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(value)
    return net


def received(x: float, c: float) -> FLModel:
    return FLModel({"weight": torch.tensor([[x]]), "control": {"weight": torch.tensor([[c]])}})


def steps(net: Any, optimizer: Any, corrections: Any, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        (CURVE / 2 * (net.weight - POINT).square().sum()).backward()
        corrections.apply()
        optimizer.step()


def test_scaffold_by_hand() -> None:
    """x = 1, c = 1, cᵢ = −1, rate 0.25: y₁ = 1 − 0.25 (2 (1 − 3) + 1 + 1) = 1.5, y₂ = 1.5 − 0.25 (−3 + 2) = 1.75.
    cᵢ⁺ = −1 − 1 + (1 − 1.75) / 0.5 = −3.5."""
    net, state = net_at(), {"scaffold": {"weight": np.array([[-1.0]], np.float32)}}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
    model = received(1.0, 1.0)
    corrections = Scaffold(net, optimizer, model, state)
    assert list(model.params) == ["weight"]  # a state dictionary again
    assert net.weight.item() == 1.0
    steps(net, optimizer, corrections, 2)
    answer = corrections.finish(metrics={"loss": 1}, meta={"examples": 7})
    assert answer.params_type is ParamsType.DIFF
    assert answer.params["weight"].item() == 0.75
    assert answer.params["control"]["weight"].item() == -2.5
    assert state["scaffold"]["weight"].item() == -3.5
    assert (answer.metrics, answer.meta) == ({"loss": 1}, {"examples": 7})


@pytest.mark.parametrize("momentum", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.25}])
def test_of_a_constant_gradient_the_control_variate_is_that_gradient(momentum: Any) -> None:
    """However momentum and a schedule make steps longer, option II reads the gradient off the way gone."""
    net, state = net_at(), dict[str, Any]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, **momentum)
    corrections = Scaffold(net, optimizer, received(0.0, 0.0), state)
    for number in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        optimizer.zero_grad()
        (net.weight * 5).sum().backward()
        corrections.apply()
        optimizer.step()
    corrections.finish()
    assert state["scaffold"]["weight"].item() == pytest.approx(5.0, rel=1e-5)


def test_buffers_and_frozen_parameters_have_no_control_variate() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    net[2].requires_grad_(False)
    params = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    control = {name: torch.zeros_like(tensor) for name, tensor in params.items() if tensor.is_floating_point()}
    state: dict[str, Any] = {}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    corrections = Scaffold(net, optimizer, FLModel({**params, "control": control}), state)
    net(torch.randn(8, 2)).square().mean().backward()
    corrections.apply()
    optimizer.step()
    answer = corrections.finish()
    delta_c = answer.params.pop("control")
    assert delta_c.keys() == control.keys()
    assert set(state["scaffold"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert delta_c["0.weight"].abs().sum() > 0
    assert delta_c["1.running_mean"].abs().sum() == delta_c["2.weight"].abs().sum() == 0
    assert answer.params["1.num_batches_tracked"].item() == 1
    now = net.state_dict()
    assert all(torch.allclose(params[name] + diff, now[name]) for name, diff in answer.params.items())


def test_feddyn_by_hand() -> None:
    """θᵗ⁻¹ = 1, ∇ = −2, α = 0.5, rate 0.25. θ₁ = 1 − 0.25 (2 (1 − 3) + 2) = 1.5; θ₂ = 1.5 − 0.25 (−3 + 2 + 0.25) = 1.6875.
    ∇ = −2 − 0.5 · 0.6875 = −2.34375."""
    net, state = net_at(), {"feddyn": {"weight": np.array([[-2.0]], np.float32)}}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
    corrections = FedDyn(net, FLModel({"weight": torch.tensor([[1.0]])}), state, 0.5)
    steps(net, optimizer, corrections, 2)
    answer = corrections.finish(meta={"examples": 7})
    assert answer.params["weight"].item() == 1.6875
    assert state["feddyn"]["weight"].item() == -2.34375
    assert answer.meta == {"examples": 7}


def test_a_half_precision_model_goes_from_task_to_task() -> None:
    """As the runtime has it: what is in the state comes back as arrays."""
    for kind in (Scaffold, FedDyn):
        state: dict[str, Any] = {}
        for _ in range(2):
            net = net_at(1.0).to(torch.bfloat16)
            params = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
            if kind is Scaffold:
                model = FLModel({**params, "control": {"weight": torch.zeros(1, 1)}})
                corrections: Any = Scaffold(net, optimizer, model, state)
            else:
                corrections = FedDyn(net, FLModel(params), state, 0.5)
            steps(net, optimizer, corrections, 2)
            answer = corrections.finish()
            state = to_arrays(state)
        assert answer.params["weight"].dtype == torch.bfloat16
        [kept] = state.values()
        assert kept["weight"].dtype == np.float32
        assert kept["weight"].item() != 0


def test_what_does_not_go() -> None:
    net = net_at()
    with pytest.raises(ConfigError, match=r"torch\.optim\.SGD with one group, not of Adam"):
        Scaffold(net, torch.optim.Adam(net.parameters()), received(0, 0), {})
    with pytest.raises(ConfigError, match="no control variate"):
        Scaffold(net, torch.optim.SGD(net.parameters(), lr=1), FLModel(net.state_dict()), {})
    with pytest.raises(ConfigError, match="without a step"):
        Scaffold(net, torch.optim.SGD(net.parameters(), lr=1), received(0, 0), {}).finish()
    with pytest.raises(ConfigError, match="above 0"):
        FedDyn(net, FLModel(net.state_dict()), {}, 0)
