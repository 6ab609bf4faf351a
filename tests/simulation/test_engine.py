"""Whole jobs on real workers. "The same bits" are those of the model's file, which has the metrics in it too."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hanse.aggregation.mean import WeightedMean
from hanse.app import App, Site
from hanse.client.script import Script
from hanse.environments import SimEnv
from hanse.errors import JobFailed, TooFewUpdates
from hanse.filters import ClipNorm, Filters, GaussianNoise
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.recipe import Recipe
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task
from hanse.server.run import Run
from hanse.simulation.engine import AHEAD

MODEL = {"w": np.zeros(3, np.float32)}


class OwnMean(WeightedMean):
    """Not registered, so it is added up in the main process."""


Execute = Callable[..., Run]


@pytest.fixture
def execute(tmp_path: Path) -> Execute:
    def execute(recipe: Recipe, *, sites: int = 8, **env: Any) -> Run:
        return recipe.execute(SimEnv(num_clients=sites, runs=tmp_path / "runs", console="quiet", **env))

    return execute


def bits(run: Run) -> bytes:
    return (run.folder / "model.safetensors").read_bytes()


@pytest.fixture
def recipe(request: pytest.FixtureRequest, app: App, script: Path) -> FedAvgRecipe:
    """150 sites, of which 90 are drawn each round."""
    code: dict[str, Any] = {"app": app} if getattr(request, "param", "app") == "app" else {"script": script, "argv": ["0.5"]}
    filters = Filters(site_out=[ClipNorm(3.0)], server_in=[GaussianNoise(0.1)])
    return FedAvgRecipe(name="job", model=MODEL, rounds=3, sites_per_round=90, filters=filters, best="min loss", seed=4, **code)


@pytest.mark.parametrize("recipe", ["app", "script"], indirect=True)
def test_any_number_of_workers_gives_the_same_bits(recipe: FedAvgRecipe, execute: Execute, nothing_left: None) -> None:
    first = execute(recipe, sites=150, workers=1)
    assert np.ptp(first.get_result().params["w"]) > 0
    for workers in (2, 3, 5):
        run = execute(recipe, sites=150, workers=workers)
        assert run.facts["workers"] == workers
        assert bits(run) == bits(first)
        assert run.metrics == first.metrics
    assert bits(execute(replace(recipe, seed=5), sites=150)) != bits(first)


def test_workers_with_several_threads_give_them_too(recipe: FedAvgRecipe, execute: Execute, nothing_left: None) -> None:
    """Those are fresh interpreters, which read the job from its folder."""
    assert bits(execute(recipe, sites=150, workers=2, threads=2)) == bits(execute(recipe, sites=150))


@pytest.mark.parametrize("recipe", ["app", "script"], indirect=True)
def test_an_aggregator_that_is_not_registered_gives_them_too(recipe: FedAvgRecipe, execute: Execute) -> None:
    assert bits(execute(replace(recipe, aggregator=OwnMean()), sites=150, workers=3)) == bits(execute(recipe, sites=150))


def test_a_deadline_that_is_kept_changes_them_no_more_than_by_rounding(recipe: FedAvgRecipe, execute: Execute) -> None:
    timed = execute(replace(recipe, within_s=100.0), sites=150, workers=1)
    assert bits(execute(replace(recipe, grace_s=100.0), sites=150, workers=3)) == bits(timed)
    np.testing.assert_allclose(timed.get_result().params["w"], execute(recipe, sites=150).get_result().params["w"], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------------------ dying workers

DIE = """
import os, signal
from pathlib import Path

def die_once(mark):
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""
DYING_APP = """
import numpy as np
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    if site.rank == 3 and model.current_round == 1:
        {what}
    n = site.state["n"] = site.state.get("n", 0) + 1
    return FLModel({{"w": model.params["w"] + n * site.rng.normal(size=3).astype("f4")}}, metrics={{"n": n}})
"""
DYING_SCRIPT = """
import numpy as np
import hanse.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if flare.system_info()["rank"] == 3 and model.current_round == 1:
        {what}
    flare.send(flare.FLModel({{"w": model.params["w"] + np.random.normal(size=3).astype("f4")}}))
"""


