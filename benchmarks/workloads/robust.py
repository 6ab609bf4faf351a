"""`robust`, one measurement in a process of its own: a rule combines the files of a folder. Prints the seconds it took, as JSON.

`idle` loads and maps what the rules need and combines nothing; `numpy` is `np.median` of an array of all updates, which is made before.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from hanse import FLModel, Krum, Median, Update
from hanse.messages.codec import read
from hanse.messages.task import TaskId


def with_hanse(paths: list[Path], rule: Median | Krum | None) -> float:
    reference = FLModel({name: np.broadcast_to(np.float32(0), array.shape) for name, array in read(paths[0])[0].params.items()})
    began = time.perf_counter()
    updates = [Update(path.stem, TaskId("robust", 0, 0, path.stem), FLModel(read(path)[0].params, "DIFF")) for path in paths]
    if rule is None:
        return time.perf_counter() - began
    combined = rule.fresh(reference)
    for update in updates:
        combined.add(update)
    params = combined.result().params
    seconds = time.perf_counter() - began
    for name, array in params.items():  # a few numbers of each tensor, against NumPy
        stack = np.stack([update.model.params[name][:100] for update in updates])
        expected = np.median(stack, axis=0) if isinstance(rule, Median) else stack
        assert (np.array_equal(array[:100], expected)) or (isinstance(rule, Krum) and (stack == array[:100]).all(axis=1).any()), name
    return seconds


def with_numpy(paths: list[Path]) -> float:
    models = [read(path)[0].params for path in paths]
    seconds = 0.0
    for name in models[0]:
        stack = np.stack([model[name] for model in models])
        began = time.perf_counter()
        np.median(stack, axis=0)
        seconds += time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    files = sorted(Path(folder).iterdir())
    hostile = (len(files) - 3) // 2
    print(json.dumps(with_numpy(files) if kind == "numpy" else with_hanse(files, {"median": Median(), "krum": Krum(hostile)}.get(kind))))
