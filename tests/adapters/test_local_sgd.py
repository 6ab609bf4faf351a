from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.app import App, Site
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.seeds import seed_for

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy, mse_loss  # noqa: E402

from hanse.adapters.local_sgd import LocalSGD  # noqa: E402
from hanse.adapters.stacked_sgd import kind_of, orders  # noqa: E402

CLASSES = 3


def site(rank: int, **config: Any) -> Site:
    return Site(f"site-{rank}", rank, 20, "job", config, {}, 7, ("site", f"site-{rank}", "train", 0, 0))


def data(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """4 to 13 examples of 5 features, in 3 classes."""
    rng = np.random.default_rng(site.rank)
    count = 4 + site.rank % 10
    return torch.from_numpy(rng.standard_normal((count, 5), np.float32)), torch.from_numpy(rng.integers(CLASSES, size=count))


def to_numbers(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = data(site)
    return inputs, nn.functional.one_hot(labels, CLASSES).float()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 4, bias=False)), nn.GELU(), nn.Linear(4, CLASSES))


def frozen() -> nn.Module:
    net = mlp()
    net[0].requires_grad_(False)
    return net


class Residual(nn.Module):
    """No sequence of layers: it can be stacked by vmap alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.norm(x + self.inner(x).relu()))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def model_of(module: nn.Module) -> FLModel:
    return FLModel({name: tensor.clone() for name, tensor in module.state_dict().items()})


def alone(local: LocalSGD, model: FLModel, of: Site) -> FLModel:
    return copy.deepcopy(local(model, of))


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_one_step_by_hand() -> None:
    """w = 2, examples (1, 0) and (3, 0): loss (4 + 36)/2 = 20, slope (2·2·1 + 2·6·3)/2 = 20, so w - 0.1·20 = 0."""
    net = nn.Linear(1, 1, bias=False)
    inputs, labels = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
    local = LocalSGD(module=net, data=lambda site: (inputs, labels), loss="mse", lr=0.1)
    answer = local(FLModel({"weight": torch.tensor([[2.0]])}), site(0))
    assert answer.params["weight"].item() == pytest.approx(0, abs=1e-6)
    assert answer.metrics == {"loss": pytest.approx(20)}
    assert answer.meta == {"examples": 2, "steps": 1}


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_it_is_the_textbook_loop(momentum: float, weight_decay: float, mu: float) -> None:
    """Three epochs over 11 examples in batches of 4, beside `torch.optim.SGD` and a loss with the proximal term, in the same orders."""
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    local = LocalSGD(module=mlp, data=data, epochs=3, batch_size=4, mu=mu, **settings)
    answer = alone(local, model_of(mlp()), site(7))

    net, (inputs, labels) = mlp(), data(site(7))
    start = [param.detach().clone() for param in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), **settings)
    batches = list(local._descent().rows(11, seed_for(7, *site(7).stream, "order")))
    assert [len(rows) for rows in batches] == [4, 4, 3] * 3
    assert sorted(torch.cat(batches[:3]).tolist()) == list(range(11))
    assert torch.cat(batches[:3]).tolist() != torch.cat(batches[3:6]).tolist()
    losses = []
    for rows in batches:
        loss = cross_entropy(net(inputs[rows]), labels[rows])
        losses.append((loss.item(), len(rows)))
        distance = sum((param - first).square().sum() for param, first in zip(net.parameters(), start, strict=True))
        optimizer.zero_grad()
        (loss + mu / 2 * distance).backward()
        optimizer.step()
    assert_same(answer.params, net.state_dict())
    assert answer.metrics["loss"] == pytest.approx(sum(loss * count for loss, count in losses) / 33, rel=1e-5)
    assert answer.meta == {"examples": 11, "steps": 9}


STACKED = {
    "one batch": (mlp, data, {"batch_size": None}),
    "batches in drawn orders": (mlp, data, {"batch_size": 3, "epochs": 2}),
    "in the order given": (mlp, data, {"batch_size": 3, "shuffle": False}),
    "momentum, weight decay, FedProx": (mlp, data, {"batch_size": 4, "epochs": 2, "momentum": 0.9, "weight_decay": 0.1, "mu": 0.3}),
    "so many steps": (mlp, data, {"batch_size": 3, "steps": 7, "momentum": 0.5}),
    "numbers": (mlp, to_numbers, {"batch_size": 3, "loss": "mse"}),
    "yes or no": (mlp, to_numbers, {"batch_size": 3, "loss": "bce_with_logits"}),
    "frozen": (frozen, data, {"batch_size": 3, "weight_decay": 0.1}),
    "a loss of its own": (mlp, data, {"batch_size": 3, "loss": lambda out, y: cross_entropy(out, y, label_smoothing=0.1)}),
    "any forward": (residual, data, {"batch_size": 3, "epochs": 2, "momentum": 0.9, "mu": 0.1}),
}


@pytest.mark.parametrize("case", STACKED)
def test_stacked_or_not_the_numbers_agree(case: str) -> None:
    module, source, settings = STACKED[case]
    local = LocalSGD(module=module, data=source, stacked=True, **settings)
    model, sites = model_of(module()), [site(rank) for rank in range(20)]
    assert local.stacks()
    done = set()
    for stack in local.together(model, sites):
        for row, rank in enumerate(stack.rows):
            expected = alone(local, model, site(rank))
            assert_same({name: tensor[row] for name, tensor in stack.params.items()}, expected.params)
            assert stack.metrics["loss"][row] == pytest.approx(expected.metrics["loss"], rel=1e-4)
            assert {name: values[row] for name, values in stack.meta.items()} == expected.meta
            done.add(rank)
    assert done == set(range(20))


def test_a_site_is_the_same_whatever_it_is_stacked_with() -> None:
    local = LocalSGD(module=mlp, data=data, batch_size=3)
    model = model_of(mlp())
    few, many = ({rank: (stack, row) for stack in local.together(model, map(site, range(n))) for row, rank in enumerate(stack.rows)}
                 for n in (4, 20))  # fmt: skip
    for rank, (stack, row) in few.items():
        other, at = many[rank]
        assert_same({name: tensor[row] for name, tensor in stack.params.items()}, {n: t[at] for n, t in other.params.items()})


def test_fedprox_by_the_tasks_config() -> None:
    model = model_of(mlp())
    by_config, by_value = (LocalSGD(module=mlp, data=data, batch_size=3, mu=mu) for mu in (0.0, 0.4))
    assert_same(alone(by_config, model, site(1, proximal_mu=0.4)).params, alone(by_value, model, site(1)).params)
    [stack] = by_config.together(model, [site(rank, proximal_mu=0.4) for rank in range(10)])
    assert_same({name: tensor[list(stack.rows).index(1)] for name, tensor in stack.params.items()}, alone(by_value, model, site(1)).params)


def test_sites_that_are_left_out() -> None:
    """One that fails, one without data, one that keeps something, one that tells something, one whose data is of another shape."""

    def odd(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = data(site)
        if site.rank == 1:
            raise OSError("no disk")
        if site.rank == 2:
            return inputs[:0], labels[:0]
        if site.rank == 3:
            site.state["seen"] = 1
        if site.rank == 4:
            site.log("rank", 4)
        return (inputs[:, :4], labels) if site.rank == 5 else (inputs, labels)

    local = LocalSGD(module=mlp, data=odd, batch_size=3)
    [stack] = local.together(model_of(mlp()), [site(rank) for rank in range(12)])
    assert sorted(stack.rows) == [0, 6, 7, 8, 9, 10, 11]
    with pytest.raises(OSError, match="no disk"):
        local(model_of(mlp()), site(1))
    with pytest.raises(ConfigError, match="'site-2' has no data"):
        local(model_of(mlp()), site(2))


def test_labels_that_are_ignored_are_left_to_the_plain_loop() -> None:
    """`cross_entropy` leaves out the label -100, and divides by fewer."""

    def ignoring(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = data(site)
        return inputs, torch.where(torch.arange(len(labels)) == 0, -100, labels) if site.rank == 5 else labels

    local = LocalSGD(module=mlp, data=ignoring, batch_size=3)
    rows = [row for stack in local.together(model_of(mlp()), [site(rank) for rank in range(10)]) for row in stack.rows]
    assert 5 not in rows


def norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))


def test_batch_norm_is_the_sites_own() -> None:
    """Buffers start from the task, or as they were made if the task lacks them; nothing is left of the site before."""
    local = LocalSGD(module=norm, data=data, batch_size=4, shuffle=False)
    assert not local.stacks()
    model = model_of(norm())
    first = alone(local, model, site(3))
    other = alone(local, model, site(8))
    assert not torch.equal(first.params["1.running_mean"], other.params["1.running_mean"])
    assert first.params["1.num_batches_tracked"].item() == 2
    assert_same(alone(local, model, site(3)).params, first.params)
    partly = FLModel({name: tensor for name, tensor in model.params.items() if not name.startswith("1.running")})
    assert_same(alone(local, partly, site(3)).params, first.params)


class Counting(nn.Module):
    """Its buffer, which is in no state dict, is replaced in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return self.layer(x) * self.calls


