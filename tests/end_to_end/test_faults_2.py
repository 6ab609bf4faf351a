"""The other seeded schedules of faults (see test_faults_1.py), and faults that take a job of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.end_to_end.faults import SITES, Ground, load_app, seeds, survive
from tests.end_to_end.federation import SERVER, Federation, can_mount, federation, full, until

from hanse.environments.local import admin_kit
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.server.run import Run
from hanse.site.held_job import TRIES

ABSENCE_S = 0.5
CODE = """
import os
import signal
from pathlib import Path
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    if site.name == site.config.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    gate = Path(site.config["gates"], f"{site.name}-{model.current_round}")
    if gate.exists():
        gate.read_text()  # a pipe: ends when somebody has opened and closed its other end
    rounds = site.state["rounds"] = site.state.get("rounds", 0) + 1
    return FLModel({"w": model.params["w"] + site.rank + 1}, metrics={"rounds": rounds}, meta={"examples": 1})
"""


@pytest.mark.parametrize("seed", seeds(17, 30))
async def test_the_result_has_the_same_bits(seed: int, ground: Ground, tmp_path: Path) -> None:
    await survive(seed, ground, tmp_path)


def job_of(folder: Path, *gates: str, rounds: int, min_updates: int | None = None, **config: str) -> Path:
    """A job folder. gates: where its training waits, such as site-1-0 for the first round."""
    (folder / "gates").mkdir()
    for gate in gates:
        os.mkfifo(folder / "gates" / gate)
    config["gates"] = str(folder / "gates")
    app, model = load_app(CODE, folder / "code"), {"w": np.zeros(3, np.float32)}
    recipe = FedAvgRecipe(name="special", app=app, model=model, rounds=rounds, min_updates=min_updates, best="min rounds", config=config)
    recipe.export(folder / "job")
    return folder / "job"


async def open_gate(folder: Path, gate: str) -> None:
    """Let the training code go on that waits there, or will."""
    path = folder / "gates" / gate

    def opened() -> bool:
        with contextlib.suppress(OSError):  # nobody waits yet
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return True
        return False

    await until(opened, f"training that waits at {gate}")
    path.unlink()


async def submit_and_follow(running: Federation, job: Path) -> tuple[int, str]:
    """`hanse job submit --follow`: its exit status, and what it said."""
    command = [sys.executable, "-P", "-m", "hanse.cli.main", "job", "submit", job, "--kit", admin_kit(running.folder)]
    process = await asyncio.create_subprocess_exec(
        *map(str, command), "--sites", ",".join(running.sites), "--follow",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=os.environ | {"NO_COLOR": "1", "COLUMNS": "300"},
    )  # fmt: skip
    said, _ = await process.communicate()
    running.job = "special-0001"
    return process.returncode or 0, said.decode()


def weights(run: Run) -> list[float]:
    return [float(value) for value in run.get_result().params["w"]]


def sites_of(run: Run, kind: str, round: int) -> list[str]:
    return sorted(event["site"] for event in run.events(kind) if event["round"] == round)


async def test_a_training_process_that_always_dies_fails_the_job(ground: Ground, tmp_path: Path) -> None:
    job = job_of(tmp_path, rounds=2, dies="site-2")
    async with federation(ground.template, tmp_path / "federation", SITES) as running:
        status, said = await submit_and_follow(running, job)
        assert status == 1, said
        reason = f"site-2: TrainerDied: the training process was killed by SIGKILL, {TRIES} times, while it did this task."
        assert "2 good updates of 3 asked, 3 needed" in said
        assert reason in said
        assert running.tasks("site-2", "training") == [(0, 0)] * TRIES
        assert running.tasks("site-1", "training") == running.tasks("site-3", "training") == [(0, 0)]
    assert running.processes() == []


async def test_the_round_goes_on_without_it_where_enough_are_left(ground: Ground, tmp_path: Path) -> None:
    job = job_of(tmp_path, rounds=2, min_updates=2, dies="site-2")
    async with federation(ground.template, tmp_path / "federation", SITES) as running:
        status, said = await submit_and_follow(running, job)
        assert status == 0, said
        run = await running.result(tmp_path / "runs")
        assert weights(run) == [4.0] * 3  # each round adds the mean of 1 and 3
        assert [sites_of(run, "failure", round) for round in range(2)] == [["site-2"]] * 2
        assert running.tasks("site-2", "training") == [(0, 0)] * TRIES + [(1, 0)] * TRIES


async def test_a_site_that_stays_away_is_left_out_until_it_comes_back(ground: Ground, tmp_path: Path) -> None:
    job = job_of(tmp_path, "site-3-0", "site-1-1", rounds=3, min_updates=2)
    async with federation(ground.template, tmp_path / "federation", SITES, absence_s=ABSENCE_S) as running:
        await running.submit(job)
        await until(lambda: running.tasks("site-3", "training"), "the site's training")
        async with running.killed("site-3"):
            await until(lambda: running.rounds_done() == 1, "a round without the site")
        await until(lambda: running.log("site-3").count("is connected") == 2, "the site's return")
        await open_gate(tmp_path, "site-1-1")
        assert (await running.end_of_job())["status"] == "completed"
        run = await running.result(tmp_path / "runs")
    assert sites_of(run, "update", 0) == ["site-1", "site-2"]
    assert [(event["site"], event["code"]) for event in run.events("failure") if event["round"] == 0] == [("site-3", "SiteAway")]
    assert sites_of(run, "update", 2) == list(SITES)
    assert running.processes() == []


async def test_an_update_that_comes_twice_counts_once(ground: Ground, tmp_path: Path) -> None:
    """The job's process dies when it has an update that the server has not stored yet: the new one asks the site once more."""
    job = job_of(tmp_path, "site-1-0", "site-2-0", rounds=1)
    async with federation(ground.template, tmp_path / "federation", SITES) as running:
        await running.submit(job)
        async with running.admin() as (client, _):
            events: Any = client.follow("logs", job=running.job, follow=True)
            await until(lambda: "site-3" in {site for site, _ in running.kept()}, "the update of site-3")
            with contextlib.closing(sqlite3.connect(running.database, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")  # the server waits now when it stores something
                await open_gate(tmp_path, "site-1-0")
                async for event in events:
                    if event["event"] == "update" and event["site"] == "site-1":
                        break
                process = running.job_process()
                assert process is not None
                os.kill(process, signal.SIGKILL)
                await until(lambda: running.ledger("site-1", "sent again"), "a second delivery")
            await open_gate(tmp_path, "site-2-0")
            assert (await running.end_of_job())["status"] == "completed"
        run = await running.result(tmp_path / "runs")
    assert weights(run) == [2.0] * 3
    assert sites_of(run, "update", 0) == list(SITES)
    assert all(running.tasks(site, "training") == [(0, 0)] for site in SITES)


async def test_a_job_waits_for_room_on_the_servers_disk(ground: Ground, tmp_path: Path) -> None:
    if not can_mount(tmp_path / "probe"):
        pytest.skip("no file system can be mounted here, so none can be filled")
    job = job_of(tmp_path, "site-1-0", rounds=2)
    async with federation(ground.template, tmp_path / "federation", SITES, disks=[SERVER]) as running:
        await running.submit(job)
        await until(lambda: running.tasks("site-1", "training"), "the site's training")
        async with full(running.state(SERVER)):
            await open_gate(tmp_path, "site-1-0")
            await until(lambda: f"job {running.job} waits" in running.log(SERVER), "that the job waits")
            assert running.rounds_done() == 0
        assert (await running.end_of_job())["status"] == "completed"
        run = await running.result(tmp_path / "runs")
        assert "since the last commit" not in running.log(SERVER)  # a full disk is no death
    assert weights(run) == [4.0] * 3
    assert [sites_of(run, "update", round) for round in range(2)] == [list(SITES)] * 2


async def test_an_update_that_comes_before_the_new_process_asks_counts_once(ground: Ground, tmp_path: Path) -> None:
    """The job's process dies, and the one after it is held up before it can ask: what comes meanwhile was asked for by the dead one."""
    job = job_of(tmp_path, "site-1-0", rounds=1)
    async with federation(ground.template, tmp_path / "federation", SITES) as running:
        await running.submit(job)
        await until(lambda: len(running.kept()) == 2, "the updates of the others")
        first = running.job_process()
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: running.job_process() not in (None, first), "the process after it")
        successor = running.job_process()
        assert successor is not None
        os.kill(successor, signal.SIGSTOP)
        await open_gate(tmp_path, "site-1-0")
        await until(lambda: ("site-1", (0, 0)) in running.kept(), "the last update")
        os.kill(successor, signal.SIGCONT)
        assert (await running.end_of_job())["status"] == "completed"
        run = await running.result(tmp_path / "runs")
    assert weights(run) == [2.0] * 3
    assert sites_of(run, "update", 0) == list(SITES)
