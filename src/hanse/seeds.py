"""Randomness by name: every draw in a job has its own stream, so a restart or another worker gives the same bits."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(seed: int, *names: object) -> int:
    """A 64-bit seed for the purpose that `names` spell out, the same on every machine; `seed` is the job's."""
    text = "\x00".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, *names: object) -> np.random.Generator:
    """A generator of its own for the purpose that `names` spell out."""
    return np.random.Generator(np.random.PCG64(seed_for(seed, *names)))
