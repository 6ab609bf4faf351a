"""Jobs in federations of real processes on this machine, and what is left when they end, one way or another."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hanse.app import App
from hanse.environments import PocEnv, SimEnv
from hanse.errors import ConfigError, JobFailed, Refused
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.recipe import Recipe
from hanse.server.run import Run

MODEL = {"w": np.zeros(3, np.float32)}
Check = Callable[[Run, Run], None]


def both(recipe: Recipe, folder: Path, **sites: Any) -> tuple[Run, Run]:
    """The job simulated, and in processes of its own."""
    simulated = recipe.execute(SimEnv(runs=folder / "sim", console="quiet", **sites))
    return simulated, recipe.execute(PocEnv(runs=folder / "poc", console="quiet", **sites))


def test_pytorch_digits_have_the_same_bits(digits: Any, tmp_path: Path, clean: None, check_same: Check) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    recipe = FedAvgRecipe(name="digits", app=digits.app, model=digits.net(), rounds=3, best="max accuracy")
    simulated, real = both(recipe, tmp_path, num_clients=2)
    check_same(simulated, real)
    assert real.metrics[-1]["accuracy"] > 0.6
    names = {path.name for path in real.folder.iterdir()}
    assert names >= {"job", "run.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "report.html"}
    assert (real.folder / "best.safetensors").read_bytes() == (simulated.folder / "best.safetensors").read_bytes()
    facts = real.facts
    assert (facts["status"], facts["rounds"], facts["sites"]) == ("completed", {"done": 3, "total": 3}, ["site-1", "site-2"])
    assert facts["environment"] == {"num_clients": 2, "sites": [], "site_config": {}}
    assert (facts["best"], facts["digests"]) == (simulated.facts["best"], simulated.facts["digests"])


async def test_a_script_in_a_notebook(script: Path, tmp_path: Path, clean: None, check_same: Check) -> None:
    """There a loop is running while the cell runs."""
    recipe = FedAvgRecipe(name="script", script=script, argv=["2"], model=MODEL, rounds=2)
    check_same(*both(recipe, tmp_path, sites=["north", "south", "east"]))


CODE = """
import os
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    print(f"{site.name} is {site.rank} of {site.count} and has {site.config}")
    if site.config.get("breaks") == model.current_round and site.rank == 1:
        raise ValueError("no data today")
    if site.config.get("stops") == model.current_round and site.rank == 1:
        os.write(os.open(site.config["tell"], os.O_WRONLY), f"{os.getpid()}\\n".encode())
        open(site.config["never"]).read()  # a pipe that nobody writes to
    return FLModel({"w": model.params["w"] + 1})
"""


def test_configs_reach_the_sites_and_prints_come_back(load: Callable[[str], Any], tmp_path: Path, clean: None) -> None:
    recipe = FedAvgRecipe(name="a", app=load(CODE).app, model=MODEL, rounds=1, config={"x": 1, "y": 1})
    env = PocEnv(sites=["zoe", "ada"], site_config={"zoe": {"y": 2}}, runs=tmp_path, console="quiet")
    run = recipe.execute(env)
    assert (run.folder / "logs" / "ada.log").read_text() == "ada is 0 of 2 and has {'x': 1, 'y': 1}\n"
    assert (run.folder / "logs" / "zoe.log").read_text() == "zoe is 1 of 2 and has {'x': 1, 'y': 2}\n"
    assert run.facts["sites"] == ["ada", "zoe"]


def test_a_failed_job(load: Callable[[str], Any], tmp_path: Path, clean: None, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = FedAvgRecipe(name="a", app=load(CODE).app, model=MODEL, rounds=3, config={"breaks": 1})
    with pytest.raises(JobFailed, match=r"job 'a' failed: round 2, task 'train': 1 good updates of 2 asked, 2 needed") as failed:
        recipe.execute(PocEnv(num_clients=2, runs=tmp_path))
    run = Run(failed.value.folder)
    assert (run.get_status(), run.facts["rounds"]["done"], run.get_result().current_round) == ("failed", 1, 0)
    printed = capsys.readouterr().out
    for line in ("a: 2 sites", "round 1/3", "site-2 failed: ValueError: ", "no data today", "failed in", "model   "):
        assert line in printed


def test_a_job_that_the_sites_policy_refuses(load: Callable[[str], Any], tmp_path: Path, clean: None) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("workflows: [fedeval]\n")
    recipe = FedAvgRecipe(name="a", app=load(CODE).app, model=MODEL, rounds=1)
    with pytest.raises(Refused, match=r"(?s)site-1.*\[workflows\].*site-2"):
        recipe.execute(PocEnv(num_clients=2, policy=policy, runs=tmp_path / "runs", console="quiet"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_job_that_is_in_no_file(tmp_path: Path, clean: None) -> None:
    app = App()
    app.train(lambda model, site: model)
    with pytest.raises(ConfigError, match="defined in no file"):
        FedAvgRecipe(name="a", app=app, model=MODEL, rounds=1).execute(PocEnv(num_clients=1, runs=tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


# ------------------------------------------------------------------------------------------------------ a program that is stopped or killed

PROGRAM = """
if __name__ == "__main__":
    import sys
    import numpy as np
    from hanse import FedAvgRecipe, PocEnv

    config = {"stops": 1, "tell": "tell", "never": "never"}
    config = {name: value if name == "stops" else os.path.abspath(value) for name, value in config.items()}
    recipe = FedAvgRecipe(name="a", app=app, model={"w": np.zeros(3, "f4")}, rounds=3, config=config)
    recipe.execute(PocEnv(num_clients=2))
