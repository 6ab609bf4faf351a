"""Handwritten digits as the cameras of a vendor and of a client see them. The anomaly is a digit with a ring: 0, 6, 8 or 9."""

import csv
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits

SIDE = 16  # pixels
RINGS = (0, 6, 8, 9)


@dataclass(frozen=True)
class Device:
    """What light goes through, in this order; the defaults do nothing. Brightness is from 0 to 1, lengths are pixels."""

    name: str
    slant: float = 0.0  # each line of pixels is so much further to the side than the one above: the belt runs too fast for the camera
    blur: float = 0.0  # standard deviation of a Gaussian
    gamma: float = 1.0
    gain: float = 1.0
    black: float = 0.0  # what nothing is seen as
    noise: float = 0.03  # standard deviation, in every pixel anew


VENDOR = (Device("bench"), Device("bench-soft", blur=0.5, gain=0.9, noise=0.04), Device("bench-bright", gamma=0.8, black=0.05, noise=0.04))
CLIENT = (Device("belt-1", slant=0.4, gain=0.7, black=0.1), Device("belt-2", slant=0.4, blur=0.4, gain=0.6))


def digits(rng):
    """All 1,797 in a drawn order: pictures of shape (n, 8, 8) from 0 to 1, labels (1: it has a ring), and their names."""
    found = load_digits()
    order = rng.permutation(len(found.target))
    return found.images[order] / 16, np.isin(found.target, RINGS).astype(int)[order], [f"digit-{row:04}" for row in order]


def seen(picture, device, rng):
    """One picture as the device sees it: bytes of shape (SIDE, SIDE)."""
    x = ndimage.zoom(picture, SIDE / len(picture), order=1)
    middle = (SIDE - 1) / 2
    x = ndimage.affine_transform(x, [[1, 0], [device.slant, 1]], offset=[0, -device.slant * middle], order=1)
    x = ndimage.gaussian_filter(x, device.blur) ** device.gamma * device.gain + device.black
    return (255 * (x + rng.normal(0, device.noise, x.shape)).clip(0, 1)).astype(np.uint8)


def write_pictures(folder, digits, devices, rng, *, every=False):
    """PNG files, and labels.csv, which says of each its label, its device and its digit. every: each digit through each device."""
    folder.mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file", "label", "device", "digit"])
        for row, (picture, label, name) in enumerate(zip(*digits, strict=True)):
            for device in devices if every else [devices[row % len(devices)]]:
                path = folder / f"{name}-{device.name}.png"
                Image.fromarray(seen(picture, device, rng)).save(path)
                lines.writerow([path.name, label, device.name, name])
