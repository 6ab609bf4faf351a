"""The job of `transport`: a model of float32 tensors of 16 MiB each, to which every site adds a constant. `MIB SITES ROUNDS`.

It runs in `PocEnv`, so server and sites are processes that talk over mutual TLS. Prints the seconds of each round but the first, as JSON.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import numpy as np

from hanse import App, FedAvgRecipe, FLModel, PocEnv, Site

TENSOR_MIB = 16
app = App()


@app.train
def train(model: FLModel, site: Site) -> FLModel:
    return FLModel(params={name: array + np.float32(1) for name, array in model.params.items()})


if __name__ == "__main__":
    mib, sites, rounds = map(int, sys.argv[1:])
    model = {f"tensor_{number:02}": np.zeros((TENSOR_MIB << 20) // 4, np.float32) for number in range(mib // TENSOR_MIB)}
    recipe = FedAvgRecipe(name="transport", app=app, model=model, rounds=rounds + 1)
    run = recipe.execute(PocEnv(num_clients=sites, console="quiet"))
    print(json.dumps([after["time"] - before["time"] for before, after in pairwise(run.events("round"))]))
