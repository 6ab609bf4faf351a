"""The task and its base model: which clothes are an anomaly, seen through the vendor's six devices; kept in build/ once it is trained.

Classes 0, 2, 4 and 6 (tops, pullovers, coats, shirts) are normal, 1, 5, 7, 8 and 9 (trousers, shoes, bags) anomalies; the vendor has never
seen class 3, dresses. The vendor's and the client's images are different ones.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from blake3 import blake3
from devices import CLIENT, VENDOR, Device, seen, through
from model import build
from torch import nn

from hanse.finetuning.contract import Schema
from hanse.finetuning.models import load_params, params_of, score
from hanse.messages.codec import read, write
from hanse.messages.flmodel import FLModel
from hanse.seeds import generator, seed_for
from hanse.statistics.error_rates import eer

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

HERE = Path(__file__).parent
ANOMALIES, NEW = (1, 5, 7, 8, 9), 3
SCHEMA = Schema(shape=[28, 28, 1], mean=[0.286], std=[0.353])
STEPS, BATCH, RATE = 1000, 128, 0.1


@dataclass(frozen=True)
class Split:
    """Images as devices have seen them. images: uint8, shape (n, 28, 28). labels: 0 and 1. devices: index of each one's device."""

    images: Array
    labels: Array
    devices: Array
    classes: Array

    @property
    def inputs(self) -> Array:
        """float32, shape (n, 1, 28, 28), as the model takes them."""
        return ((self.images[:, None] / np.float32(255) - np.float32(SCHEMA.mean[0])) / np.float32(SCHEMA.std[0])).astype(np.float32)

    def rows(self, rows: Array) -> Split:
        return Split(self.images[rows], self.labels[rows], self.devices[rows], self.classes[rows])


@cache
def _clothes() -> dict[str, Array]:
    folder = Path(os.environ.get("HANSE_DATA", HERE.parents[2] / "shared" / "data"))
    with np.load(folder / "fashion_mnist.npz") as arrays:
        return dict(arrays)


def split(name: str, seed: int, *, new_class: bool = False, cameras: tuple[Device, ...] = ()) -> Split:
    """One of vendor-train (40,000 images), vendor-holdout (10,000), client-pool (10,000) and client-test (10,000), less those of class 3.

    seed: of who gets which image, and of the devices. new_class: with class 3, as an anomaly. cameras: default the party's own.
    """
    order, clothes = generator(seed, "order").permutation(60_000), _clothes()
    parts = {"vendor-train": order[:40_000], "vendor-holdout": order[40_000:50_000], "client-pool": order[50_000:]}
    images, classes = (clothes[f"{what}_{'train' if name in parts else 'test'}"] for what in "xy")
    if name in parts:
        images, classes = images[parts[name]], classes[parts[name]]
    if not new_class:
        images, classes = images[classes != NEW], classes[classes != NEW]
    cameras = cameras or (VENDOR if name.startswith("vendor") else CLIENT)
    devices = generator(seed, name, "devices").integers(0, len(cameras), len(images))
    labels = np.isin(classes, (*ANOMALIES, NEW)).astype(np.int64)
    return Split(seen(images, devices, cameras, seed_for(seed, name)), labels, devices, classes.astype(np.int64))


def base(seed: int) -> dict[str, Array]:
    """The base model's weights, trained on the vendor's devices, or as they were kept."""
    kept = HERE.parents[1] / "build" / "finetuning" / f"base-{_settings()}-{seed}.safetensors"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept, FLModel(_trained(split("vendor-train", seed), seed)))
    return {name: np.array(array) for name, array in read(kept)[0].params.items()}


def _settings() -> str:
    """Of all that the base model comes of: the settings, its code, and what the devices do to a few images."""
    settings = repr((ANOMALIES, NEW, STEPS, BATCH, RATE, VENDOR)).encode() + (HERE / "model.py").read_bytes()
    views = b"".join(through(_clothes()["x_train"][:20], device, 0).tobytes() for device in VENDOR)
    return str(blake3(settings + views).hexdigest(8))


def _trained(data: Split, seed: int) -> dict[str, Array]:
    """SGD with Nesterov momentum along one cycle of the learning rate."""
    torch.manual_seed(seed)
    module, rng = build().train(), generator(seed, "base")
    inputs, labels = torch.from_numpy(data.inputs), torch.from_numpy(data.labels)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.from_numpy(rng.choice(len(labels), BATCH, replace=False, shuffle=False))
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return params_of(module)


def rates(module: nn.Module, data: Split, cameras: tuple[Device, ...]) -> dict[str, float]:
    """The equal error rate in percent, over all and on each device."""
    scores = score(module, data.inputs)
    found = {"all": eer(scores, data.labels)[0] * 100}
    for nth, device in enumerate(cameras):
        rows = data.devices == nth
        found[device.name] = eer(scores[rows], data.labels[rows])[0] * 100
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 (default 1)")
    for seed in range(parser.parse_args().seeds):
        start = time.perf_counter()
        module = build()
        load_params(module, base(seed))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s")
        for name, cameras in (("vendor-holdout", VENDOR), ("client-test", CLIENT)):
            table = rates(module, split(name, seed), cameras)
            print(f"  {name}, EER %\n" + "\n".join(f"    {device:16}{rate:6.2f}" for device, rate in table.items()))


if __name__ == "__main__":
    main()
