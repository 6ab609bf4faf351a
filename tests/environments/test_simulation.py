"""Whole runs, and what becomes of them when their processes are killed or stopped: those are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site
from hanse.environments import SimEnv, resume
from hanse.errors import ConfigError, JobFailed
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.messages.flmodel import FLModel
from hanse.server.run import Run

MODEL = {"w": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "either num_clients, a number of sites, or sites, their names"),
        ({"num_clients": 2, "sites": ["a"]}, "either num_clients"),
        *(({"num_clients": value}, f"num_clients={value!r}: it must be a whole number from 1") for value in (0, -1, 1.5, True, "3")),
        *(({"sites": value}, "give a list of different names") for value in (["a", "a"], ["a/b"], [""], "ab", [1, 2], ["a\n"])),
        *(({"num_clients": 2, name: value}, f"{name}={value!r}: it must be a whole number from 1")
          for name in ("workers", "threads") for value in (0, 1.5, "2")),
        ({"num_clients": 2, "console": "loud"}, "console='loud': it must be one of auto, plain, rich, json, quiet"),
        ({"num_clients": 2, "site_config": {"site-3": {}}}, "names a site that is not there: 'site-3' is none of site-1 to site-2"),
        ({"sites": ["a"], "site_config": {"b": {}}}, "'b' is none of a"),
        ({"num_clients": 2, "site_config": [1]}, "it must map sites to their JSON values"),
        ({"num_clients": 2, "site_config": {"site-1": 3}}, "site_config of 'site-1' is 3"),
        ({"num_clients": 2, "site_config": {"site-1": {"x": {3}}}}, "site_config of 'site-1' must hold JSON values only"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_arguments(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SimEnv(**wrong)


def test_names_and_configs_reach_the_sites(tmp_path: Path) -> None:
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel(metrics={"rank": site.rank, **site.config})

    recipe = FedAvgRecipe(name="a", app=app, rounds=1, model=MODEL, config={"x": 1, "y": 1})
    env = SimEnv(sites=["zoe", "ada"], site_config={"zoe": {"y": 2}}, workers=9, runs=tmp_path, console="quiet")
    with pytest.raises(JobFailed, match="no update brought params"):
        recipe.execute(env)
    run = Run(tmp_path / "a-001")
    assert {event["site"]: event["metrics"] for event in run.events("update")} == {
        "ada": {"rank": 0, "x": 1, "y": 1}, "zoe": {"rank": 1, "x": 1, "y": 2},
    }  # fmt: skip
    assert (run.facts["sites"], run.facts["workers"]) == (["ada", "zoe"], 2)
    assert run.facts["environment"] == {
        "num_clients": None, "sites": ["zoe", "ada"], "site_config": {"zoe": {"y": 2}}, "threads": 1,
    }  # fmt: skip


async def test_in_a_notebook(app: App, tmp_path: Path, nothing_left: None) -> None:
    """There a loop is running while the cell runs."""
    run = FedAvgRecipe(name="a", app=app, model=MODEL, rounds=2).execute(SimEnv(num_clients=3, runs=tmp_path, console="quiet"))
    assert (run.get_status(), len(run.metrics)) == ("completed", 2)


def test_the_run_folder_has_all_there_is_to_know(app: App, tmp_path: Path) -> None:
    run = FedAvgRecipe(name="a", app=app, model=MODEL, rounds=2, best="min loss").execute(
        SimEnv(num_clients=3, runs=tmp_path, console="quiet")
    )
    assert {path.name for path in run.folder.iterdir()} == {
        "job", "run.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "report.html",
    }  # fmt: skip
    facts = run.facts
    assert (facts["status"], facts["rounds"], facts["model"]) == ("completed", {"done": 2, "total": 2}, "model.safetensors")
    assert facts["metrics"] == run.metrics[-1]
    assert facts["started"] <= facts["ended"]
    assert facts["job"]["digest"].startswith("blake3:")
    kinds = Counter(event["event"] for event in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines()))
    assert kinds == {"start": 1, "update": 6, "round": 2, "end": 1}


# -------------------------------------------------------------------------------------------------------------- jobs in their own process

JOB = """
import os
import numpy as np
from hanse import App, FedOptRecipe, FLModel, SimEnv

app = App()

