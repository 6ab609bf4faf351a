from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.analytics import table_app
from hanse.app import App
from hanse.errors import ConfigError
from hanse.jobs.describe import StatisticsRecipe
from hanse.jobs.loading import read_job

CODE = "from hanse import table_app\ndef load(site):\n    return {}\napp = table_app(load)\n"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"app": App()}, "needs an app with a function for 'describe'"),
        ({"columns": []}, r"columns=\[\]: give a list of different column names"),
        ({"columns": "age"}, "columns='age': give a list"),
        ({"columns": ["a", "a"]}, "give a list of different column names"),
        ({"bins": 0}, "bins=0"),
        ({"ranges": {"age": [120, 0]}}, r"ranges\['age'\]=\[120, 0\]: give a lower and a higher end"),
        ({"ranges": {"age": [0]}}, r"ranges\['age'\]"),
        ({"ranges": {"age": np.zeros(2)}}, "ranges must hold JSON values only"),
        ({"quantiles": [0.5, 1.5]}, "quantiles=.*from 0 to 1"),
        ({"groups": {"a": "/"}}, r"groups\['a'\]='/': give a path"),
        ({"min_updates": 0}, "min_updates=0"),
        ({"within_s": 0}, "within_s=0"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_wrong_arguments(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        StatisticsRecipe(**{"name": "a", "app": table_app(lambda site: {})} | wrong)


def test_the_job_folder_holds_all_of_it(load: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "columns": ["age"],
        "bins": 5,
        "ranges": {"age": [0, 120]},
        "quantiles": [0.9],
        "groups": {"site-1": "eu/de"},
    }
    recipe = StatisticsRecipe(name="a", app=load(CODE).app, min_updates=1, within_s=5.0, **settings)
    again = read_job(recipe.export(tmp_path / "job"))
    assert isinstance(again, StatisticsRecipe)
    assert {name: getattr(again, name) for name in settings} == settings
    assert (again.min_updates, again.within_s) == (1, 5.0)
