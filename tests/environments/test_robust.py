"""Robust aggregation over whole jobs: one hostile site, and the same bits wherever the job runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse import (
    QFFL,
    Bulyan,
    FedAvgRecipe,
    FedBuffRecipe,
    FedNova,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NormBoundedMean,
    PocEnv,
    SimEnv,
    TrimmedMean,
    WeightedMean,
    read_job,
)
from hanse.errors import ConfigError
from hanse.server.run import Run

CODE = """
import numpy as np
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    w = model.params["w"]
    loss = float(np.square(w - 1).mean())
    step = 0.5 * (1 - w) + 0.1 * site.rng.standard_normal(w.shape)
    if site.rank == 0 and site.config.get("odd"):
        return FLModel({"w": step.astype("f4"), "n": np.array(0)}, params_type="DIFF", metrics={"loss": loss})
    if site.rank == 0 and site.config.get("hostile"):
        step = -100 * step
    meta = {"examples": 10 + site.rank, "steps": 2 + site.rank}
    return FLModel({"w": (w + step).astype("f4"), "n": np.array(site.rank)}, metrics={"loss": loss}, meta=meta)
"""
MODEL = {"w": np.zeros(140_000, np.float32), "n": np.array(0)}
RULES = [Median(), TrimmedMean(0.2), Krum(1), MultiKrum(1), Bulyan(1), GeometricMedian(), NormBoundedMean(), FedNova(), QFFL()]
ids = lambda value: value if isinstance(value, int) else type(value).__name__  # noqa: E731


def recipe(load: Callable[[str], Any], rule: Any, *, rounds: int = 2, **config: Any) -> FedAvgRecipe:
    return FedAvgRecipe(name="robust", app=load(CODE).app, model=MODEL, rounds=rounds, aggregator=rule, config=config, best="min loss")


@pytest.mark.parametrize(("rule", "sites"), [*((rule, 7) for rule in RULES), (Median(), 70), (FedNova(), 70)], ids=ids)
def test_any_number_of_workers_gives_the_same_bits(load, tmp_path: Path, clean: None, check_same, rule, sites) -> None:
    """Of 70 sites several are in a group."""
    one, two = (
        recipe(load, rule).execute(SimEnv(num_clients=sites, workers=workers, runs=tmp_path / str(workers), console="quiet"))
        for workers in (1, 2)
    )
    check_same(one, two)


def test_a_federation_of_processes_gives_the_same_bits(load, tmp_path: Path, clean: None, check_same) -> None:
    job = recipe(load, TrimmedMean(0.3))
    simulated = job.execute(SimEnv(num_clients=3, runs=tmp_path / "sim", console="quiet"))
    check_same(simulated, job.execute(PocEnv(num_clients=3, runs=tmp_path / "poc", console="quiet")))


@pytest.mark.parametrize("rule", [WeightedMean(), *RULES[:6]], ids=ids)
def test_one_hostile_site(load, tmp_path: Path, clean: None, rule) -> None:
    run = recipe(load, rule, hostile=True, rounds=4).execute(SimEnv(num_clients=7, runs=tmp_path, console="quiet"))
    last = Run(run.folder).metrics[-1]["loss"]
    assert (last > 100) if isinstance(rule, WeightedMean) else (last < 0.1)


def test_a_job_file_names_the_rule(load, tmp_path: Path) -> None:
    recipe(load, TrimmedMean(0.25)).export(tmp_path / "job")
    again = read_job(tmp_path / "job")
    assert isinstance(again, FedAvgRecipe)
    assert isinstance(again.aggregator, TrimmedMean)
    assert again.aggregator.trim == 0.25


def test_too_few_sites_are_told_before_any_trains(load, tmp_path: Path, clean: None) -> None:
    with pytest.raises(ConfigError, match="Krum needs at least 5 updates a round, 4 sites are asked"):
        recipe(load, Krum(1)).execute(SimEnv(num_clients=4, runs=tmp_path / "runs", console="quiet"))
    with pytest.raises(ConfigError, match="Krum needs at least 5 updates a round, 2 sites are asked"):
        replace(recipe(load, Krum(1)), sites_per_round=2).execute(PocEnv(num_clients=9, runs=tmp_path / "runs", console="quiet"))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="Krum needs at least 5 updates a step, and buffer is 4"):
        FedBuffRecipe(name="job", app=load(CODE).app, rounds=1, buffer=4, aggregator=Krum(1))


def test_a_site_that_sends_what_no_other_does_is_named(load, tmp_path: Path, clean: None) -> None:
    run = recipe(load, Median(), rounds=1, odd=True).execute(SimEnv(num_clients=4, runs=tmp_path, console="quiet"))
    (message,) = run.events("message")
    assert (message["level"], message["text"]) == ("warning", "Median left out site-1: most sent another kind of update.")
