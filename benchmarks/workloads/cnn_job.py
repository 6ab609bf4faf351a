"""`device` in Hanse, function form: the seconds of each round but the first, as JSON. Takes the number of rounds."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

from cnn import IMAGES, SITES, SITES_PER_ROUND, first_model, fit

from hanse import App, FedAvgRecipe, FLModel, SimEnv, Site

app = App()


@app.train
def train(model: FLModel, site: Site) -> FLModel:
    params, loss = fit(model.params, site.rank)
    return FLModel(params=params, metrics={"loss": loss}, meta={"examples": IMAGES})


if __name__ == "__main__":
    recipe = FedAvgRecipe(
        name="device", app=app, model=first_model(), rounds=int(sys.argv[1]) + 1, sites_per_round=SITES_PER_ROUND, best="min loss"
    )
    run = recipe.execute(SimEnv(num_clients=SITES, workers=2, threads=1, console="quiet"))
    print(json.dumps([after["time"] - before["time"] for before, after in pairwise(run.events("round"))]))