def test_a_buffer_that_does_not_travel_is_set_back() -> None:
    local = LocalSGD(module=Counting, data=data, batch_size=None, steps=2)
    model = model_of(Counting())
    assert_same(alone(local, model, site(3)).params, alone(local, model, site(3)).params)


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES))


def test_convolutions_are_channels_last() -> None:
    def images(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(5 * 64.0).reshape(5, 1, 8, 8) / 100, torch.tensor([0, 1, 2, 0, 1])

    local = LocalSGD(module=conv, data=images, batch_size=2, shuffle=False, stacked=False)
    answer = alone(local, model_of(conv()), site(0))
    assert answer.params["0.weight"].is_contiguous(memory_format=torch.channels_last)
    net, (inputs, labels) = conv(), images(site(0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        optimizer.zero_grad()
        cross_entropy(net(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    assert_same({k: v.contiguous() for k, v in answer.params.items()}, dict(net.state_dict()))


def test_an_optimizer_of_ones_own() -> None:
    local = LocalSGD(module=mlp, data=data, optimizer=lambda params: torch.optim.Adam(params, lr=0.01), batch_size=None, epochs=2, mu=0.5)
    assert not local.stacks()
    answer = alone(local, model_of(mlp()), site(1))
    net, (inputs, labels) = mlp(), data(site(1))
    start = [param.detach().clone() for param in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        distance = sum((param - first).square().sum() for param, first in zip(net.parameters(), start, strict=True))
        (cross_entropy(net(inputs), labels) + 0.25 * distance).backward()
        optimizer.step()
    assert_same(answer.params, net.state_dict())
    assert_same(alone(local, model_of(mlp()), site(1)).params, answer.params)  # its moments are not kept


@pytest.mark.parametrize(
    ("module", "loss", "kind"),
    [
        (nn.Linear(2, 2), "mse", "layers"),
        (nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(inplace=True)), "mse", "layers"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "mse", "vmap"),
        (nn.Linear(2, 2), mse_loss, "vmap"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout()), "mse", None),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "mse", None),
        (nn.Linear(2, 2).requires_grad_(False), "mse", None),
        (nn.Sequential(*[nn.Linear(2, 2)] * 2), "mse", "vmap"),
    ],
)
def test_which_models_can_be_stacked(module: nn.Module, loss: Any, kind: str | None) -> None:
    assert kind_of(module, loss) == kind


def test_large_models_are_stacked_only_if_told() -> None:
    large = nn.Linear(500, 101)
    assert not LocalSGD(module=large, data=data).stacks()
    assert LocalSGD(module=large, data=data, stacked=True).stacks()
    assert LocalSGD(module=nn.Linear(64, 10), data=data).stacks()
    assert not LocalSGD(module=nn.Linear(64, 10), data=data, stacked=False).stacks()


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 40)), min_size=1, max_size=8), st.integers(0, 1000)
)  # fmt: skip
def test_orders_are_each_sites_own(sites: list[tuple[int, int]], epoch: int) -> None:
    seeds, examples = (np.array(column, dtype) for column, dtype in zip(zip(*sites, strict=True), (np.uint64, np.int64), strict=True))
    drawn = orders(seeds, examples, epoch)
    for order, (seed, count) in zip(drawn, sites, strict=True):
        assert sorted(order[:count].tolist()) == list(range(count))
        assert order[:count].tolist() == orders(np.array([seed], np.uint64), np.array([count]), epoch)[0].tolist()


