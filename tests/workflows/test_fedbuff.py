"""FedBuff on real sites: against its paper's Algorithm 1 written out in NumPy, and in simulated time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import SGD
from hanse.app import App, Site
from hanse.environments import SimEnv
from hanse.errors import JobFailed
from hanse.filters import Exclude, Filters
from hanse.jobs.asynchronous import FedBuffRecipe
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.recipe import Recipe
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.server.run import Run
from hanse.simulation.clock import Devices

Vector = np.ndarray[Any, np.dtype[np.float64]]
START = np.array([0.0, 4.0])
SECONDS = {"site-1": 1.0, "site-2": 2.0, "site-3": 3.0, "site-4": 10.0}


def step_at(rank: int, w: Vector) -> Vector:
    """What site `rank` adds to w: a gradient step towards a point of its own."""
    return 0.25 * (np.array([8.0, -2.0]) * (rank + 1) - w)


app, diffs = App(), App()


@app.train
def train(model: FLModel, site: Site) -> FLModel:
    w = model.params["w"]
    return FLModel({"w": w + step_at(site.rank, w)}, metrics={"loss": float(w[0])}, meta={"examples": 1 + site.rank})


@diffs.train
def train_diff(model: FLModel, site: Site) -> FLModel:
    return FLModel({"w": step_at(site.rank, model.params["w"])}, ParamsType.DIFF, metrics={"loss": float(model.params["w"][0])})


def execute(recipe: Recipe, folder: Path, *, sites: int = 4, seconds: Mapping[str, float] | float = 1.0, **env: Any) -> Run:
    return recipe.execute(SimEnv(num_clients=sites, devices=Devices(seconds=seconds), runs=folder, console="quiet", **env))


def fedbuff(**settings: Any) -> FedBuffRecipe:
    return FedBuffRecipe(name="job", model={"w": START}, best="min loss", **{"app": app, **settings})


def arrivals(run: Run) -> list[tuple[str, int, float]]:
    return [(event["site"], event["staleness"], event["virtual_s"]) for event in run.events("update")]


def times(run: Run) -> list[float]:
    return [event["virtual_s"] for event in run.events("round")]


def rank(site: str) -> int:
    return int(site.removeprefix("site-")) - 1


def test_one_site_at_a_time_and_no_buffer_is_sgd(tmp_path: Path) -> None:
    run = execute(fedbuff(rounds=12, buffer=1, concurrency=1), tmp_path, seconds=SECONDS)
    w, now_s = START, 0.0
    for site, staleness, at_s in arrivals(run):
        w, now_s = w + step_at(rank(site), w), now_s + SECONDS[site]
        assert (staleness, at_s) == (0, now_s)
    np.testing.assert_allclose(run.get_result().params["w"], w, rtol=1e-12)
    assert {site for site, _, _ in arrivals(run)} == set(SECONDS)


@pytest.mark.parametrize("code", [app, diffs])
def test_equally_fast_sites_are_synchronous(code: App, tmp_path: Path) -> None:
    asynchronous = execute(fedbuff(app=code, rounds=5, buffer=4), tmp_path)
    recipe = FedAvgRecipe(name="job", app=code, model={"w": START}, rounds=5, aggregator=WeightedMean("equal"), best="min loss")
    synchronous = execute(recipe, tmp_path)
    assert {staleness for _, staleness, _ in arrivals(asynchronous)} == {0}
    assert times(asynchronous) == times(synchronous) == [1.0, 2.0, 3.0, 4.0, 5.0]
    found, expected = (run.get_result().params["w"] for run in (asynchronous, synchronous))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    if code is diffs:
        assert found.tobytes() == expected.tobytes()


def test_the_order_of_events_by_hand(tmp_path: Path) -> None:
    """Two updates a step. At each instant the answers come by rank, and only then new tasks go out."""
    run = execute(fedbuff(rounds=4, buffer=2), tmp_path, seconds=SECONDS)
    assert arrivals(run) == [
        ("site-1", 0, 1.0), ("site-1", 0, 2.0),  # version 1
        ("site-2", 1, 2.0), ("site-1", 0, 3.0),  # its task went out after version 1; version 2
        ("site-3", 2, 3.0), ("site-1", 0, 4.0),  # version 3
        ("site-2", 2, 4.0), ("site-1", 0, 5.0),  # out since 2, when there was version 1; version 4
    ]  # fmt: skip
    assert times(run) == [2.0, 3.0, 4.0, 5.0]
    w = [START]
    weight = {0: 1.0, 1: 2**-0.5, 2: 3**-0.5}
    for step in ([(0, 0), (0, 0)], [(1, 0), (0, 1)], [(2, 0), (0, 2)], [(1, 1), (0, 3)]):  # rank, version it was made from
        now = len(w) - 1
        w.append(w[-1] + 0.5 * sum(weight[now - version] * step_at(rank, w[version]) for rank, version in step))
    np.testing.assert_allclose(run.get_result().params["w"], w[-1], rtol=1e-12)


def test_settings_reach_the_algorithm(tmp_path: Path) -> None:
    """One site, so no update is stale: η_g and momentum alone."""
    recipe = fedbuff(rounds=3, buffer=2, staleness="constant", server_optimizer=SGD(0.5, momentum=0.5), aggregator=WeightedMean())
    run = execute(recipe, tmp_path, sites=1)
    w, momentum = START, np.zeros(2)
    for _ in range(3):
        momentum = 0.5 * momentum + step_at(0, w)
        w = w + 0.5 * momentum
    np.testing.assert_allclose(run.get_result().params["w"], w, rtol=1e-12)


def test_tensors_that_sites_keep_to_themselves_stay_as_they_are(tmp_path: Path) -> None:
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel({"body": {"w": model.params["body"]["w"] + 1}, "head": {"w": model.params["head"]["w"] + 1}})

    start = {"body": {"w": np.zeros(2, "f4")}, "head": {"w": np.full(2, 7, "f4")}}
    recipe = FedBuffRecipe(name="job", app=app, model=start, rounds=3, buffer=2, filters=Filters(site_out=[Exclude(["head*"])]))
    params = execute(recipe, tmp_path, sites=2).get_result().params
    assert params["body"]["w"].tolist() == [3.0, 3.0]
    assert params["head"]["w"].tolist() == [7.0, 7.0]


def test_a_condition_ends_it_early_and_the_best_is_kept(tmp_path: Path) -> None:
    run = execute(fedbuff(rounds=50, buffer=4, stop_when="loss >= 8"), tmp_path)
    assert len(run.metrics) < 50
    assert run.metrics[-1]["loss"] >= 8 > run.metrics[-2]["loss"]
    assert run.get_best().params["w"].tolist() == START.tolist()  # its loss is 0, the least


@pytest.mark.parametrize("kind", ["app", "script"])
def test_the_same_bits_for_any_number_of_workers(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The code draws from every kind of randomness, and its sites keep state."""
    code = (
        {"app": request.getfixturevalue("app")}
        if kind == "app"
        else {"app": None, "script": request.getfixturevalue("script"), "argv": ["1"]}
    )
    devices = Devices(seconds=1.0, spread=1.0, upload_bytes_per_s=24.0, bandwidth_spread=1.0, availability=0.7, period_s=9.0)
    recipe = FedBuffRecipe(name="job", model={"w": np.zeros(3, "f4")}, rounds=6, buffer=3, concurrency=4, best="min loss", seed=2, **code)
    one, two = (
        recipe.execute(SimEnv(num_clients=6, devices=devices, workers=workers, runs=tmp_path, console="quiet")) for workers in (1, 2)
    )
    assert arrivals(one) == arrivals(two)
    assert max(staleness for _, staleness, _ in arrivals(one)) > 0
    assert (one.folder / "model.safetensors").read_bytes() == (two.folder / "model.safetensors").read_bytes()


