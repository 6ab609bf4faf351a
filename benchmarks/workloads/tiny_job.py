"""`tiny` in Hanse, with `LocalSGD` or a function: the seconds of each round but the first, as JSON. Takes which, rounds and workers."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

from tiny import RATE, SITES, SITES_PER_ROUND, first_model, fit, load_all, site_data

from hanse import App, FedAvgRecipe, FLModel, SimEnv, Site
from hanse.adapters.local_sgd import LocalSGD

value, function = App(), App()
value.train(LocalSGD(module=first_model, data=lambda site: site_data(site.rank), lr=RATE, batch_size=None))


@function.train
def train(model: FLModel, site: Site) -> FLModel:
    params, loss, examples = fit(model.params, site.rank)
    return FLModel(params=params, metrics={"loss": loss}, meta={"examples": examples})


if __name__ == "__main__":
    form, rounds, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    load_all()
    recipe = FedAvgRecipe(
        name="tiny",
        app={"value": value, "function": function}[form],
        model=first_model(),
        rounds=rounds + 1,
        sites_per_round=SITES_PER_ROUND,
        best="min loss",
    )
    run = recipe.execute(SimEnv(num_clients=SITES, workers=workers, threads=1, console="quiet"))
    print(json.dumps([after["time"] - before["time"] for before, after in pairwise(run.events("round"))]))
