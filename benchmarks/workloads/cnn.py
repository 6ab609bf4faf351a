"""The arithmetic of `device`: 1,000 sites with 20 synthetic images each, 100 a round, a CNN of 421,642 parameters, one epoch of SGD.

It uses what makes a CNN quick on a CPU, for Hanse and the bare loop alike: one model that stays in a process and gets each site's
parameters in place, channels last, ReLU after pooling.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d, relu

SITES, SITES_PER_ROUND, IMAGES, BATCH, RATE = 1000, 100, 20, 10, 0.05


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        small = relu(max_pool2d(self.conv1(images), 2))
        smaller = relu(max_pool2d(self.conv2(small), 2))
        return self.fc2(relu(self.fc1(smaller.flatten(1))))


def first_model() -> Net:
    torch.manual_seed(0)
    return Net()


@functools.cache
def net() -> Net:
    """The one model of a process."""
    return Net().to(memory_format=torch.channels_last)


@functools.cache
def site_data(rank: int) -> tuple[Tensor, Tensor]:
    """Images, float32 of shape (20, 1, 28, 28), and labels of 10 classes."""
    rng = np.random.default_rng(rank)
    images = torch.from_numpy(rng.standard_normal((IMAGES, 1, 28, 28), np.float32))
    return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(rng.integers(10, size=IMAGES))


def fit(params: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """Train one epoch from `params` on a site's data: the new parameters, in the memory of the process's one model, and the last loss."""
    model = net()
    model.load_state_dict(params)
    weights = list(model.parameters())
    for images, labels in zip(*(part.split(BATCH) for part in site_data(rank)), strict=True):
        loss = cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=RATE)
    return model.state_dict(), loss.item()
