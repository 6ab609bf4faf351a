from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from hanse.errors import ConfigError, SiteFailed, UpdateRejected
from hanse.finetuning.augmentation import augmented
from hanse.finetuning.contract import Schema
from hanse.finetuning.models import load_params, params_of
from hanse.finetuning.training import MAX_NORM, Trainable, cosine, gradient, local_steps
from hanse.seeds import generator

ADAPTERS = ("full", "lora", "norms-and-head")


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(24, 8), nn.Linear(8, 2)
        )


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    labels = (np.arange(60) % 4 == 0).astype(np.int64)  # 15 of 60 are positive
    return (rng.normal(size=(60, 2, 4, 4)) + labels[:, None, None, None]).astype(np.float32), labels


def steps(trainable: Trainable, data, *, count: int = 10, seed: int = 0, rate: float = 0.05, **options) -> float:
    settings = {"batch_size": 16, "learning_rates": [rate] * count, "momentum": 0.9, "balanced": True} | options
    return local_steps(trainable, *data, steps=count, rng=generator(seed, "steps"), **settings)


def test_what_each_adapter_trains():
    names = {adapter: list(Trainable(net(), adapter, rank=2).arrays()) for adapter in ADAPTERS}
    assert names["full"] == [name for name, _ in net().named_parameters()]
    assert names["norms-and-head"] == ["1.weight", "1.bias", "6.weight", "6.bias"]
    low_rank = ["0.weight.lora_a", "0.weight.lora_b", "5.weight.lora_a", "5.weight.lora_b"]
    assert names["lora"] == names["norms-and-head"] + low_rank
    assert list(Trainable(net(), "norms-and-head", head=["5.*"]).arrays()) == ["1.weight", "1.bias", "5.weight", "5.bias"]
    with pytest.raises(ConfigError, match=r"no parameter is called 'head\.\*'"):
        Trainable(net(), "lora", head=["head.*"])
    with pytest.raises(ConfigError, match="trains nothing"):
        Trainable(nn.Sequential(nn.Conv2d(1, 1, 1)), "norms-and-head")


def test_shapes_of_low_rank():
    arrays = Trainable(net(), "lora", rank=4).arrays()
    assert arrays["0.weight.lora_a"].shape == (4, 2 * 3 * 3)
    assert arrays["0.weight.lora_b"].shape == (6, 4)
    assert Trainable(net(), "lora", rank=100).arrays()["5.weight.lora_a"].shape == (8, 24)
    assert not arrays["0.weight.lora_b"].any()
    assert 0.9 / math.sqrt(18) < np.abs(arrays["0.weight.lora_a"]).max() <= 1 / math.sqrt(18)


