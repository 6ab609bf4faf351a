"""The recipes: what they refuse, and that a job folder holds all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import Adam
from hanse.app import App
from hanse.environments import PocEnv, SimEnv, resume
from hanse.errors import ConfigError, JobFailed
from hanse.jobs.asynchronous import FedAsyncRecipe, FedBuffRecipe
from hanse.jobs.loading import read_job
from hanse.server.run import Run
from hanse.simulation.clock import Devices

MODEL = {"w": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        (FedBuffRecipe, {"rounds": 0}, "rounds=0: it must be a whole number above 0"),
        (FedBuffRecipe, {"buffer": 0}, "buffer=0: it must be a whole number above 0"),
        (FedBuffRecipe, {"concurrency": 1.5}, "concurrency=1.5: it must be a whole number above 0"),
        (FedBuffRecipe, {"within_s": 0}, "within_s=0: it must be a number above 0"),
        (FedBuffRecipe, {"staleness": "old"}, "'old' is no staleness function"),
        (FedBuffRecipe, {"aggregator": WeightedMean}, "must be an object with a method merge"),
        (FedBuffRecipe, {"server_optimizer": 1.0}, "must be an object with a method step"),
        (FedBuffRecipe, {"stop_when": "accuracy"}, "is no condition"),
        (FedAsyncRecipe, {"alpha": 0}, "alpha=0: it must be a number above 0"),
        (FedAsyncRecipe, {"alpha": 1.5}, "alpha=1.5: it must be above 0 and at most 1"),
        (FedAsyncRecipe, {"mu": -1}, "mu=-1: it must be a number above 0"),
        (FedAsyncRecipe, {"app": App()}, "train"),
    ],
)
def test_wrong_arguments(kind: Any, wrong: dict[str, Any], says: str, app: App) -> None:
    with pytest.raises(ConfigError, match=says):
        kind(**{"name": "a", "app": app, "model": MODEL, "rounds": 1, **wrong})


def test_more_sites_at_a_time_than_there_are(app: App, tmp_path: Path) -> None:
    recipe = FedBuffRecipe(name="a", app=app, model=MODEL, rounds=1, concurrency=3)
    with pytest.raises(ConfigError, match="concurrency=3, and the number of sites is 2"):
        recipe.execute(SimEnv(num_clients=2, runs=tmp_path))


@pytest.mark.parametrize(
    "recipe",
    [
        lambda app: FedBuffRecipe(
            name="a", app=app, model=MODEL, rounds=7, buffer=3, concurrency=2, staleness="hinge 2 1", within_s=9.0, best="min loss",
            stop_when="loss < 1", aggregator=WeightedMean("steps"), server_optimizer=Adam(0.5),
        ),
        lambda app: FedAsyncRecipe(name="a", app=app, model=MODEL, rounds=7, alpha=0.25, mu=0.5, staleness="constant"),
    ],
)  # fmt: skip
def test_a_job_folder_holds_all_of_it(recipe: Callable[[App], Any], app: App, tmp_path: Path) -> None:
    written = recipe(app)
    read = read_job(written.export(tmp_path / "job"))
    assert type(read) is type(written)
    assert read.arguments_as_data() == written.arguments_as_data()
    if isinstance(written, FedBuffRecipe):
        assert isinstance(read, FedBuffRecipe)
        assert read.server_optimizer == Adam(0.5)
        assert isinstance(read.aggregator, WeightedMean)
        assert read.aggregator.by == "steps"


# ------------------------------------------------------------------------------------------------------------- across commits and restarts

SLOW = """
import os
import numpy as np
from pathlib import Path
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    if site.rank == 1 and model.current_round == 0:
        open(site.config["pipe"]).read()  # until the other site has seen the fourth version
    if site.rank == 0 and model.current_round == 4:
        told = site.state.get("told")
        if not told:
            open(site.config["pipe"], "w").close()
            site.state["told"] = 1
        if told or site.config.get("waits"):
            open(site.config["done"]).read()  # until the slow one has been heard and has got a new task
    if site.rank == 1 and model.current_round > 0:
        open(site.config["done"], "w").close()
    metrics = {"loss": float(model.current_round), "mu": site.config.get("proximal_mu", 0.0)}
    return FLModel({"w": model.params["w"] + np.float32(1)}, metrics=metrics)
