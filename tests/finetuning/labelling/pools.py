"""A small pool to label: 24 of its 240 images are anomalies, 18 of them with scores in the band and 6 confidently missed."""

from __future__ import annotations

import numpy as np

from hanse.finetuning.labelling.queue import Pool

IMAGES, ANOMALIES, MISSED = 240, 24, 6


def make_pool(seed: int = 0) -> tuple[Pool, dict[str, int]]:
    """The pool, and the true label of each of its images."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(IMAGES, int)
    truth[rng.permutation(IMAGES)[:ANOMALIES]] = 1
    anomalies = np.flatnonzero(truth)
    scores = rng.uniform(0, 0.12, IMAGES)
    scores[anomalies] = rng.uniform(0.1, 0.3, ANOMALIES)
    scores[anomalies[:MISSED]] = rng.uniform(0, 0.005, MISSED)
    images = rng.integers(20, 90, (IMAGES, 16, 16, 1), np.uint8)
    images[anomalies, 5:11, 5:11] = 250
    embeddings = rng.normal(size=(IMAGES, 8)).astype(np.float32)
    embeddings[anomalies] = rng.normal([5, 5, 0, 0, 0, 0, 0, 0], 0.5, (ANOMALIES, 8))
    names = [f"day-1/{i:03d}.png" for i in range(IMAGES)]
    columns = {"device": [f"camera-{i % 3}" for i in range(IMAGES)]}
    pool = Pool(names=names, scores=scores, images=images, embeddings=embeddings, columns=columns)
    return pool, dict(zip(names, truth.tolist(), strict=True))