def test_with_a_slow_site_it_is_sooner_there_than_fedavg(tmp_path: Path) -> None:
    """Least squares at eight sites of one kind, one of which is 20 times slower: FedAvg waits for it in every round."""
    target = np.array([1.0, -2.0, 3.0])
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        rng = np.random.default_rng(site.rank)
        x = rng.normal(size=(40, 3))
        y = x @ target + 0.1 * rng.normal(size=40)
        w = model.params["w"]
        for _ in range(5):
            w = w - 0.02 * x.T @ (x @ w - y) / len(y)
        return FLModel({"w": w}, meta={"examples": len(y)})

    def distance(recipe: Recipe) -> tuple[float, float]:
        """Simulated seconds, and how far from the target: at the end of so many rounds."""
        seconds = {f"site-{n}": 20.0 if n == 8 else 1.0 for n in range(1, 9)}
        run = execute(recipe, tmp_path, sites=8, seconds=seconds)
        return times(run)[-1], float(np.linalg.norm(run.get_result().params["w"] - target))

    start = {"w": np.zeros(3)}
    buffered_s, buffered = distance(FedBuffRecipe(name="buffered", app=app, model=start, rounds=60, buffer=8))
    averaged_s, averaged = distance(FedAvgRecipe(name="averaged", app=app, model=start, rounds=5))
    assert buffered_s < averaged_s == 100.0
    assert buffered < 0.2 < 1.0 < averaged
    later_s, later = distance(FedAvgRecipe(name="averaged", app=app, model=start, rounds=60))
    assert later < 0.2
    assert later_s > 10 * buffered_s