"""


def test_a_task_that_is_out_across_commits_in_a_real_federation(load: Callable[[str], Any], tmp_path: Path) -> None:
    """The slow site's update, of version 0, comes when there are four. It travels as a blob that outlives those commits."""
    size = 400_000
    for name in ("pipe", "done"):
        os.mkfifo(tmp_path / name)
    config = {name: str(tmp_path / name) for name in ("pipe", "done")}
    recipe = FedBuffRecipe(
        name="a", app=load(SLOW).app, model={"w": np.zeros(size, "f4")}, rounds=5, buffer=2, best="min loss", config=config
    )
    run = recipe.execute(PocEnv(num_clients=2, runs=tmp_path, console="quiet"))
    events = [(event["site"], event["round"], event["staleness"]) for event in run.events("update")]
    assert events[:8] == [("site-1", number, 0) for number in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert ("site-2", 4, 4) in events[8:]
    assert run.events("failure") == []
    w = 4 + (1 + 5**-0.5) / 2  # four plain steps, then one whose second update is four versions old
    np.testing.assert_allclose(run.get_result().params["w"], np.full(size, w), rtol=1e-6)


def test_one_update_at_a_time_in_a_real_federation(load: Callable[[str], Any], tmp_path: Path) -> None:
    """Four versions come of the fast site's updates, the fifth of one that was made of the first model; all are too small for blobs."""
    for name in ("pipe", "done"):
        os.mkfifo(tmp_path / name)
    config = {name: str(tmp_path / name) for name in ("pipe", "done")} | {"waits": True}
    recipe = FedAsyncRecipe(
        name="a", app=load(SLOW).app, model={"w": np.zeros(3, "f4")}, rounds=5, alpha=0.5, mu=0.25, best="min loss", config=config
    )
    run = recipe.execute(PocEnv(num_clients=2, runs=tmp_path, console="quiet"))
    events = [(event["site"], event["round"], event["staleness"]) for event in run.events("update")]
    assert events == [("site-1", 0, 0), ("site-1", 1, 0), ("site-1", 2, 0), ("site-1", 3, 0), ("site-2", 4, 4)]
    assert run.events("failure") == []
    assert [metrics["mu"] for metrics in run.metrics] == [0.25] * 5
    # x_t ← (1 - α_t) · x_{t-1} + α_t · x_new; x_new is x_{t-1} + 1 from the fast site, and 0 + 1 from the slow one, with α_t = 0.5 · s(4)
    w, late = 4 * 0.5, 0.5 * 5**-0.5
    np.testing.assert_allclose(run.get_result().params["w"], np.full(3, (1 - late) * w + late * 1), rtol=1e-6)


BREAKS = """
from pathlib import Path
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    if model.current_round == 2 and not Path(site.config["mended"]).exists():
        raise ValueError("no data today")
    return FLModel({"w": model.params["w"] + 1}, metrics={"loss": 1.0})
"""


def test_a_resumed_run_goes_on_from_its_last_commit_in_its_time(load: Callable[[str], Any], tmp_path: Path) -> None:
    """All sites begin anew there: what was out, and what was in the buffer, is gone."""
    mended = tmp_path / "mended"
    recipe = FedBuffRecipe(
        name="a", app=load(BREAKS).app, model={"w": np.zeros(1)}, rounds=4, buffer=2, best="min loss", config={"mended": str(mended)}
    )
    with pytest.raises(JobFailed, match="every site has failed"):
        recipe.execute(SimEnv(num_clients=2, devices=Devices(seconds={"site-1": 1.0, "site-2": 1.5}), runs=tmp_path, console="quiet"))
    stopped = Run(tmp_path / "a-001")
    assert [event["virtual_s"] for event in stopped.events("round")] == [1.5, 3.0]
    mended.touch()
    run = resume(tmp_path / "a-001", console="quiet")
    updates = [(event["site"], event["round"], event["staleness"], event["virtual_s"]) for event in run.events("update")]
    assert updates[-4:] == [("site-1", 2, 0, 4.0), ("site-2", 2, 0, 4.5), ("site-1", 3, 1, 5.0), ("site-1", 3, 0, 6.0)]
    assert len(run.metrics) == 4
