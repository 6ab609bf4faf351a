"""Jobs in a federation that was there before them and stays: a real one, though its processes are on this machine."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.environments import ProdEnv, SimEnv
from hanse.environments.local import admin_kit
from hanse.errors import ConfigError, JobFailed, Refused
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.server.run import Run

MODEL = {"w": np.zeros(3, np.float32)}


def hanse(*arguments: object, cwd: Path) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "hanse.cli.main", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running federation of site-1 and site-2."""
    folder = tmp_path_factory.mktemp("federation") / "poc"
    hanse("poc", "start", "--folder", folder, cwd=folder.parent)
    yield folder
    hanse("poc", "stop", "--folder", folder, cwd=folder.parent)


@pytest.fixture
def kit(federation: Path) -> Path:
    return admin_kit(federation)


def test_pytorch_digits_have_the_same_bits(digits: Any, kit: Path, tmp_path: Path, check_same: Callable[[Run, Run], None]) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    recipe = FedAvgRecipe(name="digits", app=digits.app, model=digits.net(), rounds=3)
    simulated = recipe.execute(SimEnv(num_clients=2, runs=tmp_path / "sim", console="quiet"))
    real = recipe.execute(ProdEnv(startup_kit=kit, runs=tmp_path / "prod", console="quiet"))
    check_same(simulated, real)
    assert (real.get_status(), real.facts["sites"]) == ("completed", ["site-1", "site-2"])
    assert real.facts["federation"] == {"name": "poc", "server": real.facts["federation"]["server"], "job": "digits-0001"}


