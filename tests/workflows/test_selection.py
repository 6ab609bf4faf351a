"""Which sites train, on real sites: the chances against the papers', the choice by hand, and the same choice after a restart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site
from hanse.environments import SimEnv
from hanse.errors import ConfigError, JobFailed
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.loading import read_job
from hanse.jobs.recipe import Recipe
from hanse.messages.flmodel import FLModel
from hanse.server.run import Run
from hanse.workflows.fedavg import fedavg
from hanse.workflows.selection import ByExamples, PowerOfChoice, Selection, Uniform

CODE = """
from pathlib import Path
import numpy as np
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    if model.current_round == 2 and not Path(site.config.get("gate", "/")).exists():
        raise ValueError("not yet")
    return FLModel({"w": model.params["w"] + site.rng.normal(size=3)}, meta={"examples": 1 + site.rank})

@app.evaluate
def evaluate(model, site):
    return {"loss": float(np.sum((model.params["w"] - site.rank) ** 2))}

@app.task("examples")
def examples(model, site):
    return FLModel(meta={"examples": 1 + site.rank})
"""
MODEL = FLModel({"w": np.zeros(3)})
SELECTIONS = [ByExamples(), ByExamples({f"site-{n}": n for n in range(1, 7)}), PowerOfChoice(4), PowerOfChoice(4, by_examples=False)]


def app_of(**tasks: Callable[[FLModel, Site], Any]) -> App:
    app = App()
    for name, function in tasks.items():
        app.task(name)(function)
    return app


def train(model: FLModel, site: Site) -> FLModel:
    return FLModel({"w": model.params["w"] + site.rank})


def recipe_of(app: App, selection: Selection | None, **settings: Any) -> FedAvgRecipe:
    known = {"name": "job", "app": app, "model": MODEL.params, "rounds": 4, "sites_per_round": 2, "evaluate": False, "selection": selection}
    return FedAvgRecipe(**known | settings)


def run(recipe: Recipe, folder: Path, **env: Any) -> Run:
    return recipe.execute(SimEnv(num_clients=6, runs=folder, console="quiet", **env))


def bits(run: Run) -> bytes:
    return (run.folder / "model.safetensors").read_bytes()


def chosen(run: Run) -> list[list[str]]:
    trained = [event for event in run.events("update") if event["task"] == "train"]
    return [sorted(event["site"] for event in trained if event["round"] == round) for round in range(len(run.metrics))]


async def test_uniform_is_what_the_cohort_draws(load: Any, federate: Any, tmp_path: Path) -> None:
    async with federate(train, sites=9) as federation:
        cohort = federation.cohort
        assert await Uniform().select(cohort, MODEL, None) == tuple(cohort.sites)
        first = await Uniform().select(cohort, MODEL, 3)
        cohort._begin_commit()
        assert cohort.sample(3) == first
    app = load(CODE).app
    settings = {"config": {"gate": "/"}}
    assert bits(run(recipe_of(app, Uniform(), **settings), tmp_path / "a")) == bits(run(recipe_of(app, None, **settings), tmp_path / "b"))


async def test_chances_are_those_of_drawing_one_after_the_other(federate: Any) -> None:
    """Of p = .5, .3, .2, a pair has the last with .2 + .5 · .2 / .5 + .3 · .2 / .7 = .486, and so on. Three standard deviations of
    6,000 draws are below .02."""
    selection, draws = ByExamples({"a": 50, "b": 30, "c": 20, "none": 0}), 6000
    async with federate(train, sites=["a", "b", "c", "none"]) as federation:
        for count, expected in ((1, {"a": 0.5, "b": 0.3, "c": 0.2}), (2, {"a": 0.839, "b": 0.675, "c": 0.486})):
            found: Counter[str] = Counter()
            for _ in range(draws):
                found.update(await selection.select(federation.cohort, MODEL, count))
            assert {site: number / draws for site, number in found.items()} == pytest.approx(expected, abs=0.02)
        assert await selection.select(federation.cohort, MODEL, 3) == ("a", "b", "c")
        with pytest.raises(ConfigError, match=r"5 sites a round are asked for, of 4"):
            await selection.select(federation.cohort, MODEL, 5)
        with pytest.raises(ConfigError, match="names 1 sites, and 3 are missing, the first is 'b'"):
            await ByExamples({"a": 1}).select(federation.cohort, MODEL, 1)


async def test_sites_tell_how_many_examples_they_have(federate: Any) -> None:
    def examples(model: FLModel, site: Site) -> FLModel:
        assert model.params is None
        if site.rank == 3:
            raise ValueError("no data today")
        return FLModel(meta={"examples": [10, 0, 5, 0, "many"][site.rank]})

    async with federate(app_of(train=train, examples=examples), sites=5) as federation:
        cohort = federation.cohort
        assert {await ByExamples().select(cohort, MODEL, 2) for _ in range(5)} == {("site-1", "site-3")}
        with pytest.raises(ConfigError, match="3 sites are to be drawn by their examples, and 2 of 5 said that they have any"):
            await ByExamples().select(cohort, MODEL, 3)


async def test_sites_tell_it_once_in_a_job(federate: Any, tmp_path: Path) -> None:
    log = tmp_path / "asked"

    def examples(model: FLModel, site: Site) -> FLModel:
        with log.open("a") as asked:
            asked.write(f"{site.rank}")
        if site.rank == 1 and log.read_text().count("1") < 3:
            raise ValueError("not yet")
        return FLModel(meta={"examples": 1})

    for before in ("", "011123"):  # another job asks anew
        async with federate(app_of(train=train, examples=examples), sites=4) as federation:
            for after in ("0123", "01123", "011123", "011123") if not before else ("0011112233",) * 2:
                federation.cohort._begin_commit()
                await ByExamples().select(federation.cohort, MODEL, 2)
                assert "".join(sorted(log.read_text())) == after
                assert federation.cohort._asks == 1  # the tasks that follow have the same ids in a restarted job, which asks here


async def test_a_million_sites_are_not_asked(federate: Any) -> None:
    async with federate(app_of(train=train), sites=1_000_000) as federation:
        for selection in (ByExamples(), PowerOfChoice(4)):
            with pytest.raises(
                ConfigError, match="each of 1,000,000 sites would be asked how many examples it has, and at most 10,000 are"
            ):
                await selection.select(federation.cohort, MODEL, 2)


async def test_the_worst_of_the_candidates_train(federate: Any) -> None:
    losses = {1: 0.5, 2: math.nan, 3: 2.0, 4: 1.0, 5: 2.0, 6: math.inf}

    def evaluate(model: FLModel, site: Site) -> dict[str, float]:
        assert model.params["w"].tolist() == [0, 0, 0]
        return {"loss": losses[site.rank + 1], "negative": -losses[site.rank + 1]}

    async with federate(app_of(train=train, evaluate=evaluate), sites=6) as federation:

        async def select(count: int, **settings: Any) -> list[int]:
            sites = await PowerOfChoice(6, by_examples=False, **settings).select(federation.cohort, MODEL, count)
            return [int(site[-1]) for site in sites]

        assert await select(1) == [6]
        assert await select(2) == [3, 6]  # of equal losses, the first by name
        assert await select(3) == [3, 5, 6]
        assert await select(5) == [1, 3, 4, 5, 6]
        assert await select(2, metric="negative") == [1, 4]
        with pytest.raises(ConfigError, match="5 of 6 candidates gave a number as their 'loss', and 6 are to train"):
            await select(6)
        with pytest.raises(ConfigError, match="0 of 6 candidates gave a number as their 'f1'"):
            await select(1, metric="f1")


async def test_candidates_are_drawn_by_examples(federate: Any) -> None:
    async with federate(app_of(train=train, evaluate=lambda model, site: {"loss": 1.0}), sites=["a", "b", "c"]) as federation:
        selection = PowerOfChoice(2, examples={"a": 0, "b": 1, "c": 1})
        assert await selection.select(federation.cohort, MODEL, 2) == ("b", "c")
        asked = {event["site"] for event in federation.noted("update")}
        assert asked == {"b", "c"}


async def test_fedavg_trains_those_and_counts_those(federate: Any) -> None:
    """w goes to the mean rank of those chosen; a round's event counts those that trained, not those that were asked for their loss."""
    app = app_of(train=train, evaluate=lambda model, site: {"loss": float(site.rank)})
    async with federate(app, sites=5) as federation:
        model = await fedavg(federation.cohort, MODEL, rounds=2, sites_per_round=2, selection=PowerOfChoice(5, by_examples=False))
        assert model.params["w"].tolist() == [7.0] * 3  # twice (3 + 4) / 2
        assert [(event["good"], event["asked"]) for event in federation.noted("round")] == [(2, 2)] * 2


