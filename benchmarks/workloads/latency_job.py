"""The jobs of `latency`, in `PocEnv`: `rounds COUNT` or `exchanges COUNT BYTES`. Prints the seconds of each round or exchange, as JSON.

rounds: federated averaging of a tiny model by two sites that return it at once, from commit to commit.
exchanges: one site gets a tensor of so many bytes and returns one of the same size, without a commit.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

import numpy as np

from hanse import App, Cohort, FedAvgRecipe, FLModel, PocEnv, Site, Task, WorkflowRecipe

WARM = 20

app = App()


@app.train
def train(model: FLModel, site: Site) -> FLModel:
    return FLModel(params=model.params)


async def exchanges(cohort: Cohort, model: FLModel, *, count: int) -> FLModel:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        async for update in cohort.ask(Task("train", model)):
            model = FLModel(params=update.model.params)
        seconds.append(time.perf_counter() - began)
    cohort.event("exchanges", seconds=seconds)
    return model


if __name__ == "__main__":
    what, count = sys.argv[1], int(sys.argv[2]) + WARM
    if what == "rounds":
        recipe = FedAvgRecipe(name="empty", app=app, model={"w": np.ones(10, np.float32)}, rounds=count)
        run = recipe.execute(PocEnv(num_clients=2, console="quiet"))
        measured = [after["time"] - before["time"] for before, after in pairwise(run.events("round"))]
    else:
        model = {"activations": np.ones(int(sys.argv[3]) // 4, np.float32)}
        job = WorkflowRecipe(name="exchanges", app=app, model=model, run=exchanges, arguments={"count": count})
        (noted,) = job.execute(PocEnv(num_clients=1, console="quiet")).events("exchanges")
        measured = noted["seconds"]
    print(json.dumps(measured[WARM - 1 :]))
