"""`device` in Hanse: the seconds of each round but the first, as JSON. Takes the number of rounds, and "value" for `LocalSGD`."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

from cnn import BATCH, IMAGES, RATE, SITES, SITES_PER_ROUND, first_model, fit, site_data

from hanse import App, FedAvgRecipe, FLModel, SimEnv, Site
from hanse.adapters.local_sgd import LocalSGD

app, value = App(), App()
value.train(LocalSGD(module=first_model, data=lambda site: site_data(site.rank), lr=RATE, batch_size=BATCH))


@app.train
def train(model: FLModel, site: Site) -> FLModel:
    params, loss = fit(model.params, site.rank)
    return FLModel(params=params, metrics={"loss": loss}, meta={"examples": IMAGES})


if __name__ == "__main__":
    recipe = FedAvgRecipe(
        name="device",
        app=value if sys.argv[2:] == ["value"] else app,
        model=first_model(),
        rounds=int(sys.argv[1]) + 1,
        sites_per_round=SITES_PER_ROUND,
        best="min loss",
    )
    run = recipe.execute(SimEnv(num_clients=SITES, workers=2, threads=1, console="quiet"))
    print(json.dumps([after["time"] - before["time"] for before, after in pairwise(run.events("round"))]))
