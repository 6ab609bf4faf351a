from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site
from hanse.environments import SimEnv
from hanse.errors import ConfigError
from hanse.jobs.cyclic import CyclicRecipe
from hanse.messages.flmodel import FLModel


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rounds": 0}, "rounds=0: it must be a whole number above 0"),
        ({"rounds": None}, "rounds=None"),
        ({"min_updates": 0.5}, "min_updates=0.5"),
        ({"within_s": 0}, "within_s=0: it must be a number above 0"),
        ({"order": "shuffled"}, "order='shuffled': it must be one of fixed, random"),
        ({"evaluate": True}, "needs an app with a function for 'evaluate'"),
        ({"best": "max"}, "'max' is no goal"),
        ({"stop_when": "accuracy"}, "'accuracy' is no condition"),
        ({"app": App()}, "needs an app with a function for 'train'"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_wrong_arguments(app: App, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CyclicRecipe(**{"name": "a", "app": app, "rounds": 1} | wrong)


def test_its_arguments_reach_the_job(tmp_path: Path) -> None:
    """Each site writes its rank to the next place, where -1 stands; the third one fails."""
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        if site.rank == 2:
            raise ValueError("no data")
        trail = model.params["trail"].copy()
        trail[np.argmin(trail)] = site.rank
        return FLModel({"trail": trail})

    app.evaluate(lambda model, site: {"left": int((model.params["trail"] < 0).sum())})
    recipe = CyclicRecipe(
        name="a",
        app=app,
        model={"trail": np.full(15, -1)},
        rounds=9,
        order="random",
        min_updates=5,
        best="max left",
        stop_when="left < 1",
        seed=1,
    )
    env = SimEnv(num_clients=6, runs=tmp_path, console="quiet")
    run = recipe.execute(env)
    trail = run.get_result().params["trail"].tolist()
    laps = [trail[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(lap) == [0, 1, 3, 4, 5] for lap in laps)
    assert len(set(map(tuple, laps))) == 3
    assert run.get_best().params["trail"].tolist() == laps[0] + [-1] * 10
    assert replace(recipe, order="fixed").execute(env).get_result().params["trail"].tolist() == [0, 1, 3, 4, 5] * 3
