from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App
from hanse.environments import SimEnv
from hanse.errors import ConfigError
from hanse.jobs.evaluate import FedEvalRecipe
from hanse.messages.flmodel import FLModel

MODEL = {"w": np.ones(2)}


def scoring(*more: str) -> App:
    app = App()
    app.evaluate(lambda model, site: {"sum": float(model.params["w"].sum()) * site.rank})
    for name in more:
        app.task(name)(lambda model, site: FLModel({"w": np.full(2, site.rank)}))
    return app


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"app": App()}, "needs an app with a function for 'evaluate'"),
        ({"cross_site": True}, "needs an app with a function for 'submit_model'"),
        ({"cross_site": "yes"}, "cross_site='yes': it must be True or False"),
        ({"model": None}, "has no model to evaluate: give model="),
        ({"min_updates": 0}, "min_updates=0"),
        ({"within_s": -1}, "within_s=-1"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_wrong_arguments(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FedEvalRecipe(**{"name": "a", "app": scoring(), "model": MODEL} | wrong)


def test_one_model_or_every_sites(tmp_path: Path) -> None:
    env = SimEnv(num_clients=3, runs=tmp_path, console="quiet")
    run = FedEvalRecipe(name="a", app=scoring(), model=MODEL).execute(env)
    assert run.metrics == [{"sum": 2.0}]
    assert run.get_result().params["w"].tolist() == [1.0, 1.0]
    assert not run.events("cross_site")
    run = FedEvalRecipe(name="a", app=scoring("submit_model"), cross_site=True).execute(env)
    [event] = run.events("cross_site")
    assert {name: [row[site]["sum"] for site in sorted(row)] for name, row in event["scores"].items()} == {
        f"site-{rank + 1}": [0.0, 2.0 * rank, 4.0 * rank] for rank in range(3)
    }
