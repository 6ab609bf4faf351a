"""Sites that are chosen by what they answer, in real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hanse.environments import PocEnv, SimEnv
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.server.run import Run
from hanse.workflows.selection import PowerOfChoice

CODE = """
import numpy as np
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    return FLModel({"w": model.params["w"] + (site.rank - model.params["w"]) / 2 + site.rng.normal(size=3)}, meta={"examples": 5})

@app.evaluate
def evaluate(model, site):
    return {"loss": float(np.sum((model.params["w"] - site.rank) ** 2))}

@app.task("examples")
def examples(model, site):
    return FLModel(meta={"examples": 10 + site.rank})
"""


def test_processes_give_the_same_bits(
    load: Callable[[str], Any], tmp_path: Path, clean: None, check_same: Callable[[Run, Run], None]
) -> None:
    recipe = FedAvgRecipe(
        name="a", app=load(CODE).app, model={"w": np.zeros(3)}, rounds=3, sites_per_round=1, selection=PowerOfChoice(2), best="min loss"
    )
    simulated = recipe.execute(SimEnv(num_clients=3, runs=tmp_path / "sim", console="quiet"))
    real = recipe.execute(PocEnv(num_clients=3, runs=tmp_path / "poc", console="quiet"))
    check_same(simulated, real)
    assert [(event["good"], event["asked"]) for event in real.events("round")] == [(1, 1)] * 3
