"""Which rows are the same, and which images nearly: kernels, arrays in, arrays out.

n, m = rows, h, w, c = height, width and channels of an image.
"""

from __future__ import annotations

from typing import Any

import blake3
import numpy as np
import numpy.typing as npt

NEAR = 0.985
"""Images are nearly the same if their pixels, grey and at most 32 × 32, correlate at least so much.

Measured on Fashion-MNIST's 10,000 test images: 53 such pairs among them; of 500 copies all are found after JPEG of quality 90, 499 with
noise of 6 levels or with another exposure, 464 after JPEG of quality 60, none after a shift by one pixel of 28.
"""

_SIDE, _COARSE = 32, 8  # pixels of the grey pictures that are compared, and of those compared before
_BLOCK = 1024  # rows at a time

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Pairs = npt.NDArray[np.int64]


def digests(inputs: npt.NDArray[Any]) -> list[bytes]:
    """BLAKE3 of each row's bytes, 32 bytes each. inputs: (n, …)."""
    return [blake3.blake3(row.tobytes()).digest() for row in inputs]


def same(first: list[bytes], second: list[bytes] | None = None) -> Pairs:
    """int64 (pairs, 2): each row of `second`, and the first of `first` that equals it; without `second`, later and earlier of `first`."""
    seen: dict[bytes, int] = {}
    for row, digest in enumerate(first):
        seen.setdefault(digest, row)
    pairs = [(row, seen[digest]) for row, digest in enumerate(first if second is None else second) if digest in seen]
    return np.array([pair for pair in pairs if second is not None or pair[0] != pair[1]], np.int64).reshape(-1, 2)


def near(first: Bytes, second: Bytes | None = None) -> Pairs:
    """int64 (pairs, 2): each row of `second` with the row of `first` that is most like it, if they are NEAR; equal ones too.

    Without `second`: of `first`, each row with the one before it that is most like it. first: uint8 (n, h, w, c). Likeness is looked for at
    8 × 8 pixels, by n · m products of 64 numbers; the one that is found is then compared closely. Images of one colour are like nothing.
    """
    coarse = _standard(first, _COARSE)
    others = coarse if second is None else _standard(second, _COARSE)
    best = np.zeros(len(others), np.int64)
    for start in range(0, len(others) if len(first) else 0, _BLOCK):
        block = others[start : start + _BLOCK]
        alike = block @ coarse[: len(first) if second is not None else start + len(block)].T
        if second is None:
            alike[:, start:][np.triu_indices(len(block))] = -1  # itself and later ones
        best[start : start + _BLOCK] = alike.argmax(axis=1)
    rows = np.arange(len(others))[(others * coarse[best]).sum(axis=1) >= NEAR] if len(first) else np.zeros(0, np.int64)
    pairs = np.stack([rows, best[rows]], axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]] if second is None else pairs
    return pairs[_likeness((first if second is None else second)[pairs[:, 0]], first[pairs[:, 1]]) >= NEAR]


def _likeness(a: Bytes, b: Bytes) -> Floats:
    """float32 (n,): how much each row of one correlates with the same row of the other."""
    return np.asarray((_standard(a, _SIDE) * _standard(b, _SIDE)).sum(axis=1), np.float32)


def _standard(images: Bytes, side: int) -> Floats:
    """float32 (n, pixels): grey, at most side × side, of mean 0 and length 1; zeros for an image of one colour."""
    parts = [_small(images[start : start + _BLOCK], side) for start in range(0, len(images), _BLOCK)]
    small = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    centred = small - small.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.where(length > 1e-3, centred / np.maximum(length, 1e-3), 0).astype(np.float32)


def _small(images: Bytes, side: int) -> Floats:
    """float32 (n, pixels): means over the pixels that fall in each of at most side × side places."""
    grey = images.mean(axis=3, dtype=np.float32)
    for axis in (1, 2):
        pixels = grey.shape[axis]
        edges = np.arange(min(side, pixels)) * pixels // min(side, pixels)
        counts = np.diff(np.r_[edges, pixels]).astype(np.float32)
        grey = np.add.reduceat(grey, edges, axis=axis) / (counts[:, None] if axis == 1 else counts)
    return np.asarray(grey.reshape(len(grey), -1), np.float32)