@pytest.fixture(params=["app", "script"])
def dying(request: pytest.FixtureRequest, load: Any, tmp_path: Path) -> Callable[[str], FedAvgRecipe]:
    """A job whose site-4 does something in its second round."""

    def dying(what: str) -> FedAvgRecipe:
        if request.param == "app":
            code = {"app": load(DIE + DYING_APP.format(what=what)).app}
        else:
            (tmp_path / "dying.py").write_text(DIE + DYING_SCRIPT.format(what=what))
            code = {"script": tmp_path / "dying.py"}
        return FedAvgRecipe(name="dying", model=MODEL, rounds=3, **code)

    return dying


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_is_killed_costs_nothing(
    dying: Callable[[str], FedAvgRecipe], execute: Execute, workers: int, tmp_path: Path, nothing_left: None
) -> None:
    expected = execute(dying("pass"))
    run = execute(dying(f"die_once({str(tmp_path / 'mark')!r})"), workers=workers)
    assert (tmp_path / "mark").exists()
    assert bits(run) == bits(expected)
    assert run.metrics == expected.metrics
    assert run.events("failure") == []
    [warning] = run.events("message")
    assert re.fullmatch(r"worker process \d+ was killed by SIGKILL: a new one takes its place, .*", warning["text"])


def test_nor_does_it_where_updates_are_added_up_in_the_main_process(
    dying: Callable[[str], FedAvgRecipe], execute: Execute, tmp_path: Path
) -> None:
    run = execute(replace(dying(f"die_once({str(tmp_path / 'mark')!r})"), aggregator=OwnMean()), workers=3)
    assert len(run.events("message")) == 1
    assert bits(run) == bits(execute(dying("pass")))


@pytest.mark.parametrize(
    ("what", "why"), [("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"), ("os._exit(7)", "ended with status 7")]
)
def test_a_site_that_always_ends_its_worker_is_given_up(
    dying: Callable[[str], FedAvgRecipe], execute: Execute, what: str, why: str, nothing_left: None
) -> None:
    recipe = dying(what)
    with pytest.raises(JobFailed, match="7 good updates of 8 asked") as failed:
        execute(recipe, workers=2)
    [failure] = Run(failed.value.folder).events("failure")
    assert (failure["site"], failure["round"], failure["code"]) == ("site-4", 1, "WorkerDied")
    assert failure["message"] == f"the worker {why}, 3 times, while this site's group ran."
    run = execute(replace(recipe, min_updates=7), workers=2)
    assert [(event["good"], event["asked"]) for event in run.events("round")] == [(8, 8), (7, 8), (8, 8)]
    assert len(run.events("message")) == 3


async def test_a_worker_that_dies_between_rounds(federate: Any, nothing_left: None) -> None:
    async with federate(count, sites=6, workers=2) as federation:
        task = Task("train", FLModel(MODEL))
        await federation.cohort.reduce(task, WeightedMean())
        for pid in federation.sites.pids:
            os.kill(pid, signal.SIGKILL)
        reduced = await federation.cohort.reduce(task, WeightedMean())
        assert reduced.metrics == {"count": 2.0}
        assert len(federation.warnings) == 2


def count(model: FLModel, site: Site) -> FLModel:
    site.state["count"] = site.state.get("count", 0) + 1
    return FLModel({"w": model.params["w"] + np.float32(site.rank)}, metrics={"count": site.state["count"]})


# ------------------------------------------------------------------------------------------------------------------------------- sites


async def test_a_sites_state_goes_with_it_from_worker_to_worker(federate: Any) -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        seen = site.state.setdefault("seen", [])
        seen.append(os.getpid())
        site.state["total"] = site.state.get("total", np.zeros(2)) + site.rank
        if model.current_round == 2 and site.rank == 1:
            raise ValueError("this time it does not count")
        return FLModel(metrics={"rounds": len(seen), "total": float(site.state["total"][0]), "workers": len(set(seen))})

    async with federate(train, sites=12, workers=3) as federation:
        for number in range(6):
            task = Task("train", FLModel(MODEL, current_round=number))
            reduced = await federation.cohort.reduce(task, WeightedMean(), min_updates=11)
        for rank, update in enumerate(reduced.updates):
            rounds = 5 if rank == 1 else 6
            assert (update.model.metrics["rounds"], update.model.metrics["total"]) == (rounds, rank * rounds)
        assert federation.sites.states.keys() == set(federation.sites.roster)
    assert max(update.model.metrics["workers"] for update in reduced.updates) > 1