"""


class Program:
    """A program that executes a job in `PocEnv`, waiting in the second round; below it server, sites and training processes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "job.py").write_text(CODE + PROGRAM)
        os.mkfifo(folder / "tell")
        os.mkfifo(folder / "never")
        tell = os.open(folder / "tell", os.O_RDWR)  # so that it never blocks
        self.folder = folder
        command = [sys.executable, "job.py"]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert select.select([tell], [], [], 60)[0], "the job has not come to its second round"
        self.trainer = psutil.Process(int(os.read(tell, 100)))
        os.close(tell)
        self.below = psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def nothing_lives(self) -> bool:
        _, alive = psutil.wait_procs([*self.below, self.trainer], timeout=30)
        return alive == []


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_stopped(tmp_path: Path, temporary: Path, by: int) -> None:
    program = Program(tmp_path / "program")
    assert len(program.below) >= 6  # the server, the job, two agents, their training processes
    program.process.send_signal(by)
    status, out, err = program.end()
    assert status == 1
    assert "JobStopped: job 'a' was stopped after 1 of 3 rounds." in err
    assert "stopped in" in out
    run = Run(program.folder / "runs" / "a-001")
    assert (run.get_status(), run.facts["rounds"]["done"], run.get_result().current_round) == ("stopped", 1, 0)
    assert program.nothing_lives()
    assert list(temporary.glob("hanse-*")) == []


def test_a_program_that_is_killed(tmp_path: Path, temporary: Path) -> None:
    program = Program(tmp_path / "program")
    program.process.kill()
    program.end()
    assert program.nothing_lives()


def test_a_site_that_is_killed(tmp_path: Path, temporary: Path) -> None:
    program = Program(tmp_path / "program")
    agent = next(process for process in program.below if process.cmdline()[-2].endswith("sites/site-2"))
    agent.kill()
    status, _, err = program.end()
    assert status == 1
    assert re.search(r"JobFailed: job 'a' failed: the process of site-2 was killed by SIGKILL", err)
    assert Run(program.folder / "runs" / "a-001").get_status() == "failed"
    assert program.nothing_lives()
    assert list(temporary.glob("hanse-*")) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "PocEnv needs either num_clients, a number of sites, or sites, their names"),
        ({"num_clients": 0}, "PocEnv has num_clients=0: it must be a whole number from 1"),
        ({"sites": ["a/b"]}, "give a list of different names"),
        ({"sites": ["Bad Homburg"]}, r"sites is \['Bad Homburg'\]"),
        ({"sites": ["poc-server"]}, "taken by"),
        ({"num_clients": 2, "console": "loud"}, "console='loud': it must be one of auto, plain, rich, json, quiet"),
        ({"num_clients": 2, "site_config": {"site-3": {}}}, "names a site that is not there"),
        ({"num_clients": 2, "policy": "nowhere.yaml"}, "nowhere.yaml"),
    ],
    ids=str,
)
def test_wrong_arguments(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PocEnv(**wrong)


def test_more_sites_than_there_are(app: App) -> None:
    with pytest.raises(ConfigError, match="sites_per_round=3, and the number of sites is 2"):
        FedAvgRecipe(name="a", app=app, model=MODEL, rounds=1, sites_per_round=3).execute(PocEnv(num_clients=2))
