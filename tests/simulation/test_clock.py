"""Simulated time: the arithmetic by hand, and rounds whose deadlines are judged by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.app import App, Site
from hanse.environments import SimEnv, resume
from hanse.errors import ConfigError, Failure, JobFailed
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.messages.flmodel import FLModel
from hanse.messages.task import EVALUATE, TRAIN, Task, TaskId
from hanse.messages.update import Update
from hanse.server.run import Run
from hanse.simulation.clock import Devices, VirtualClock, _after
from hanse.simulation.roster import NumberedSites


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"per": "epoch"}, "per='epoch': it must be one of task, examples, steps"),
        ({"seconds": -1}, "seconds=-1: it must be at least 0"),
        ({"seconds": {"a": float("nan")}}, "it must be at least 0"),
        ({"seconds": True}, "it must be at least 0"),
        ({"upload_bytes_per_s": 0}, "upload_bytes_per_s=0: it must be above 0"),
        ({"availability": 1.5}, "availability=1.5: it must be above 0 and at most 1"),
        ({"period_s": 0}, "period_s=0: it must be above 0"),
        ({"spread": "big"}, "spread='big': it must be at least 0"),
        ({"seed": -1}, "seed=-1: it must be a whole number from 0"),
    ],
)
def test_wrong_devices(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Devices(**wrong)


def test_devices_that_do_not_fit_the_sites() -> None:
    with pytest.raises(ConfigError, match=r"names a site that is not there, in seconds: 'site-3'"):
        SimEnv(num_clients=2, devices=Devices(seconds={"site-1": 1, "site-2": 1, "site-3": 1}))
    with pytest.raises(ConfigError, match="has no availability for site 'site-2'"):
        SimEnv(num_clients=2, devices=Devices(availability={"site-1": 0.5}))
    with pytest.raises(ConfigError, match="devices=3: it must be"):
        SimEnv(num_clients=2, devices=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no setting 'speed'"):
        Devices.of({"speed": 1})


# ------------------------------------------------------------------------------------------------------------------ when an answer is here

TASK = Task(TRAIN, FLModel())


def update(site: str = "a", **fields: Any) -> Update:
    return Update(site, TaskId("job", 0, 0, site), **fields)


def test_download_work_and_upload_by_hand() -> None:
    clock = VirtualClock(Devices(seconds={"a": 3.0}, download_bytes_per_s=10.0, upload_bytes_per_s={"a": 4.0}))
    answer = update(model=FLModel({"w": np.zeros(2)}))  # 16 bytes
    assert clock.earliest_s("a", TASK, task_bytes=40, began_s=100.0) == 100 + 4 + 3
    assert clock.arrival_s(answer, TASK, task_bytes=40, began_s=100.0) == 100 + 4 + 3 + 4
    assert clock.arrival_s(update(size_bytes=8), TASK, task_bytes=40, began_s=0.0) == 4 + 3 + 2
    assert clock.arrival_s(answer, Task(EVALUATE, FLModel()), task_bytes=40, began_s=0.0) == 4 + 4
    assert clock.arrival_s(update(failure=Failure("ValueError", "")), TASK, task_bytes=40, began_s=0.0) == 4 + 3


def test_work_by_examples() -> None:
    clock = VirtualClock(Devices(seconds=0.5, per="examples"))
    assert clock.earliest_s("a", TASK, task_bytes=8, began_s=1.0) == 1.0
    assert clock.arrival_s(update(model=FLModel(meta={"examples": 6})), TASK, task_bytes=8, began_s=1.0) == 4.0
    assert clock.arrival_s(update(failure=Failure("ValueError", "")), TASK, task_bytes=8, began_s=1.0) == 1.0


def test_spread_is_lognormal_around_the_median_and_each_sites_own() -> None:
    clock = VirtualClock(Devices(seconds=2.0, spread=0.5, seed=3))
    sites = NumberedSites(2_000)
    seconds = [clock.earliest_s(site, TASK, task_bytes=0, began_s=0.0) for site in sites]
    logs = np.log(np.array(seconds) / 2.0)
    assert abs(np.mean(logs)) < 0.05
    assert np.std(logs) == pytest.approx(0.5, rel=0.05)
    again = VirtualClock(Devices(seconds=2.0, spread=0.5, seed=3))
    assert again.earliest_s(sites[7], TASK, task_bytes=0, began_s=0.0) == seconds[7]
    assert VirtualClock(Devices(seconds=2.0, spread=0.5, seed=4)).earliest_s(sites[7], TASK, task_bytes=0, began_s=0.0) != seconds[7]


@pytest.mark.parametrize(
    ("began_s", "busy_s", "done_s"),
    [  # there from 2 to 5, 12 to 15, …
        (2.0, 3.0, 5.0),
        (2.0, 1.0, 3.0),
        (4.0, 2.0, 13.0),
        (5.0, 0.0, 12.0),
        (0.0, 1.0, 3.0),
        (7.0, 7.0, 23 + 10.0),  # 3 from 12 on, 3 from 22 on, 1 from 32 on
    ],
)
def test_availability_by_hand(began_s: float, busy_s: float, done_s: float) -> None:
    assert _after(began_s, busy_s, share=0.3, period_s=10.0, phase=0.2) == pytest.approx(done_s)


@given(began=st.integers(0, 60), busy=st.integers(1, 40), there=st.integers(1, 8), phase=st.integers(0, 7))
def test_availability_as_second_after_second(began: int, busy: int, there: int, phase: int) -> None:
    now, left = began, busy
    while left:
        left -= (now - phase) % 8 < there
        now += 1
    assert _after(float(began), float(busy), share=there / 8, period_s=8.0, phase=phase / 8) == now


# --------------------------------------------------------------------------------------------------------------------------- whole rounds

SECONDS = {"site-1": 1.0, "site-2": 2.0, "site-3": 3.0, "site-4": 10.0}
MODEL = {"w": np.zeros(3, np.float32)}


def run(app: App, folder: Path, devices: Devices, *, workers: int = 2, **recipe: Any) -> Run:
    described = FedAvgRecipe(name="job", app=app, model=MODEL, **{"rounds": 3, "best": "min loss", **recipe})
    return described.execute(SimEnv(num_clients=4, workers=workers, devices=devices, runs=folder, console="quiet"))


def heard(run: Run) -> list[set[str]]:
    """The sites whose updates counted, by round."""
    return [{event["site"] for event in run.events("update") if event["round"] == number} for number in range(len(run.metrics))]


def times(run: Run) -> list[float]:
    return [event["virtual_s"] for event in run.events("round")]


def test_a_round_takes_as_long_as_its_slowest_site(app: App, tmp_path: Path) -> None:
    found = run(app, tmp_path, Devices(seconds=SECONDS))
    assert times(found) == [10.0, 20.0, 30.0]
    plain = FedAvgRecipe(name="plain", app=app, model=MODEL, rounds=3).execute(SimEnv(num_clients=4, runs=tmp_path, console="quiet"))
    assert found.get_result().params["w"].tobytes() == plain.get_result().params["w"].tobytes()
    assert "virtual_s" not in plain.events("round")[0]


def test_sizes_are_known_where_updates_are_folded_in_groups(tmp_path: Path) -> None:
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel({"w": model.params["w"] + 1}, meta={"examples": 1})

    recipe = FedAvgRecipe(name="job", app=app, model=MODEL, rounds=2)
    devices = Devices(seconds=1.0, download_bytes_per_s=6.0, upload_bytes_per_s=3.0)
    found = recipe.execute(SimEnv(num_clients=100, devices=devices, runs=tmp_path, console="quiet"))
    assert times(found) == [7.0, 14.0]  # 12 bytes: 2 s down, 4 s up


@pytest.mark.parametrize(
    ("deadline", "sites", "ends_s"),
    [
        ({"within_s": 2.5}, {"site-1", "site-2"}, 2.5),
        ({"within_s": 2.0}, {"site-1", "site-2"}, 2.0),
        ({"within_s": 10.0}, set(SECONDS), 10.0),
        ({"within_s": 11.0}, set(SECONDS), 10.0),
        ({"grace_s": 1.0}, {"site-1", "site-2", "site-3"}, 3.0),  # the second is there at 2
        ({"grace_s": 0.5}, {"site-1", "site-2"}, 2.5),
        ({"grace_s": 5.0, "within_s": 2.75}, {"site-1", "site-2"}, 2.75),
        ({"grace_s": 8.0}, set(SECONDS), 10.0),
    ],
)
def test_a_deadline_drops_exactly_those_that_are_too_late(
    deadline: dict[str, float], sites: set[str], ends_s: float, app: App, tmp_path: Path
) -> None:
    found = run(app, tmp_path, Devices(seconds=SECONDS), min_updates=2, **deadline)  # type: ignore[arg-type]
    assert heard(found) == [sites] * 3
    assert times(found) == [ends_s, 2 * ends_s, 3 * ends_s]
    late = {event["site"]: event["code"] for event in found.events("failure")}
    assert late == dict.fromkeys(SECONDS.keys() - sites, "DeadlineExceeded")


def test_an_upload_can_be_too_late(app: App, tmp_path: Path) -> None:
    """This is known only once the update is there."""
    speeds = {"site-1": 12.0, "site-2": 12.0, "site-3": 12.0, "site-4": 1.0}  # bytes a second, for 12 bytes
    found = run(app, tmp_path, Devices(seconds=1.0, upload_bytes_per_s=speeds), within_s=5.0, min_updates=3, evaluate=False)
    assert heard(found) == [{"site-1", "site-2", "site-3"}] * 3


def test_too_few_in_time_fail_the_job(app: App, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=r"2 good updates of 4 asked, 3 needed(?s:.*)site-3: DeadlineExceeded: no update within 2.5 s"):
        run(app, tmp_path, Devices(seconds=SECONDS), within_s=2.5, min_updates=3)


@pytest.mark.parametrize("deadline", [{"within_s": 6.0}, {"grace_s": 1.5}])
def test_the_same_bits_for_any_number_of_workers(deadline: dict[str, float], app: App, tmp_path: Path) -> None:
    """The app draws from every kind of randomness, and its sites keep state."""
    devices = Devices(seconds=2.0, spread=1.0, availability=0.5, period_s=5.0, upload_bytes_per_s=10.0, bandwidth_spread=0.5)
    one, two = (run(app, tmp_path / str(n), devices, workers=n, rounds=5, min_updates=1, **deadline) for n in (1, 2))
    assert (one.folder / "model.safetensors").read_bytes() == (two.folder / "model.safetensors").read_bytes()
    assert heard(one) == heard(two)
    assert times(one) == times(two)
    assert any(len(sites) < 4 for sites in heard(one))


BREAKS = """
from pathlib import Path
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    if model.current_round == 2 and not Path(site.config["mended"]).exists():
        raise ValueError("no data today")
    return FLModel({"w": (model.params["w"] + site.rng.normal(size=3)).astype("f4")}, meta={"examples": 1})
"""


def test_a_resumed_run_goes_on_in_time_and_bits(load: Callable[[str], Any], tmp_path: Path) -> None:
    devices, mended = Devices(seconds=SECONDS), tmp_path / "mended"
    settings: dict[str, Any] = {"within_s": 2.5, "min_updates": 2, "config": {"mended": str(mended)}}
    app = load(BREAKS).app
    with pytest.raises(JobFailed, match="no data today"):
        run(app, tmp_path / "part", devices, **settings)
    mended.touch()
    part = resume(tmp_path / "part" / "job-001", console="quiet")
    whole = run(app, tmp_path / "whole", devices, **settings)
    assert times(part) == times(whole) == [2.5, 5.0, 7.5]
    assert part.get_result().params["w"].tobytes() == whole.get_result().params["w"].tobytes()


def test_work_that_nobody_counted(tmp_path: Path) -> None:
    app = App()
    app.train(lambda model, site: FLModel(model.params, meta={"examples": 3}))
    says = r"site 'site-\d' told no 'steps', and Devices has per='steps'\. Send FLModel\(\.\.\., meta=\{\"steps\": n\}\), or count tasks"
    with pytest.raises(JobFailed, match=says):
        run(app, tmp_path, Devices(per="steps"))