def test_orders_are_even() -> None:
    """Of 3 examples each of the 6 orders comes up about as often: χ² of 5 degrees of freedom below its 99.9 % point, 20.5."""
    drawn = orders(np.arange(6000, dtype=np.uint64), np.full(6000, 3), 5)
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": None}, "epochs is None"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"steps": -1}, "steps is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"mu": -0.1}, "mu is -0.1"),
        ({"data": 3}, "data=, a function"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"optimizer": torch.optim.Adam, "momentum": 0.9}, "your own optimizer"),
        ({"optimizer": torch.optim.Adam, "stacked": True}, "stacked=True cannot go"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LocalSGD(**{"module": mlp, "data": data, **settings})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (None, "no named tensors"),
        ({"stem.weight": torch.zeros(1)}, "'stem.weight' is none of the module's"),
        ({"0.bias": torch.zeros(1)}, r"'0.bias' has shape \(1,\), the module's \(8,\)"),
    ],
)
def test_a_task_that_is_not_the_modules(params: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LocalSGD(module=mlp, data=data)(FLModel(params), site(0))


@pytest.mark.parametrize(
    ("given", "message"),
    [(torch.zeros(3), "data gave a Tensor"), ((1, 2), "two tensors"), ((torch.zeros(3, 2), torch.zeros(2)), "as many rows")],
)
def test_data_that_is_none(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LocalSGD(module=mlp, data=lambda site: given)(model_of(mlp()), site(0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="device='cuda'"):
        LocalSGD(module=mlp, data=data, device="cuda")(model_of(mlp()), site(0))


def test_arrays_do_as_well() -> None:
    model = model_of(mlp())
    arrays = FLModel({name: tensor.numpy() for name, tensor in model.params.items()})
    local = LocalSGD(module=mlp, data=data, loss=cross_entropy)
    assert local.loss == "cross_entropy"
    assert_same(alone(local, arrays, site(0)).params, alone(local, model, site(0)).params)


def test_an_app_has_it_as_a_function() -> None:
    app = App()
    local = app.train(LocalSGD(module=mlp, data=data))
    assert app.tasks == ("train",)
    assert app.together("train") is local
    assert app.together("evaluate") is None
    assert app.module["__file__"] == __file__
    with pytest.raises(ConfigError, match="has a function already, LocalSGD"):
        app.train(local)