@pytest.mark.parametrize("selection", SELECTIONS, ids=["asked", "given", "power", "power of any"])
def test_the_same_bits_with_any_workers_and_after_a_restart(selection: Selection, load: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    recipe = recipe_of(load(CODE).app, selection, config={"gate": str(gate)})
    with pytest.raises(JobFailed, match="not yet") as failed:
        run(recipe, tmp_path / "broken")
    gate.touch()
    whole = run(recipe, tmp_path / "whole", workers=1)
    assert bits(run(recipe, tmp_path / "two", workers=2)) == bits(whole)
    resumed = run(recipe, tmp_path / "broken", resume=failed.value.folder)
    assert chosen(resumed) == chosen(whole)
    assert bits(resumed) == bits(whole)
    assert len(set(map(tuple, chosen(whole)))) > 1 or isinstance(selection, PowerOfChoice)
    assert bits(run(replace(recipe, selection=None), tmp_path / "uniform")) != bits(whole)


@pytest.mark.parametrize("selection", [Uniform(), *SELECTIONS])
def test_a_job_file_describes_it(selection: Selection, load: Any, tmp_path: Path) -> None:
    recipe = recipe_of(load(CODE).app, selection)
    assert read_job(recipe.export(tmp_path / "job")).selection == selection  # type: ignore[attr-defined]
    assert "selection" not in replace(recipe, selection=None).arguments_as_data()


@pytest.mark.parametrize(
    ("selection", "settings", "says"),
    [
        ("uniform", {}, "selection='uniform': it must be an object with a method select"),
        (PowerOfChoice(1), {}, "2 sites a round cannot be the worst of 1 candidates"),
        (PowerOfChoice(9), {"sites_per_round": None}, "all sites a round cannot be"),
        (PowerOfChoice(4, by_examples=False), {"app": app_of(train=train)}, "needs an app with a function for 'evaluate'"),
        (ByExamples(), {"sites_per_round": None}, "all sites train in each round: give sites_per_round"),
        (ByExamples(), {"app": app_of(train=train)}, "needs an app with a function for 'examples'"),
    ],
)
def test_a_recipe_that_cannot_choose(selection: Any, settings: Any, says: str, load: Any) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe_of(**{"app": load(CODE).app, "selection": selection} | settings)


def test_more_candidates_than_sites(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="selects from candidates=9, and the number of sites is 6"):
        run(recipe_of(load(CODE).app, PowerOfChoice(9)), tmp_path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PowerOfChoice(0), "candidates is 0"),
        (lambda: PowerOfChoice(True), "candidates is True"),
        (lambda: PowerOfChoice(2, metric=""), "metric is ''"),
        (lambda: PowerOfChoice(2, by_examples=1), "by_examples is 1"),  # type: ignore[arg-type]
        (lambda: ByExamples({}), "examples is {}"),
        (lambda: ByExamples({"a": -1}), "examples of site 'a' is -1"),
        (lambda: ByExamples({"a": math.inf}), "examples of site 'a' is inf"),
    ],
)
def test_wrong_arguments(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()