@app.train
def train(model, site):
    if os.environ.get("STUCK") == str(model.current_round) and site.rank == 3:
        os.write(int(os.environ["TELL"]), b"!")
        open("never").read()  # a pipe that nobody writes to
    if model.current_round == 2 and os.path.exists("broken"):
        raise ValueError("no data today")
    n = site.state["n"] = site.state.get("n", 0) + 1
    w = model.params["w"] + n * site.rng.normal(size=3)
    return FLModel({"w": w}, metrics={"loss": float(w[0]), "n": n}, meta={"examples": 10 + site.rank})

if __name__ == "__main__":
    recipe = FedOptRecipe(name="job", app=app, model={"w": np.zeros(3)}, rounds=4, best="min loss")
    recipe.execute(SimEnv(num_clients=5, workers=2, runs="runs", console="plain"))
"""
HANSE = [sys.executable, "-m", "hanse.cli.main"]


class Program:
    """A process of its own, in a session of its own, whose output is read line by line."""

    def __init__(self, *command: str, cwd: Path, stuck: int | None = None) -> None:
        self.told, tell = os.pipe()
        environment = os.environ | {"STUCK": str(stuck), "TELL": str(tell)}
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=[tell],
        )
        os.close(tell)

    def until(self, text: str) -> Program:
        assert self.process.stdout is not None
        assert any(text in line for line in self.process.stdout), f"it never printed {text!r}"
        return self

    def until_stuck(self) -> Program:
        """Until a site has begun the round that it will never end."""
        assert os.read(self.told, 1) == b"!"
        return self

    def send(self, number: int) -> Program:
        self.process.send_signal(number)
        return self

    def interrupt(self) -> Program:
        """Ctrl-C in a terminal, which every process of the job hears."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self

    def end(self) -> tuple[int, str, str]:
        """Its status and the rest of its output, which has no end while one of its processes lives."""
        out, err = self.process.communicate(timeout=30)
        os.close(self.told)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program, in which it ran to its end once, as runs/job-001."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "job.py").write_text(JOB)
    os.mkfifo(folder / "never")
    assert Program(sys.executable, "job.py", cwd=folder).end()[0] == 0
    return folder


Start = Callable[..., Program]


@pytest.fixture
def start(workshop: Path) -> Iterator[Start]:
    """Starts the program; whatever comes of it, none of its processes is left after the test."""
    started = []

    def start(*command: str, stuck: int | None = None) -> Program:
        started.append(Program(*(command or (sys.executable, "job.py")), cwd=workshop, stuck=stuck))
        return started[-1]

    yield start
    for program in started:
        if program.process.poll() is None:
            os.killpg(program.process.pid, signal.SIGKILL)
            program.end()


def last_run(workshop: Path) -> Path:
    return max((workshop / "runs").iterdir())


def outcome(folder: Path) -> tuple[bytes, bytes, Any, Counter[Any]]:
    """All that must be the same, however often the job was broken off."""
    run = Run(folder)
    assert run.get_status() == "completed"
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counts = Counter((event["event"], event.get("round"), event.get("site")) for event in events if event["event"] in ("update", "round"))
    files = [(folder / name).read_bytes() for name in ("model.safetensors", "best.safetensors")]
    facts = {name: run.facts[name] for name in ("rounds", "metrics", "best", "reason", "seed", "sites")}
    return files[0], files[1], facts, counts


def test_a_main_process_that_is_killed_resumes_from_its_last_commit(start: Start, workshop: Path) -> None:
    status, _, _ = start(stuck=2).until_stuck().send(signal.SIGKILL).end()
    assert status == -signal.SIGKILL
    folder = last_run(workshop)
    assert Run(folder).get_status() == "running"
    assert len(Run(folder).metrics) == 2
    run = resume(folder, workers=3, console="quiet")
    assert run.events("start")[-1]["resumed"] == 2
    assert outcome(folder) == outcome(workshop / "runs" / "job-001")


@pytest.mark.parametrize("stuck", [True, False], ids=["in a round", "at a commit"])
def test_it_may_be_killed_again_and_again(start: Start, workshop: Path, stuck: bool) -> None:
    """A round's line is printed just before it is committed."""
    start(stuck=0).until_stuck().send(signal.SIGKILL).end()
    folder = last_run(workshop)
    for number in (1, 2, 3):
        program = start(*HANSE, "resume", str(folder), stuck=number if stuck else None)
        (program.until_stuck() if stuck else program.until("round")).send(signal.SIGKILL).end()
    resume(folder, console="quiet")
    assert outcome(folder) == outcome(workshop / "runs" / "job-001")


