"""What the drift watch says of new pictures: of the vendor's own devices, which it should not notice, and of the client's nine.

Half of the vendor's holdout makes the reference; windows are drawn from the other half, and from the client's test set. Label shift is
the other half with fewer positives, 20 %.
"""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

import numpy as np
from base import base, split
from devices import CLIENT
from model import build

from hanse.finetuning.models import embed, load_params, score
from hanse.finetuning.reference import Reference, reference
from hanse.finetuning.windows import figures, sums_of
from hanse.seeds import generator

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
COLUMNS = ("scores", "embeddings", "differs", "not label shift", "PSI > 0.2")


def found(known: Reference, scores: Array, embeddings: Array, size: int, windows: int, rng: np.random.Generator) -> Array:
    """Of windows of that size: the share in which each test alone is past 1 %, both by Holm, those no label shift explains, and PSI."""
    seen = []
    for _ in range(windows):
        rows = rng.choice(len(scores), size, replace=False)
        sums = sums_of(known, scores[rows], embeddings[rows], {})
        plain = figures(known, sums, positives=None, level=0.01)
        shifted = figures(known, sums, positives=plain.positives, level=0.01)
        levels = [plain.ks_level <= 0.01, (plain.mmd2_level or 1) <= 0.01]
        seen.append([*levels, plain.differs, plain.differs and shifted.differs, plain.psi > 0.2])
    return np.mean(seen, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=200, help="of each size, of each device")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    module, rng = build(), generator(options.seed, "drift")
    load_params(module, base(options.seed))
    holdout, test = split("vendor-holdout", options.seed), split("client-test", options.seed)
    (scores, embeddings), (theirs, their_embeddings) = ((score(module, x), embed(module, x)) for x in (holdout.inputs, test.inputs))
    half = len(scores) // 2
    known = reference(scores[:half], holdout.labels[:half], embeddings[:half], 0.5, seed=options.seed)
    positive, negative = (half + np.flatnonzero(holdout.labels[half:] == label) for label in (1, 0))
    fewer = np.concatenate([negative, positive[: len(negative) // 4]])
    print(f"{'share of windows, %':30}" + "".join(f"{name:>17}" for name in COLUMNS))
    for size in (50, 100, 500):
        sources = {
            "nothing changed": found(known, scores[half:], embeddings[half:], size, 5 * options.windows, rng),
            "label shift": found(known, scores[fewer], embeddings[fewer], size, options.windows, rng),
        }
        for nth, device in enumerate(CLIENT):
            rows = test.devices == nth
            sources[device.name] = found(known, theirs[rows], their_embeddings[rows], size, options.windows, rng)
        sources["the nine, mean"] = np.mean(list(sources.values())[2:], axis=0)
        for name, shares in sources.items():
            print(f"{size:4}  {name:24}" + "".join(f"{100 * share:17.1f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
