"""The vendor's code: a small convolutional network with batch norm. `build` is all that Hanse calls."""

from torch import nn


def build():
    """One logit for each picture, of float32 inputs of shape (n, 1, 16, 16)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 1)),
    )