async def test_an_updates_arrays_are_its_own(federate: Any, nothing_left: None) -> None:
    """Small ones and large ones stay as they were, whatever comes after them and when the workers are gone."""

    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel({"small": np.full(3, site.rank), "large": np.full(site.config["size"], site.rank, np.float32)})

    for size in (10, 1 << 18):
        async with federate(train, sites=6, config={"size": size}) as federation:
            updates = [update async for update in federation.cohort.ask(Task("train", FLModel()))]
        for update in updates:
            rank = int(update.site[-1]) - 1
            assert set(update.model.params["large"].tolist()) == {float(rank)}
            assert update.model.params["small"].tolist() == [rank] * 3


async def test_large_models_are_summed_through_slots_that_are_used_again(federate: Any, nothing_left: None) -> None:
    size, workers = 1 << 18, 3

    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel({"w": model.params["w"] + np.float32(site.rank)})

    async with federate(train, sites=80, workers=workers) as federation:
        model, before = FLModel({"w": np.zeros(size, np.float32)}), psutil.Process().num_fds()
        for number in range(3):
            reduced = await federation.cohort.reduce(Task("train", model), WeightedMean())
            model = reduced.model
            assert set(model.params["w"].tolist()) == {39.5 * (number + 1)}
        assert psutil.Process().num_fds() <= before + 2 * AHEAD * workers**2  # of 192 partial sums


@pytest.mark.parametrize("aggregator", [WeightedMean(), OwnMean()], ids=["in the workers", "here"])
async def test_a_groups_updates_are_added_in_the_order_of_ranks(federate: Any, aggregator: WeightedMean) -> None:
    """The first site answers when the third has: (1 + 1e8) - 1e8 = 0 in float32, and (1e8 - 1e8) + 1 = 1."""
    reader, writer = os.pipe()

    def train(model: FLModel, site: Site) -> FLModel:
        if site.rank == 0 and type(aggregator) is OwnMean:
            os.read(reader, 1)
        if site.rank == 2:
            os.write(writer, b"!")
        return FLModel({"w": np.full(1, [1.0, 1e8, -1e8][site.rank], np.float32)})

    async with federate(train, sites=192) as federation:
        reduced = await federation.cohort.reduce(Task("train", FLModel()), aggregator, of=["site-003", "site-001", "site-002"])
    assert reduced.model.params["w"].tolist() == [0.0]
    os.close(reader)
    os.close(writer)


async def test_a_slow_site_does_not_hold_up_what_is_asked_of_others(federate: Any) -> None:
    """The first one answers when all others have, save one that may wait behind it."""
    reader, writer = os.pipe()

    def train(model: FLModel, site: Site) -> FLModel:
        if site.rank == 0:
            os.read(reader, 1)
        return FLModel(metrics={"x": 1.0})

    async with federate(train, sites=30) as federation, asyncio.timeout(30):
        came = []
        async for update in federation.cohort.ask(Task("train", FLModel())):
            came.append(update.site)
            if len(came) == 28:
                os.write(writer, b"!")
    assert "site-01" in came[28:]
    os.close(reader)
    os.close(writer)


async def test_two_asks_at_once(federate: Any) -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel({"w": model.params["w"] + np.float32(site.rank)})

    async with federate(train, sites=70, workers=3) as federation:
        starts = [0.0, 100.0, 200.0]
        tasks = [Task("train", FLModel({"w": np.full(3, start, np.float32)})) for start in starts]
        reduced = await asyncio.gather(*(federation.cohort.reduce(task, WeightedMean()) for task in tasks))
    assert [float(each.model.params["w"][0]) for each in reduced] == [start + 34.5 for start in starts]