def test_both_parties_begin_with_the_same_factors():
    mine, yours, other = (Trainable(net(), "lora", seed=seed).arrays() for seed in (5, 5, 6))
    assert_array_equal(mine["0.weight.lora_a"], yours["0.weight.lora_a"])
    assert not np.array_equal(mine["0.weight.lora_a"], other["0.weight.lora_a"])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_training_learns_and_the_merged_model_is_what_was_trained(adapter, data):
    module = net()
    before = params_of(module)
    trainable = Trainable(module, adapter, rank=2)
    for name, array in trainable.merged().items():
        assert_array_equal(array, before[name])
    first, last = steps(trainable, data), steps(trainable, data, count=100)
    assert last < 0.9 * first
    for name, array in params_of(module).items():
        assert_array_equal(array, before[name])  # its own weights are not touched
    outputs = trainable(torch.from_numpy(data[0])).detach()
    load_params(module, trainable.merged())
    with torch.inference_mode():
        assert_allclose(module.eval()(torch.from_numpy(data[0])), outputs, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_frozen_stays(adapter, data):
    module = net().train()
    trainable, before = Trainable(module, adapter), params_of(module)
    steps(trainable, data)
    after = trainable.merged()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    expected = {
        "full": {name for name, _ in net().named_parameters()},
        "lora": {"0.weight", "1.weight", "1.bias", "5.weight", "6.weight", "6.bias"},
        "norms-and-head": {"1.weight", "1.bias", "6.weight", "6.bias"},
    }
    assert changed == expected[adapter]
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= before.keys() - changed


def test_one_step_by_hand():
    module = nn.Linear(1, 1)
    load_params(module, {"weight": np.zeros((1, 1), np.float32), "bias": np.zeros(1, np.float32)})
    data = np.array([[1.0], [3.0]], np.float32), np.array([0, 1])
    trainable = Trainable(module)
    found = gradient(trainable, *data, batch_size=2, rng=generator(0), balanced=True)
    assert_allclose(found["weight"], [[-0.5]])  # the mean of (σ(0) - y) x = 0.5 · 1 and -0.5 · 3
    assert_allclose(found["bias"], [0.0], atol=1e-7)
    loss = steps(trainable, data, count=1, rate=0.5, batch_size=2)
    assert loss == pytest.approx(math.log(2))
    assert_allclose(trainable.arrays()["weight"], [[0.25]])


def test_long_gradients_are_scaled_down(data):
    trainable = Trainable(net())
    inputs, labels = data
    short, long = (gradient(trainable, scale * inputs, labels, batch_size=60, rng=generator(0), balanced=False) for scale in (0.01, 100))
    norms = [math.sqrt(sum(float((array**2).sum()) for array in found.values())) for found in (short, long)]
    assert norms[0] < MAX_NORM
    assert norms[1] == pytest.approx(MAX_NORM, rel=1e-5)


def test_steps_are_those_of_torchs_own_sgd(data):
    mine, theirs = Trainable(net()), net().eval()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.8)
    inputs, labels = (torch.from_numpy(part) for part in data)
    for rate in (rates := [cosine(0.1, step, 6) for step in range(6)]):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(inputs), labels).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), MAX_NORM)
        optimizer.step()
    steps(mine, data, count=6, learning_rates=rates, momentum=0.8, batch_size=60, balanced=False)  # every row, in some order
    for name, array in params_of(theirs).items():
        assert_allclose(mine.merged()[name], array, atol=2e-5)


def test_a_gradient_is_what_a_step_takes(data):
    trainable = Trainable(net(), "lora")
    before = trainable.arrays()
    found = gradient(trainable, *data, batch_size=16, rng=generator(4, "steps"), balanced=True)
    assert found.keys() == before.keys()
    for name, array in trainable.arrays().items():
        assert_array_equal(array, before[name])
    steps(trainable, data, count=1, seed=4, rate=0.5)
    for name, array in trainable.arrays().items():
        assert_allclose(array, before[name] - np.float32(0.5) * found[name], atol=1e-6)


@pytest.mark.parametrize("augment", [None, Schema(shape=[4, 4, 2], mean=[0.5], std=[0.25])])
def test_the_same_generator_gives_the_same_bits(augment, data):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # which must not matter
        trainable = Trainable(net())
        steps(trainable, data, seed=seed, augment=augment)
        runs.append(trainable.arrays()["5.weight"])
    assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


