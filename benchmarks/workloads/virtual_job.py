"""`virtual`: rounds of 1,000 of so many sites. As JSON, the seconds until the first task runs at a site, and those of each round but the
first. Takes the number of sites and of rounds."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

import numpy as np

from hanse import App, FedAvgRecipe, FLModel, SimEnv, Site
from hanse.partition import virtual

SITES_PER_ROUND, ROWS = 1000, 20
LABELS = np.random.default_rng(0).integers(10, size=60_000)
app = App()
partition = None


@app.train
def train(model: FLModel, site: Site) -> FLModel:
    began = time.monotonic()  # one clock for all processes of the machine
    assert partition is not None
    rows = partition[site.rank]
    return FLModel({"w": model.params["w"] + LABELS[rows].mean()}, metrics={"began": began}, meta={"examples": len(rows)})


if __name__ == "__main__":
    sites, rounds = map(int, sys.argv[1:])
    started = time.monotonic()
    partition = virtual(LABELS, sites, rows_per_site=ROWS, alpha=0.3)
    recipe = FedAvgRecipe(
        name="virtual", app=app, model={"w": np.zeros(10_000, np.float32)}, rounds=rounds, sites_per_round=SITES_PER_ROUND, best="max began"
    )
    run = recipe.execute(SimEnv(num_clients=sites, workers=2, console="quiet"))
    began = min(event["metrics"]["began"] for event in run.events("update"))
    seconds = [after["time"] - before["time"] for before, after in pairwise(run.events("round"))]
    print(json.dumps({"start_s": began - started, "rounds_s": seconds}))