async def test_what_sites_print_is_in_their_logs(federate: Any, tmp_path: Path) -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        print("round", model.current_round, "at", site.name)
        return FLModel(metrics={"x": 1.0})

    async with federate(train, sites=3) as federation:
        for number in range(2):
            await federation.cohort.reduce(Task("train", FLModel(current_round=number)), WeightedMean())
    for site in ("site-1", "site-2", "site-3"):
        assert (tmp_path / "logs" / f"{site}.log").read_text() == f"round 0 at {site}\nround 1 at {site}\n"


# ----------------------------------------------------------------------------------------------------------------------------- scripts


async def test_a_thousand_scripts_need_two_processes(federate: Any, script: Path, nothing_left: None) -> None:
    async with federate(Script(script, ("0.0",)), sites=1000, workers=2) as federation:
        assert len(psutil.Process().children()) == 2
        for number in range(2):
            reduced = await federation.cohort.reduce(Task("train", FLModel(MODEL)), WeightedMean())
            assert len(reduced.updates) == 1000
            assert reduced.metrics["rounds"] == number + 1
    assert federation.warnings == []


async def test_scripts_run_to_their_end(federate: Any, tmp_path: Path) -> None:
    path = tmp_path / "ending.py"
    path.write_text("""
import hanse.client as flare
flare.init()
while flare.is_running():
    flare.send(flare.FLModel(metrics={"x": 1.0})) if flare.receive() else None
rank = flare.system_info()["rank"]
print("the end")
if rank == 1:
    raise ValueError("at the very end")
while rank == 2:
    flare.is_running()
""")
    async with federate(Script(path), sites=3) as federation:
        await federation.cohort.reduce(Task("train", FLModel()), WeightedMean())
        assert not list((tmp_path / "logs").glob("*"))
    assert [(tmp_path / "logs" / f"site-{number}.log").read_text() for number in (1, 2, 3)] == ["the end\n"] * 3
    assert sorted(federation.warnings) == [
        "site-2, after the job's end: ValueError: ending.py:9: at the very end",
        "site-3, after the job's end: SiteFailed: ending.py goes on asking for tasks after the job's end; stopped.",
    ]


async def test_a_script_that_kills_its_worker_at_the_very_end(federate: Any, tmp_path: Path, nothing_left: None) -> None:
    path = tmp_path / "ending.py"
    path.write_text("""
import os, signal
import hanse.client as flare
flare.init()
while flare.is_running():
    flare.send(flare.FLModel(metrics={"x": 1.0})) if flare.receive() else None
os.kill(os.getpid(), signal.SIGKILL) if flare.system_info()["rank"] == 1 else None
""")
    async with federate(Script(path), sites=2, workers=2) as federation:
        await federation.cohort.reduce(Task("train", FLModel()), WeightedMean())
        pid = federation.sites.pids[1]
    assert federation.warnings == [f"worker process {pid} died while its scripts ran to their end"]


async def test_scripts_that_are_given_up_start_anew(federate: Any, script: Path, tmp_path: Path) -> None:
    path, (never, writer) = tmp_path / "stuck.py", os.pipe()
    text = script.read_text().replace(
        "    w = ", f"    if flare.get_config()['stuck'] == rank: __import__('os').read({never}, 1)\n    w = "
    )
    path.write_text(text)
    async with federate(Script(path, ("0.0",)), sites=4, workers=2) as federation:
        cohort = federation.cohort
        await cohort.reduce(Task("train", FLModel(MODEL), {"stuck": -1}), WeightedMean())
        with pytest.raises(TooFewUpdates, match="no update within"):
            await cohort.reduce(Task("train", FLModel(MODEL), {"stuck": 3}), WeightedMean(), of=["site-4"], within_s=0.02)
        reduced = await cohort.reduce(Task("train", FLModel(MODEL), {"stuck": -1}), WeightedMean())
    assert [update.model.metrics["rounds"] for update in reduced.updates] == [1, 2, 2, 1]  # those in site-4's worker
    os.close(never)
    os.close(writer)


def test_nothing_is_left_behind(app: App, script: Path, execute: Execute, nothing_left: None) -> None:
    for number in range(20):
        code: dict[str, Any] = {"app": app} if number % 2 else {"script": script, "argv": ["1"]}
        execute(FedAvgRecipe(name="job", model=MODEL, rounds=1, **code), sites=3, workers=2)