class Recorder(nn.Module):
    """Keeps what it is given; its one input is the row's number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen.append(inputs[:, 0].int().tolist())
        return inputs * self.weight


def test_balanced_batches_draw_equally_from_both_classes_and_never_unknown_ones():
    labels = np.array([0] * 90 + [1] * 5 + [-1] * 5)
    data = np.arange(100, dtype=np.float32)[:, None], labels
    balanced, plain = Recorder(), Recorder()
    steps(Trainable(balanced), data, count=30, rate=1e-9)
    steps(Trainable(plain), data, count=30, rate=1e-9, balanced=False)
    assert all(len(batch) == 16 and sum(row >= 90 for row in batch) == 8 for batch in balanced.seen)
    assert all(len(set(batch)) == 16 for batch in plain.seen)
    rows = [row for batch in balanced.seen + plain.seen for row in batch]
    assert set(rows) == set(range(95))
    assert sum(row >= 90 for batch in plain.seen for row in batch) < 60


def test_a_class_that_is_missing():
    data = np.zeros((9, 2, 4, 4), np.float32), np.zeros(9, np.int64)
    with pytest.raises(ConfigError, match=r"9 have class 0 and 0 class 1\. Balanced"):
        steps(Trainable(net()), data)
    steps(Trainable(net()), data, balanced=False)


def test_arrays_go_to_the_other_party(data):
    mine, yours = Trainable(net(), "lora"), Trainable(net(), "lora")
    steps(mine, data)
    yours.load(mine.arrays())
    for name, array in mine.merged().items():
        assert_array_equal(yours.merged()[name], array)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"6.bias": None}, "'6.bias' is missing"),
        ({"0.weight": np.zeros(1, np.float32)}, "'0.weight' is not one that is trained"),
        ({"6.bias": np.zeros(3, np.float32)}, "it must be float32"),
        ({"6.bias": np.zeros(2)}, "it must be float32"),
        ({"6.bias": np.array([0, np.inf], np.float32)}, "not finite"),
    ],
)
def test_other_arrays_are_refused_whole(change, problem):
    trainable = Trainable(net(), "norms-and-head")
    before = trainable.arrays()
    arrays = {name: array + 1 for name, array in before.items()} | change
    with pytest.raises(UpdateRejected, match=problem):
        trainable.load({name: array for name, array in arrays.items() if array is not None})
    for name, array in trainable.arrays().items():
        assert_array_equal(array, before[name])


def test_training_that_diverges_says_so_and_leaves_the_weights(data):
    trainable = Trainable(net())
    before = trainable.arrays()
    with pytest.raises(SiteFailed, match="Lower the learning rate"):
        steps(trainable, data, rate=1e30)
    assert_array_equal(trainable.arrays()["5.weight"], before["5.weight"])


def test_tied_weights_are_trained_once_and_merged_twice():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight, self.last = self.first.weight, nn.Linear(3, 1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.last(self.second(self.first(inputs)))

    trainable = Trainable(Tied())
    assert "second.weight" not in trainable.arrays()
    data = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32), np.arange(20) % 2
    steps(trainable, data)
    merged = trainable.merged()
    assert_array_equal(merged["first.weight"], merged["second.weight"])
    module = copy.deepcopy(Tied())
    load_params(module, merged)
    assert_allclose(module(torch.from_numpy(data[0])).detach(), trainable(torch.from_numpy(data[0])).detach(), atol=1e-6)


def test_the_cosine():
    assert [cosine(0.2, step, 4) for step in (0, 2, 4)] == pytest.approx([0.2, 0.1, 0.0])
    assert cosine(1, 1, 4) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_augmented_images_vary_each_in_its_own_way_and_stay_in_range():
    schema = Schema(shape=[28, 28, 3], mean=[0.2, 0.3, 0.4], std=[0.5])
    image = np.random.default_rng(0).random((1, 3, 28, 28), np.float32)
    mean = np.array(schema.mean, np.float32).reshape(3, 1, 1)
    inputs = torch.from_numpy(np.repeat((image - mean) / np.float32(0.5), 200, axis=0))
    varied = augmented(inputs, schema, generator(0)).numpy() * 0.5 + mean
    assert varied.dtype == np.float32
    assert varied.min() >= -1e-6
    assert varied.max() <= 1 + 1e-6
    assert len({row.tobytes() for row in varied}) > 190
    assert 0.05 < np.abs(varied - image).mean() < 0.3
    assert_array_equal(augmented(inputs, schema, generator(0)), augmented(inputs, schema, generator(0)))


def test_a_neutral_draw_leaves_an_image_as_it_is():
    class Neutral(np.random.Generator):
        def random(self, *_, **__):
            return np.ones((1, 1, 1, 1))

    schema = Schema(shape=[8, 8, 1])
    inputs = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_allclose(augmented(inputs, schema, Neutral(np.random.PCG64(0))), inputs, atol=1e-5)


def test_augmented_tables_get_a_little_noise():
    schema = Schema(kind="table", columns=["a", "b"])
    noise = augmented(torch.zeros(4000, 2), schema, generator(0)).numpy()
    assert noise.std(axis=0) == pytest.approx([0.05, 0.05], rel=0.05)
