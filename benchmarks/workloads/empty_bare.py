"""`overhead` bare: call the function for each site and average with NumPy. Prints the seconds of each round but the first, as JSON."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from empty_job import SHAPES


def train(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return params


sites, rounds = int(sys.argv[1]), int(sys.argv[2])
params = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
seconds = []
for _ in range(rounds + 1):
    began = time.perf_counter()
    total = {name: np.zeros_like(array) for name, array in params.items()}
    for _ in range(sites):
        for name, array in train(params).items():
            total[name] += array
    params = {name: array / sites for name, array in total.items()}
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds[1:]))
