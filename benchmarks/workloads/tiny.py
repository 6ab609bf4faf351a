"""The arithmetic of `tiny`: 10,000 sites with 16 to 20 synthetic samples each, 1,000 a round, logistic regression 64 → 10, one step."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SITES, SITES_PER_ROUND, FEATURES, CLASSES, RATE = 10_000, 1_000, 64, 10, 0.1


def first_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES)


@functools.cache
def site_data(rank: int) -> tuple[Tensor, Tensor]:
    """Samples, float32 of shape (16 to 20, 64), and labels of 10 classes."""
    rng = np.random.default_rng(rank)
    count = int(rng.integers(16, 21))
    return torch.from_numpy(rng.standard_normal((count, FEATURES), np.float32)), torch.from_numpy(rng.integers(CLASSES, size=count))


def load_all() -> None:
    """Have the data of all sites in memory."""
    for rank in range(SITES):
        site_data(rank)


@functools.cache
def trained() -> tuple[nn.Linear, torch.optim.SGD]:
    """The one model of a process, and its optimizer."""
    net = first_model()
    return net, torch.optim.SGD(net.parameters(), lr=RATE)


def fit(params: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float, int]:
    """One step from `params` on all of a site's samples, as one writes it: the new parameters, in the memory of the process's one model,
    the loss before, and how many samples there were."""
    samples, labels = site_data(rank)
    net, optimizer = trained()
    net.load_state_dict(params)
    optimizer.zero_grad()
    loss = cross_entropy(net(samples), labels)
    loss.backward()
    optimizer.step()
    return net.state_dict(), loss.item(), len(samples)


def fit_tuned(params: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float, int]:
    """The same without module and optimizer."""
    samples, labels = site_data(rank)
    weight, bias = (params[name].detach().requires_grad_() for name in ("weight", "bias"))
    loss = cross_entropy(nn.functional.linear(samples, weight, bias), labels)
    by_weight, by_bias = torch.autograd.grad(loss, (weight, bias))
    with torch.no_grad():
        new = {"weight": torch.sub(weight, by_weight, alpha=RATE), "bias": torch.sub(bias, by_bias, alpha=RATE)}
    return new, loss.item(), len(samples)
