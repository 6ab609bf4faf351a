from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import SGD, Adam
from hanse.app import App, Site
from hanse.environments import SimEnv
from hanse.errors import ConfigError
from hanse.jobs.fedavg import FedAvgRecipe, FedOptRecipe, FedProxRecipe
from hanse.messages.flmodel import FLModel


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *(({name: value}, f"{name}={value!r}: it must be a whole number above 0")
          for name in ("rounds", "sites_per_round", "min_updates") for value in (0, -1, 1.5, True, "3")),
        ({"rounds": None}, "rounds=None"),
        *(({name: value}, f"{name}={value!r}: it must be a number above 0")
          for name in ("within_s", "grace_s") for value in (0, -0.5, float("nan"), "1", True)),
        ({"aggregator": "mean"}, "aggregator='mean': it must be an object with a method merge"),
        ({"aggregator": WeightedMean}, "aggregator=<class"),
        ({"evaluate": True}, "needs an app with a function for 'evaluate'"),
        ({"evaluate": "yes"}, "evaluate='yes': it must be True, False or None"),
        ({"best": "highest accuracy"}, "'highest accuracy' is no goal"),
        ({"best": 3}, "3 is no goal"),
        ({"stop_when": "accuracy = 1"}, "'accuracy = 1' is no condition"),
        ({"stop_when": 0.9}, "0.9 is no condition"),
        ({"app": App()}, "needs an app with a function for 'train', and this one has none"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_arguments(app: App, wrong: dict[str, Any], says: str) -> None:
    for recipe in (FedAvgRecipe, FedProxRecipe, FedOptRecipe):
        with pytest.raises(ConfigError, match=says):
            recipe(**{"name": "a", "app": app, "rounds": 1} | wrong)


@pytest.mark.parametrize("mu", [0, -1, "high"])
def test_wrong_mu(app: App, mu: Any) -> None:
    with pytest.raises(ConfigError, match=f"mu={mu!r}: it must be a number above 0"):
        FedProxRecipe(name="a", app=app, rounds=1, mu=mu)


@pytest.mark.parametrize("optimizer", ["adam", Adam])
def test_wrong_optimizer(app: App, optimizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"server_optimizer=.*: it must be an object with a method step"):
        FedOptRecipe(name="a", app=app, rounds=1, server_optimizer=optimizer)


def test_rounds_are_needed(app: App) -> None:
    with pytest.raises(TypeError, match="rounds"):
        FedAvgRecipe(name="a", app=app)  # type: ignore[call-arg]


def test_each_recipes_own_argument_reaches_the_job(tmp_path: Path) -> None:
    """One site steps by 1 less its proximal mu; the server's optimizer takes half of that."""
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel({"w": model.params["w"] + 1 - site.config.get("proximal_mu", 0)})

    def last(recipe: FedAvgRecipe) -> float:
        run = recipe.execute(SimEnv(num_clients=1, runs=tmp_path, console="quiet"))
        return float(run.get_result().params["w"][0])

    common: dict[str, Any] = {"name": "a", "app": app, "rounds": 2, "model": {"w": np.zeros(1)}}
    assert last(FedAvgRecipe(**common)) == 2.0
    assert last(FedProxRecipe(**common, mu=0.25)) == 1.5
    assert last(FedOptRecipe(**common, server_optimizer=SGD(0.5))) == 1.0
    assert last(FedAvgRecipe(**common, config={"proximal_mu": 1})) == 0.0


@pytest.mark.parametrize("deadline", [{"grace_s": 0.02}, {"within_s": 1.0}], ids=str)
def test_deadlines_reach_the_job(deadline: dict[str, float], tmp_path: Path) -> None:
    never, writer = os.pipe()
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        if site.rank == 2:
            os.read(never, 1)
        return FLModel({"w": model.params["w"] + 1})

    recipe = FedAvgRecipe(name="a", app=app, rounds=1, model={"w": np.zeros(1)}, min_updates=2, **deadline)  # type: ignore[arg-type]
    run = recipe.execute(SimEnv(num_clients=3, workers=2, runs=tmp_path, console="quiet"))
    assert [(event["site"], event["code"]) for event in run.events("failure")] == [("site-3", "DeadlineExceeded")]
    os.close(never)
    os.close(writer)


def test_an_app_that_can_evaluate_does_unless_told_otherwise(tmp_path: Path) -> None:
    app = App()
    app.train(lambda model, site: FLModel({"w": model.params["w"] + 1}, metrics={"received": float(model.params["w"][0])}))
    app.evaluate(lambda model, site: {"new": float(model.params["w"][0])})

    def metrics(**how: Any) -> list[Any]:
        recipe = FedAvgRecipe(name="a", app=app, rounds=3, model={"w": np.zeros(1)}, **how)
        return list(recipe.execute(SimEnv(num_clients=2, runs=tmp_path, console="quiet")).metrics)

    assert metrics(stop_when="new >= 2") == [{"received": 0.0, "new": 1.0}, {"received": 1.0, "new": 2.0}]
    assert metrics(evaluate=False, stop_when="received >= 1") == [{"received": 0.0}, {"received": 1.0}]