def test_one_of_the_sites(load: Callable[[str], Any], kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = FedAvgRecipe(name="one", app=load(CODE).app, model=MODEL, rounds=1)
    env = ProdEnv(startup_kit=kit, sites=["site-2"], site_config={"site-2": {"breaks": 0}}, runs=tmp_path)
    with pytest.raises(JobFailed, match=r"(?s)no data today.*Go on with: hanse job resume one-0001 --kit /.*/admins/poc-admin") as failed:
        recipe.execute(env)
    run = Run(failed.value.folder)
    assert (run.get_status(), run.facts["sites"]) == ("failed", ["site-2"])
    printed = capsys.readouterr().out
    assert "go on   hanse job resume one-0001 --kit" in printed
    assert "job one-0001 is submitted to 127.0.0.1:" in printed


def test_what_the_federation_does_not_have(load: Callable[[str], Any], kit: Path, tmp_path: Path) -> None:
    recipe = FedAvgRecipe(name="a", app=load(CODE).app, model=MODEL, rounds=1)
    for wanted, says in [
        ({"resources": {"gpus": 1000}}, "(?s)site-1: Resources.*site-2: Resources"),
        ({"sites": ["site-3"]}, "sites that are not in this federation, or disabled or revoked: site-3"),
        ({"min_sites": 3}, "needs 3 sites"),
    ]:
        with pytest.raises(Refused, match=says):
            recipe.execute(ProdEnv(startup_kit=kit, runs=tmp_path, console="quiet", **wanted))
    assert list(tmp_path.glob("a-*")) == []


CODE = """
import os
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    if site.config.get("breaks") == model.current_round:
        raise ValueError("no data today")
    if site.config.get("waits") == model.current_round and site.rank == 1:
        until = os.open(site.config["until"], os.O_RDONLY)
        os.write(os.open(site.config["tell"], os.O_WRONLY), b"!")
        os.read(until, 1)  # a pipe that nobody writes to, until it is closed
    return FLModel({"w": model.params["w"] + 1})
"""
PROGRAM = """
if __name__ == "__main__":
    import sys
    import numpy as np
    from hanse import FedAvgRecipe, ProdEnv

    config = {"waits": 1, "tell": os.path.abspath("tell"), "until": os.path.abspath("until")}
    recipe = FedAvgRecipe(name=sys.argv[2], app=app, model={"w": np.zeros(3, "f4")}, rounds=3, config=config)
    run = recipe.execute(ProdEnv(startup_kit=sys.argv[1], detach=len(sys.argv) > 3))
    print("returned", run.get_status())
"""


class Program:
    """A program that executes a job in `ProdEnv`; it waits in the second round until it is let go on."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        (folder / "job.py").write_text(CODE + PROGRAM)
        for name in ("tell", "until"):
            os.mkfifo(folder / name)
        self._tell, self._until = (os.open(folder / name, os.O_RDWR) for name in ("tell", "until"))  # so that it never blocks
        command = [sys.executable, "job.py", *map(str, arguments)]
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait(self) -> None:
        """Until the job waits."""
        assert select.select([self._tell], [], [], 60)[0], "the job has not come to its second round"
        assert os.read(self._tell, 1) == b"!"

    def let_go_on(self) -> None:
        os.close(self._until)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def test_ctrl_c_ends_the_looking_on_alone(kit: Path, tmp_path: Path) -> None:
    program = Program(tmp_path, kit, "left")
    program.wait()
    program.process.send_signal(signal.SIGINT)
    status, out, err = program.end()
    assert status != 0
    assert f"Job left-0001 goes on by itself. Look at it with: hanse job logs -f left-0001 --kit {kit}" in out
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert Run(tmp_path / "runs" / "left-001").get_status() == "running"
    assert json.loads(hanse("job", "show", "left-0001", "--json", "--kit", kit, cwd=tmp_path))["status"] == "running"
    program.let_go_on()
    shown = hanse("job", "logs", "-f", "left-0001", "--kit", kit, cwd=tmp_path)
    assert re.search(r"round 3/3.*completed in", shown, re.DOTALL)
    assert hanse("job", "download", "left-0001", "--kit", kit, cwd=tmp_path) == "runs/left-002\n"
    assert Run(tmp_path / "runs" / "left-002").get_result().params["w"].tolist() == [3, 3, 3]


def test_somebody_stops_the_job(kit: Path, tmp_path: Path) -> None:
    program = Program(tmp_path, kit, "aborted")
    program.wait()
    hanse("job", "abort", "aborted-0001", "--kit", kit, cwd=tmp_path)
    status, out, err = program.end()
    assert status == 1
    assert f"JobStopped: job 'aborted' was stopped after 1 of 3 rounds. Go on with: hanse job resume aborted-0001 --kit {kit}" in err
    assert "stopped in" in out
    assert Run(tmp_path / "runs" / "aborted-001").get_result().params["w"].tolist() == [1, 1, 1]


def test_detached(kit: Path, tmp_path: Path) -> None:
    program = Program(tmp_path, kit, "detached", "detach")
    status, out, _ = program.end()
    assert (status, out.splitlines()[-1]) == (0, "returned queued")
    assert Run(tmp_path / "runs" / "detached-001").facts["federation"]["job"] == "detached-0001"
    program.wait()
    assert hanse("job", "abort", "detached-0001", "--kit", kit, cwd=tmp_path).startswith("detached-0001 is stopped")


def test_the_server_is_started_again(tmp_path: Path) -> None:
    """The job goes on by itself, and so does who follows it."""
    folder = tmp_path / "poc"
    hanse("poc", "start", "--folder", folder, cwd=tmp_path)
    program = Program(tmp_path, admin_kit(folder), "again")
    program.wait()
    hanse("poc", "stop", "--folder", folder, cwd=tmp_path)
    hanse("poc", "start", "--folder", folder, cwd=tmp_path)
    program.wait()
    program.let_go_on()
    status, out, err = program.end()
    assert status == 0, err
    assert "The connection is tried again." in out
    assert [line[:9] for line in out.splitlines() if line.startswith("round")] == ["round 1/3", "round 2/3", "round 3/3"]
    assert Run(tmp_path / "runs" / "again-001").get_result().params["w"].tolist() == [3, 3, 3]
    hanse("poc", "stop", "--folder", folder, "--delete", cwd=tmp_path)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"startup_kit": "nowhere"}, "nowhere is no kit"),
        ({"startup_kit": "sites/site-1"}, "is the kit of a site"),
        ({"sites": "ab"}, "give a list of different names"),
        ({"sites": ["a"], "min_sites": 2}, "min_sites=2, and sites names 1"),
        ({"min_sites": 0}, "ProdEnv has min_sites=0: it must be a whole number from 1"),
        ({"resources": {"disks": 1}}, "there are cores, memory_bytes and gpus"),
        ({"resources": {"cores": -1}}, "there are cores, memory_bytes and gpus"),
        ({"site_config": {"site-1": 3}}, "site_config of 'site-1' is 3"),
        ({"sites": ["site-1"], "site_config": {"site-2": {}}}, "names a site that is not there"),
        ({"console": "loud"}, "console='loud'"),
    ],
    ids=str,
)
def test_wrong_arguments(federation: Path, kit: Path, wrong: dict[str, Any], says: str) -> None:
    if "startup_kit" in wrong:
        wrong = {"startup_kit": federation / wrong["startup_kit"]}
    with pytest.raises(ConfigError, match=says):
        ProdEnv(**{"startup_kit": kit, **wrong})
