"""Simulated cameras: the same clothes as a vendor's six devices see them, and a client's nine that the vendor never had.

n = images, h = height, w = width
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from hanse.seeds import generator

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Device:
    """What light goes through, in this order; the defaults do nothing. Brightness is from 0 to 1, lengths are pixels."""

    name: str
    blur: float = 0.0  # standard deviation of a Gaussian
    motion: int = 1  # length of a smear, in one of four directions for each image
    low_resolution: float = 1.0  # as many times fewer pixels along each side
    vignette: float = 0.0  # how much is lost in the corners
    gain: float = 1.0
    black: float = 0.0  # what nothing is seen as
    gamma: float = 1.0
    noise: float = 0.0  # standard deviation, in every pixel anew
    dead: float = 0.0  # share of pixels that are always black or always white, the same ones in every image
    jpeg: float = 0.0  # step of the lowest frequencies of 8 × 8 blocks; higher ones are coarser
    varies: float = 0.1  # relative standard deviation of a strength from image to image


VENDOR = (
    Device("studio", noise=0.05),
    Device("studio-soft", blur=1.0, noise=0.05),
    Device("studio-dim", gain=0.6, noise=0.12),
    Device("bench-a", gamma=0.75, noise=0.1),
    Device("bench-b", gamma=1.5, vignette=0.4, noise=0.08),
    Device("bench-c", jpeg=0.12, black=0.08, noise=0.05),
)

CLIENT = (
    Device("blurred", blur=2.0, noise=0.02),
    Device("noisy", noise=0.45),
    Device("dark-gamma", gamma=4.0, noise=0.08),
    Device("vignetted", vignette=1.0, gain=0.5, noise=0.15),
    Device("compressed", jpeg=0.6),
    Device("washed-out", gain=0.45, black=0.35, noise=0.05),
    Device("low-resolution", low_resolution=3.4),
    Device("dead-pixels", dead=0.25),
    Device("motion", motion=6, noise=0.02),
)


def seen(images: Array, devices: Array, names: tuple[Device, ...], seed: int) -> Array:
    """Each image as its device sees it: uint8, shape (n, h, w).

    images: uint8, shape (n, h, w). devices: which of `names`, int, shape (n,).
    """
    out = np.empty_like(images)
    for nth, device in enumerate(names):
        rows = np.flatnonzero(devices == nth)
        out[rows] = through(images[rows], device, seed)
    return out


def through(images: Array, device: Device, seed: int) -> Array:
    """As one device sees them: uint8, shape (n, h, w)."""
    rng = generator(seed, "device", device.name)
    n = len(images)

    def strength(value: float) -> Array:
        return np.asarray(value * np.exp(device.varies * rng.standard_normal((n, 1, 1)))).astype(np.float32)

    x = images.astype(np.float32) / 255
    if device.blur:
        x = _blurred(x, strength(device.blur))
    if device.motion > 1:
        x = _smeared(x, device.motion, rng.integers(0, 4, n))
    if device.low_resolution > 1:
        x = _fewer_pixels(x, device.low_resolution)
    if device.vignette:
        x = x * (1 - np.minimum(strength(device.vignette), 1) * _distance(*x.shape[1:]) ** 2)
    if device.gain != 1:
        x = x * strength(device.gain)
    x = device.black + x * (1 - device.black) if device.black and device.gain == 1 else x + device.black
    if device.gamma != 1:
        x = np.clip(x, 0, 1) ** strength(device.gamma)
    if device.noise:
        x = x + strength(device.noise) * rng.standard_normal(x.shape, np.float32)
    if device.jpeg:
        x = _compressed(x, strength(device.jpeg))
    if device.dead:
        broken = generator(0, "dead", device.name).random(x.shape[1:])  # the device's own, whatever it looks at
        x = np.where(broken < device.dead, np.float32(broken < device.dead / 2), x)
    return np.asarray(np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8))


def _blurred(x: Array, sigma: Array, radius: int = 4) -> Array:
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma[:, :, 0]) ** 2).astype(np.float32)
    kernel /= kernel.sum(axis=1, keepdims=True)
    for axis in (1, 2):
        x = sum((kernel[:, k, None, None] * _shifted(x, int(o), axis) for k, o in enumerate(offsets)), np.float32(0))
    return x


def _smeared(x: Array, length: int, directions: Array) -> Array:
    out = np.empty_like(x)
    for nth, (down, across) in enumerate([(0, 1), (1, 0), (1, 1), (1, -1)]):
        part = x[directions == nth]
        steps = range(-(length // 2), length - length // 2)
        out[directions == nth] = sum((_shifted(_shifted(part, s * down, 1), s * across, 2) for s in steps), np.float32(0)) / length
    return out


def _shifted(x: Array, by: int, axis: int) -> Array:
    """Moved along an axis, the edge repeated."""
    return np.take(x, np.clip(np.arange(x.shape[axis]) - by, 0, x.shape[axis] - 1), axis=axis)


def _fewer_pixels(x: Array, times: float) -> Array:
    """Averaged over larger pixels, then each shown as a square."""
    for axis in (1, 2):
        size = x.shape[axis]
        cell = (np.arange(size) / times).astype(int)
        average = (cell[:, None] == cell[None, :]).astype(np.float32)
        average /= average.sum(axis=1, keepdims=True)
        x = np.moveaxis(np.tensordot(x, average, axes=(axis, 1)), -1, axis)
    return x


def _distance(h: int, w: int) -> Array:
    """Of each pixel from the middle; 1 in the corners. Shape (h, w)."""
    down, across = np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)[None, :]
    return np.asarray(np.hypot(down, across) / math.sqrt(2)).astype(np.float32)


def _compressed(x: Array, step: Array) -> Array:
    """The discrete cosine transform of 8 × 8 blocks, rounded, and back: what JPEG loses."""
    n, h, w = x.shape
    tall, wide = -h % 8, -w % 8
    blocks = np.pad(x, ((0, 0), (0, tall), (0, wide)), mode="edge").reshape(n, (h + tall) // 8, 8, (w + wide) // 8, 8).swapaxes(2, 3)
    k = np.arange(8)
    dct = np.sqrt(np.where(k == 0, 1, 2)[:, None] / 8) * np.cos(np.pi * (2 * k[None, :] + 1) * k[:, None] / 16)
    dct = dct.astype(np.float32)
    steps = (step[:, :, :, None, None] * (1 + k[:, None] + k[None, :])).astype(np.float32)
    blocks = dct.T @ (np.rint((dct @ blocks @ dct.T) / steps) * steps) @ dct
    return blocks.swapaxes(2, 3).reshape(n, h + tall, w + wide)[:, :h, :w]
