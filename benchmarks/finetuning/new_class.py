"""Concept drift: an anomaly that the vendor never saw. 50 images for training are found through the labelling queue; 3 seeds.

The client has devices such as the vendor's, so that nothing but the class is new; of the 10,000 images in its pool a tenth are of it.
A person, who is always right here, goes through the queue: first the band of scores that are called normal but not surely, then what is
similar to what was found. Then more local work than for data drift: 100 steps in each of 8 round trips. Claims, on the means of the seeds,
on the client's test set with the new class in it: EER at most 6 %, HTER at the candidate's own threshold at most 8 %.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from base import HERE, NEW, VENDOR, Split, base, split
from modes import of_project

sys.path.insert(0, str(HERE.parent))
from claims import Claim, parser, run

from hanse.finetuning.contract import Learning, Model
from hanse.finetuning.labelling.labels import Labels, training_set
from hanse.finetuning.labelling.queue import Pool, Queue
from hanse.finetuning.models import embed, load_module, load_params, score

LABELLED, BY_BAND, SAMPLES = 300, 60, 50
LEARNING = Learning(round_trips=8, client_steps=100, controls=True)


def measure(options: Namespace) -> Iterator[Claim]:
    found = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(tried(Path(folder), seed))
            print(f"seed {seed}: " + "  ".join(f"{name} {value:.2f}" for name, value in found[-1].items()), flush=True)
    means = {name: mean(each[name] for each in found) for name in found[0]}
    print("means:  " + "  ".join(f"{name} {value:.2f}" for name, value in means.items()), flush=True)
    for rate, limit in (("eer", 6.0), ("hter", 8.0)):
        yield Claim(
            what=f"new class, {SAMPLES} images: the client's {rate.upper()}", hanse=f"{means[f'client {rate}']:.2f} %",
            bare=f"{means[f'base client {rate}']:.2f} %", figure=means[f"client {rate}"], limit=limit, unit="%",
        )  # fmt: skip


def tried(folder: Path, seed: int) -> dict[str, float]:
    """Rates in percent, of the base and the candidate; and how many of the images that were found are of the new class."""
    pool = split("client-pool", seed, new_class=True, cameras=VENDOR)
    rows = labelled_rows(folder / "queue", pool, seed)
    recipe, env = of_project(folder, LEARNING, pool.rows(rows), split("client-test", seed, new_class=True, cameras=VENDOR), seed)
    figures: dict[str, float] = {"anomalies": float(pool.labels[rows].sum()), "of the new class": float((pool.classes[rows] == NEW).sum())}
    for event in recipe.execute(env).events("figures"):
        if event["what"] in ("base", "candidate", "client alone", "vendor alone") and "rows" in event:
            prefix = "" if event["what"] == "candidate" else f"{event['what']} "
            figures |= {f"{prefix}{event['party']} {rate}": 100 * event[rate] for rate in ("eer", "hter")}
    return figures


def labelled_rows(folder: Path, pool: Split, seed: int) -> Any:
    """The rows of the pool that the queue and somebody who knows make a training set of."""
    module = load_module(HERE, Model())
    load_params(module, base(seed))
    names = [f"{row:05}" for row in range(len(pool.labels))]
    folder.mkdir(parents=True)
    with Labels(folder, by="somebody who knows") as labels:
        scores, embeddings = score(module, pool.inputs), embed(module, pool.inputs)
        queue = Queue(Pool(names=names, scores=scores, images=pool.images[..., None], embeddings=embeddings), labels, seed=seed)
        for number in range(LABELLED):
            shown = queue.next("window", "similar" if number >= BY_BAND and queue.found() else "band")
            shown = shown or queue.next("window", "band", (0.0, 1.0))
            assert shown is not None
            queue.label("window", names[shown.index], int(pool.labels[shown.index]))
    return np.array([int(each.file) for each in training_set(folder, SAMPLES, seed)])


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run(measure, options.parse_args())
