"""A real federation whose sites have rules of their own for statistics: what its jobs get, and what they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse.environments import PocEnv, SimEnv
from hanse.errors import HanseError, JobFailed
from hanse.jobs.describe import StatisticsRecipe
from hanse.jobs.kmeans import KMeansRecipe

OPEN = """
import numpy as np
from hanse import Disclosure, table_app

def load(site):
    x = np.repeat([0.5, 1.5, 2.5, 3.5], [60, 12, 40, 15])
    return {"x": x, "rare": np.where(np.arange(len(x)) < 15, 1.0, np.nan)}

app = table_app(load, disclosure=Disclosure(min_count=1, max_bins_share=1.0, extremes=True))
"""
SLY = """
import numpy as np
from hanse import App, FLModel

app = App()

@app.task("describe")
def describe(model, site):
    return FLModel({"x": {"moments": np.array([3.0, 0.0, 1.5, 0.5])}})

@app.task("histogram")
def histogram(model, site):
    return FLModel({"x": {"histogram": np.array([0, 3, 0])}})
"""
RANGES = {"x": [0.0, 4.0], "rare": [0.0, 4.0]}


@pytest.fixture
def poc(tmp_path: Path, clean: None) -> Callable[[str], PocEnv]:
    def make(clause: str) -> PocEnv:
        policy = tmp_path / "policy.yaml"
        policy.write_text(f"sandbox: 'off'\n{clause}\n")
        return PocEnv(sites=["oslo", "riga"], runs=tmp_path / "poc", console="quiet", policy=policy)

    return make


def statistics(code: Any, **settings: Any) -> StatisticsRecipe:
    return StatisticsRecipe(name="s", app=code, bins=4, ranges=RANGES, seed=3, **settings)


def test_the_sites_rules_hide_what_the_job_would_show(load: Callable[[str], Any], poc: Callable[[str], PocEnv], tmp_path: Path) -> None:
    recipe = statistics(load(OPEN).app)
    free = recipe.execute(SimEnv(sites=["oslo", "riga"], runs=tmp_path / "sim", console="quiet")).events("statistics")[-1]["columns"]
    assert free["x"]["groups"][""]["histogram"]["counts"] == [120, 24, 80, 30]
    assert (free["x"]["groups"][""]["min"], free["rare"]["groups"][""]["count"]) == (0.5, 30)

    run = recipe.execute(poc("statistics: {min_count: 20}"))
    told = run.events("statistics")[-1]
    whole = told["columns"]["x"]["groups"][""]
    assert whole["histogram"]["counts"] == [120, 0, 80, 0]
    assert whole["histogram"]["hidden"] == 54
    assert (whole["count"], whole["min"], whole["max"]) == (254, None, None)
    assert whole["mean"] == free["x"]["groups"][""]["mean"]
    assert told["columns"]["rare"]["withheld"] == ["oslo", "riga"]
    written = json.loads((run.folder / "statistics.json").read_text())
    assert written == {name: told[name] for name in ("columns", "members")}

    noisy = recipe.execute(poc("statistics: {min_count: 20, count_noise: 10}")).events("statistics")[-1]["columns"]["x"]["sites"]
    seen = [site["count"] for site in noisy.values()] + [n for site in noisy.values() for n in site["histogram"]["counts"]]
    exact = [127, 127, 60, 0, 40, 0, 60, 0, 40, 0]
    assert seen != exact  # six draws that no seed fixes, each of them 0 in one of 25 cases
    assert all(n == 0 or n >= 20 for n in seen)
    assert 0 < abs(noisy["oslo"]["mean"] - whole["mean"]) < 1


def test_code_that_does_not_keep_the_rules_is_refused_by_the_agent(load: Callable[[str], Any], poc: Callable[[str], PocEnv]) -> None:
    with pytest.raises(JobFailed, match=r"column 'x' holds fewer than 10, of which this site says nothing \[statistics.min_count\]"):
        statistics(load(SLY).app).execute(poc("statistics: {}"))


def test_what_the_rules_do_not_let_is_refused_by_its_clause(load: Callable[[str], Any], poc: Callable[[str], PocEnv]) -> None:
    kmeans = KMeansRecipe(name="k", app=load(OPEN).app, columns=["x"], clusters=2, rounds=2, seed=3)
    with pytest.raises(HanseError, match=r"k-means needs exact sums over rows.*\[statistics.count_noise\]"):
        kmeans.execute(poc("statistics: {count_noise: 2}"))
    with pytest.raises(JobFailed, match=r"there are fewer than 200 rows to speak of \[statistics.min_count\]"):
        kmeans.execute(poc("statistics: {min_count: 200}"))
