"""The arithmetic of `silo`: scikit-learn's digits among 8 sites, an MLP 64-64-10, one local epoch of SGD."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

SITES, ROUNDS, BATCH, RATE = 8, 5, 32, 0.1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def first_model() -> Net:
    torch.manual_seed(0)
    return Net()


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def site_data(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and those held out, a fifth."""
    images, labels = (part[rank::SITES] for part in _digits())
    held_out = len(images) // 5
    return images[held_out:], labels[held_out:], images[:held_out], labels[:held_out]


def train_epoch(net: Net, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, *, rank: int, round: int) -> None:
    """One epoch, in an order that site and round decide."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * round + rank))
    for batch in order.split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()


def accuracy(net: Net, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())