@pytest.mark.parametrize("stop", [Program.interrupt, lambda program: program.send(signal.SIGTERM)], ids=["Ctrl-C", "SIGTERM"])
def test_it_stops_at_once_and_says_how_to_go_on(start: Start, workshop: Path, stop: Callable[[Program], Program]) -> None:
    status, out, err = stop(start(stuck=2).until_stuck()).end()
    folder = last_run(workshop)
    assert status == 1
    assert f"JobStopped: job 'job' was stopped after 2 of 4 rounds. Go on with: hanse resume {Path('runs') / folder.name}" in err
    assert "stopped in" in out
    assert f"go on   hanse resume {Path('runs') / folder.name}" in out
    facts = Run(folder).facts
    assert (facts["status"], facts["reason"], facts["rounds"]) == ("stopped", "stopped after 2 of 4 rounds", {"done": 2, "total": 4})
    assert Run(folder).get_result().current_round == 1
    resume(folder, console="quiet")
    assert outcome(folder) == outcome(workshop / "runs" / "job-001")


def test_a_failed_job_keeps_what_it_reached(start: Start, workshop: Path) -> None:
    (workshop / "broken").touch()
    status, out, err = start().end()
    (workshop / "broken").unlink()
    folder = last_run(workshop)
    assert status == 1
    assert "JobFailed: job 'job' failed: round 3, task 'train': 0 good updates of 5 asked, 5 needed." in err
    end = out[out.index("failed in") :]
    for line in (
        ": no data today",
        f"model   runs/{folder.name}/model.safetensors",
        "go on   hanse resume runs/",
    ):
        assert line in end
    assert Run(folder).get_status() == "failed"
    assert Run(folder).get_result().current_round == 1
    assert len(Run(folder).events("failure")) == 5
    resume(folder, console="quiet")
    assert outcome(folder) == outcome(workshop / "runs" / "job-001")


# ----------------------------------------------------------------------------------------------------------------------------- resuming


def failing(tmp_path: Path, app: App, **recipe: Any) -> tuple[FedAvgRecipe, Path]:
    """A recipe whose run failed after its first round, for want of a file."""

    def train(model: FLModel, site: Site) -> FLModel:
        if model.current_round == 1 and not (tmp_path / "data").exists():
            raise ValueError("no data")
        return app.run("train", model, site)

    own = App()
    own.train(train)
    made = FedAvgRecipe(**{"name": "a", "app": own, "model": MODEL, "rounds": 3, **recipe})
    with pytest.raises(JobFailed) as failed:
        made.execute(SimEnv(num_clients=3, runs=tmp_path, console="quiet"))
    (tmp_path / "data").touch()
    return made, Path(failed.value.folder)


def test_a_job_that_is_in_no_file_goes_on_from_its_program(app: App, tmp_path: Path) -> None:
    recipe, folder = failing(tmp_path, app)
    with pytest.raises(ConfigError, match=r"holds no job folder: resume it from the program that made it, with SimEnv\(resume="):
        resume(folder)
    run = recipe.execute(SimEnv(num_clients=3, resume=folder, console="quiet"))
    whole = FedAvgRecipe(name="a", app=app, model=MODEL, rounds=3).execute(SimEnv(num_clients=3, runs=tmp_path, console="quiet"))
    assert run.folder == folder
    assert (folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def test_another_job_does_not_go_on_from_there(app: App, tmp_path: Path) -> None:
    recipe, folder = failing(tmp_path, app)
    before = (folder / "run.json").read_bytes()
    for other, sites in [(recipe, 4), (replace(recipe, seed=1), 3), (replace(recipe, name="b"), 3)]:
        with pytest.raises(ConfigError, match="is a run of another job"):
            other.execute(SimEnv(num_clients=sites, resume=folder, console="quiet"))
    assert (folder / "run.json").read_bytes() == before


def test_there_is_nothing_to_go_on_with(app: App, tmp_path: Path) -> None:
    run = FedAvgRecipe(name="a", app=app, model=MODEL, rounds=1).execute(SimEnv(num_clients=2, runs=tmp_path, console="quiet"))
    with pytest.raises(ConfigError, match="is complete: there is nothing to go on with"):
        resume(run.folder)
    with pytest.raises(ConfigError, match="is no run folder"):
        resume(tmp_path / "nowhere")
