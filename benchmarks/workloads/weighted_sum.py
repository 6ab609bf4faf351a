"""`sum`, one measurement in a process of its own: `hanse` or `torch` adds the files of a folder. Prints the seconds it took, as JSON.

A run with torch tells, after that, the seconds of adding everything once more, into memory that is there already.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hanse import FLModel, Update, WeightedMean
from hanse.messages.codec import read
from hanse.messages.task import TaskId


def with_hanse(paths: list[Path], threads: int) -> list[float]:
    began = time.perf_counter()
    mean = WeightedMean("examples", threads=threads)
    for number, path in enumerate(paths):
        model = read(path)[0]
        mean.add(Update(path.stem, TaskId("sum", 0, 0, path.stem), FLModel(params=model.params, meta={"examples": number + 1})))
    params = mean.result().params
    seconds = time.perf_counter() - began
    _check(params, len(paths))
    return [seconds]


def with_torch(paths: list[Path], threads: int) -> list[float]:
    import torch  # here, as it would count in Hanse's memory

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    weights = [number + 1 for number in range(len(paths))]

    def add(models: list[dict[str, torch.Tensor]], total: dict[str, torch.Tensor]) -> float:
        began = time.perf_counter()
        for weight, model in zip(weights, models, strict=True):
            for name, tensor in total.items():
                tensor.add_(model[name], alpha=weight / sum(weights))
        return time.perf_counter() - began

    began = time.perf_counter()
    models = [{name: torch.from_numpy(array) for name, array in read(path)[0].params.items()} for path in paths]
    total = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    add(models, total)
    seconds = time.perf_counter() - began
    _check({name: tensor.numpy() for name, tensor in total.items()}, len(paths))
    return [seconds, add(models, total)]


def _check(params: Mapping[str, np.ndarray], updates: int) -> None:
    """File number k, from 0, holds k + 1 throughout, and its weight is k + 1 too."""
    expected = sum(k * k for k in range(1, updates + 1)) / sum(range(1, updates + 1))
    for name, array in params.items():
        assert abs(float(array.reshape(-1)[-1]) - expected) < 1e-3, (name, array)


if __name__ == "__main__":
    kind, threads, folder = sys.argv[1:]
    print(json.dumps({"hanse": with_hanse, "torch": with_torch}[kind](sorted(Path(folder).iterdir()), int(threads))))
