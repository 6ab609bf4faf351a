"""Analytics say the same, to the last bit, with any number of workers and in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse.environments import PocEnv, SimEnv
from hanse.jobs.describe import StatisticsRecipe
from hanse.jobs.kmeans import KMeansRecipe
from hanse.jobs.newton import LogisticNewtonRecipe
from hanse.jobs.recipe import Recipe
from hanse.server.run import Run

CODE = """
import numpy as np
from hanse import Disclosure, table_app

def load(site):
    rng = np.random.default_rng(site.rank)
    x = rng.normal(site.rank, 2, (300 + 50 * site.rank, 3))
    return {"a": x[:, 0], "b": x[:, 1], "rest": x[:, 2:], "ill": rng.random(len(x)) < 1 / (1 + np.exp(-x[:, 0]))}

app = table_app(load, disclosure=Disclosure(count_noise=1.5, range_noise=0.1, extremes=True))
"""
SITES = ["riga", "oslo", "bergen"]


@pytest.fixture(params=["statistics", "kmeans", "newton"])
def recipe(request: pytest.FixtureRequest, load: Callable[[str], Any]) -> Recipe:
    app = load(CODE).app
    if request.param == "statistics":
        return StatisticsRecipe(
            name="a", app=app, columns=["a", "b", "ill"], groups={"riga": "eu", "oslo": "eu/no", "bergen": "eu/no"}, seed=3
        )
    if request.param == "kmeans":
        return KMeansRecipe(name="a", app=app, columns=["a", "rest"], clusters=4, rounds=5, seed=3)
    return LogisticNewtonRecipe(name="a", app=app, features=["a", "b", "rest"], target="ill", ridge=0.1)


def test_the_same_bits_everywhere(recipe: Recipe, tmp_path: Path, clean: None, check_same: Callable[[Run, Run], None]) -> None:
    common: dict[str, Any] = {"sites": SITES, "console": "quiet"}
    first, second = (recipe.execute(SimEnv(workers=n, runs=tmp_path / f"sim{n}", **common)) for n in (1, 2))
    real = recipe.execute(PocEnv(runs=tmp_path / "poc", **common))
    for other in (second, real):
        if recipe.model is None and isinstance(recipe, StatisticsRecipe):
            [one], [two] = first.events("statistics"), other.events("statistics")
            assert one == two
            assert one["columns"]["a"]["groups"]["eu/no"]["sites"] == 2
            assert one["columns"]["a"]["groups"][""]["histogram"]["sites"] == 3
            assert "Statistics" in (other.folder / "report.html").read_text()
        else:
            check_same(first, other)