# ------------------------------------------------------------------------------------------------------------------- sites that fail

FAILS = """
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    if site.config["who"] in ("all", site.name):
        raise ValueError("no data today")
    if site.config["who"] == "nan":
        return FLModel({"w": model.params["w"] * float("nan" if site.rank == 1 else 1)})
    return FLModel({"w": model.params["w"] + 1.0})
"""


@pytest.mark.parametrize("who", ["site-2", "nan"])
def test_one_that_fails_rests_until_the_next_commit(who: str, load: Callable[[str], Any], tmp_path: Path) -> None:
    run = execute(fedbuff(app=load(FAILS).app, rounds=3, buffer=4, config={"who": who}), tmp_path, sites=2)
    failures = [(event["site"], event["round"], event["virtual_s"]) for event in run.events("failure")]
    assert failures == [("site-2", 0, 1.0), ("site-2", 1, 5.0), ("site-2", 2, 9.0)]
    assert [(event["good"], event["asked"]) for event in run.events("round")] == [(4, 5)] * 3
    assert times(run) == [4.0, 8.0, 12.0]


def test_when_all_have_failed_the_job_fails_with_the_reasons(load: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=r"round 1: every site has failed(?s:.*)site-2: ValueError.*no data today"):
        execute(fedbuff(app=load(FAILS).app, rounds=3, config={"who": "all"}), tmp_path, sites=2)


def test_one_that_is_too_slow_is_given_up_and_asked_again_after_the_commit(tmp_path: Path) -> None:
    run = execute(fedbuff(rounds=2, buffer=5, within_s=2.5), tmp_path, sites=4, seconds=SECONDS)
    late = [(event["site"], event["code"], event["virtual_s"]) for event in run.events("failure")]
    assert late[:2] == [("site-3", "DeadlineExceeded", 2.5), ("site-4", "DeadlineExceeded", 2.5)]
    assert {site for site, _, _ in arrivals(run)} == {"site-1", "site-2"}


def test_without_a_clock_a_site_that_hangs_is_given_up(load: Callable[[str], Any], tmp_path: Path, nothing_left: None) -> None:
    os.mkfifo(tmp_path / "never")
    code = f"from hanse import App\napp = App()\n@app.train\ndef train(model, site):\n    open({str(tmp_path / 'never')!r}).read()\n"
    recipe = fedbuff(app=load(code).app, rounds=2, within_s=0.1)
    with pytest.raises(JobFailed, match=r"every site has failed(?s:.*)site-2: DeadlineExceeded: no update within 0.1 s"):
        recipe.execute(SimEnv(num_clients=2, runs=tmp_path, console="quiet"))


def test_without_a_clock_it_runs_in_the_order_of_arrival(tmp_path: Path) -> None:
    run = fedbuff(rounds=40, buffer=4, staleness="constant").execute(SimEnv(num_clients=4, runs=tmp_path, console="quiet"))
    assert len(run.metrics) == 40
    assert "virtual_s" not in run.events("update")[0]
    low, high = step_at(0, np.zeros(2)) * 4, step_at(3, np.zeros(2)) * 4  # every site pulls to a point between these
    w = run.get_result().params["w"]
    assert low[0] * 0.9 < w[0] < high[0] * 1.1
    assert high[1] * 1.1 < w[1] < low[1] * 0.9
