"""Generic augmentation, that knows nothing of any client's data: cameras differ in light, contrast, sharpness, noise and framing.

n = rows, c = channels, h = height, w = width
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hanse.finetuning.contract import Schema

_BLUR_RADIUS = 3  # pixels


def augmented(inputs: Tensor, schema: Schema, rng: np.random.Generator) -> Tensor:
    """`inputs`, each row varied in its own way.

    inputs: float32 as the model takes them, normalised by the schema's mean and std: images (n, c, h, w), tables (n, columns).
    A table gets Gaussian noise of a twentieth of each column's std. An image, each with probability a half: a shift of at most 1/14 and
    a scale of at most 10 %; Gaussian blur of at most 1.2 pixels; gamma in 1/1.8…1.8; contrast in 0.6…1.4; brightness ±0.15 and the
    channels' own ±0.1; noise of at most 0.12, all on the scale of 0 to 1, to which it is clipped at the end.
    """
    if schema.kind == "table":
        return inputs + 0.05 * _noise(rng, inputs)
    shape = (1, -1, 1, 1)
    mean, std = torch.tensor(schema.mean).view(shape), torch.tensor(schema.std).view(shape)
    images = (inputs * std + mean).clamp(0, 1)
    draw = _Draws(rng, len(images))
    images = _blurred(_moved(images, draw), draw.uniform(0, 1.2))
    images = images.clamp(1e-6, 1) ** draw.uniform(-0.59, 0.59).exp()
    images = (images - 0.5) * draw.uniform(0.6, 1.4, neutral=1.0) + 0.5
    images = images + draw.uniform(-0.15, 0.15) + draw.uniform(-0.1, 0.1, channels=images.shape[1])
    images = images + draw.uniform(0, 0.12) * _noise(rng, images)
    return (images.clamp(0, 1) - mean) / std


class _Draws:
    """One number a row, of a random half of the rows; the others get the neutral one."""

    def __init__(self, rng: np.random.Generator, rows: int) -> None:
        self._rng, self._rows = rng, rows

    def uniform(self, low: float, high: float, *, neutral: float = 0.0, channels: int = 1) -> Tensor:
        """Shape (n, channels, 1, 1)."""
        drawn = self._rng.uniform(low, high, (self._rows, channels, 1, 1))
        return torch.from_numpy(np.where(self._rng.random((self._rows, 1, 1, 1)) < 0.5, drawn, neutral).astype(np.float32))


def _noise(rng: np.random.Generator, like: Tensor) -> Tensor:
    return torch.from_numpy(rng.standard_normal(like.shape, np.float32))


def _moved(images: Tensor, draw: _Draws) -> Tensor:
    """Scaled and shifted, the edge repeated where nothing was."""
    rows = len(images)
    scale = draw.uniform(0.9, 1.1, neutral=1.0).view(rows, 1, 1)
    shift = draw.uniform(-1 / 7, 1 / 7, channels=2).view(rows, 2, 1)  # the grid goes from -1 to 1
    grid = functional.affine_grid(torch.cat([torch.eye(2) * scale, shift], dim=2), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """By a Gaussian of its own for each row, sigma in pixels, shape (n, 1, 1, 1); 0 leaves it as it is."""
    n, c, h, w = images.shape
    places = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1).float()
    kernels = torch.exp(-0.5 * (places / sigma.view(n, 1).clamp_min(1e-3)) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)
    padded = functional.pad(images, (_BLUR_RADIUS,) * 4, mode="replicate").view(1, n * c, h + 2 * _BLUR_RADIUS, w + 2 * _BLUR_RADIUS)
    across = functional.conv2d(padded, kernels.view(n * c, 1, 1, -1), groups=n * c)
    return functional.conv2d(across, kernels.view(n * c, 1, -1, 1), groups=n * c).view(n, c, h, w)
