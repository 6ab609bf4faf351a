"""Sites that are not asked cost nothing."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.environments import SimEnv
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.workflows.selection import PowerOfChoice, Selection

CODE = """
from hanse import App, FLModel
from hanse.partition import iid

app = App()

@app.train
def train(model, site):
    rows = iid(100 * site.count, site.count)[site.rank]
    return FLModel({"w": model.params["w"] + rows.mean() / site.count}, meta={"examples": len(rows)})

@app.evaluate
def evaluate(model, site):
    return {"loss": site.rank / site.count}
"""


@pytest.mark.parametrize("selection", [None, PowerOfChoice(60, by_examples=False)], ids=["uniform", "power of choice"])
def test_a_billion_sites_take_the_memory_of_a_million(selection: Selection | None, load: Any, tmp_path: Path) -> None:
    def peak_bytes(sites: int) -> int:
        recipe = FedAvgRecipe(
            name="virtual", app=load(CODE).app, model={"w": np.zeros(3)}, rounds=2, sites_per_round=30, selection=selection, evaluate=False
        )
        tracemalloc.start()
        try:
            run = recipe.execute(SimEnv(num_clients=sites, workers=2, runs=tmp_path, console="quiet"))
            assert run.facts["sites"] == {"count": sites}
            sampled = {event["site"] for event in run.events("update") if event["task"] == "train"}
            assert 30 < len(sampled) <= 60
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(10**6)  # what is imported and cached meanwhile does not count
    assert peak_bytes(10**9) < peak_bytes(10**6) + (1 << 18)
