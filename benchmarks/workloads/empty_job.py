"""`overhead` in Hanse: an empty task in function form or as a script. Prints the seconds of each round but the first, as JSON."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from hanse import App, FedAvgRecipe, FLModel, SimEnv, Site

SHAPES = {"hidden.weight": (90, 90), "hidden.bias": (90,), "out.weight": (20, 90), "out.bias": (10,)}  # 10,000 numbers

app = App()


@app.train
def train(model: FLModel, site: Site) -> FLModel:
    return FLModel(params=model.params)


if __name__ == "__main__":
    form, sites, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    runs = {"app": app} if form == "function" else {"script": Path(__file__).with_name("empty_site.py")}
    model = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    run = FedAvgRecipe(name="empty", model=model, rounds=rounds + 1, **runs).execute(SimEnv(num_clients=sites, workers=1, console="quiet"))
    print(json.dumps([after["time"] - before["time"] for before, after in pairwise(run.events("round"))]))
