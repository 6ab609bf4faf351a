from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from hanse.adapters.torch_personal import norm_names, split, tensors  # noqa: E402
from hanse.errors import ConfigError  # noqa: E402


def test_norm_names_are_all_of_batch_normalization_and_nothing_else() -> None:
    net = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(1, 2)), "bn": nn.BatchNorm1d(3)})
    kinds = ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]
    assert sorted(norm_names(net)) == [f"{layer}.{kind}" for layer in ("bn", "body.1") for kind in kinds]
    with pytest.raises(ConfigError, match="Linear has no batch normalization"):
        norm_names(nn.Linear(1, 1))


def test_split_into_head_and_body() -> None:
    net = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    head, body = split(net, ["head.*"])
    assert [id(p) for p in head] == [id(p) for p in net["head"].parameters()]
    assert [id(p) for p in body] == [id(p) for p in net["body"].parameters()]
    with pytest.raises(ConfigError, match="every parameter"):
        split(net, ["*"])
    with pytest.raises(ConfigError, match="name no parameter"):
        split(net, ["tail.*"])


def test_tensors_make_a_state_dictionary() -> None:
    net = nn.Linear(1, 1)
    net.load_state_dict(tensors({"weight": np.array([[2.0]], np.float32), "bias": torch.tensor([3.0])}))
    assert (net.weight.item(), net.bias.item()) == (2.0, 3.0)
