"""A site's processes: DDP gives what one process gives, and one that fails takes all with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hanse import FedAvgRecipe, PocEnv, SimEnv
from hanse.adapters.torchrun import torchrun
from hanse.errors import ConfigError, JobFailed
from hanse.sandbox import Sandbox, environment

DDP = """
import os, sys
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
import hanse.client as flare
from hanse.adapters.torchrun import torchrun

def main():
    flare.init(rank=distributed.get_rank())
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    assert flare.get_site_name().startswith("site-") and os.environ["WORLD_SIZE"] == str(processes)
    site = flare.system_info()["rank"]
    x = torch.arange(64.).reshape(16, 4).sin() + site
    y = 3 * x.sum(1, keepdim=True) - 1
    net = nn.Linear(4, 1)
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    while flare.is_running():
        model = flare.receive()
        net.load_state_dict(model.params)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.mse_loss(ddp(x[rank::processes]), y[rank::processes]).backward()
            optimizer.step()
        state = flare.get_state()
        state["rounds"] = state.get("rounds", 0) + 1 + 10 * rank
        flare.log("loss", float(rank) + 0.5, global_step=model.current_round)
        print("noise", torch.rand(1).item())
        drawn = torch.rand(1)
        same = drawn.clone()
        distributed.broadcast(same, 0)
        assert rank == 0 or not torch.equal(drawn, same)
        noise = {"noise": drawn.item()} if sys.argv[2:] else {}
        metrics = {"rounds": state["rounds"], "rank": rank, "lr": flare.get_config()["lr"], **noise}
        flare.send(flare.FLModel(params=net.state_dict(), metrics=metrics, meta={"examples": len(x)}))

if __name__ == "__main__":
    torchrun(main, processes=int(sys.argv[1]))
"""


def first_model() -> Any:
    import torch

    return {"weight": torch.ones(1, 4), "bias": torch.zeros(1)}


def recipe(folder: Path, text: str, *argv: str, rounds: int = 1, **settings: Any) -> FedAvgRecipe:
    script = folder / "train.py"
    script.write_text(text)
    return FedAvgRecipe(name="group", script=script, argv=argv, model=first_model(), rounds=rounds, config={"lr": 0.25}, **settings)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def test_ddp_is_the_same_in_sim_and_poc_and_close_to_one_process(tmp_path: Path) -> None:
    before = children()
    two = recipe(tmp_path, DDP, "2", "noise", rounds=2)
    sim = two.execute(SimEnv(num_clients=2, workers=1, runs=tmp_path, console="quiet"))
    poc = two.execute(PocEnv(num_clients=2, runs=tmp_path, console="quiet"))
    one = recipe(tmp_path, DDP, "1", rounds=2).execute(SimEnv(num_clients=2, runs=tmp_path, console="quiet"))
    results = [run.get_result().params for run in (sim, poc, one)]
    for name in ("weight", "bias"):
        assert np.asarray(results[0][name]).tobytes() == np.asarray(results[1][name]).tobytes()
        np.testing.assert_allclose(results[0][name], results[2][name], rtol=1e-5)
        assert not np.allclose(results[0][name], first_model()[name])
    assert sim.metrics == poc.metrics
    assert [(metrics["rounds"], metrics["rank"], metrics["lr"]) for metrics in sim.metrics] == [(1, 0, 0.25), (2, 0, 0.25)]
    assert sim.metrics[0]["noise"] != sim.metrics[1]["noise"]
    lines = (sim.folder / "logs" / "site-1.log").read_text().splitlines()
    assert sorted(line.partition(" noise")[0] for line in lines if line.startswith("[1]")) == ["[1]", "[1]"]
    assert len(lines) == 4
    assert children() <= before


FAILS = """
import os, signal, sys
from torch import distributed
import hanse.client as flare
from hanse.adapters.torchrun import torchrun

def main():
    flare.init()
    while flare.is_running():
        model = flare.receive()
        print("pid", os.getpid())
        if distributed.get_rank() == 1:
            if sys.argv[1] == "raises":
                raise OSError("no such disk")
            if sys.argv[1] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if sys.argv[1] == "leaves":
                return
        if sys.argv[1] == "silent":
            continue
        distributed.barrier()
        flare.send(flare.FLModel(params=model.params))

if __name__ == "__main__":
    torchrun(main, processes=2)
"""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "of 2 processes, process 1 raised OSError: no such disk"),
        ("dies", "of 2 processes, process 1 was killed by SIGKILL"),
        ("silent", "process 0 asked for the next task without an answer to 'train'"),
    ],
)
def test_one_that_fails_ends_all(how: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=says) as failed:
        recipe(tmp_path, FAILS, how).execute(SimEnv(num_clients=1, runs=tmp_path, console="quiet"))
    log = (Path(failed.value.folder) / "logs" / "site-1.log").read_text()
    pids = [int(line.split()[-1]) for line in log.splitlines() if "pid" in line]
    assert pids
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
    if how == "raises":
        assert "[1] OSError: no such disk" in log


ONE_TASK = """
import hanse.client as flare
from torch import distributed
from hanse.adapters.torchrun import torchrun

def main():
    flare.init()
    model = flare.receive()
    distributed.all_reduce(model.params["bias"].add_(1))
    flare.send(flare.FLModel(params=model.params))

if __name__ == "__main__":
    torchrun(main, processes=2)
"""


def test_a_script_that_ends_after_a_task_begins_anew(tmp_path: Path) -> None:
    run = recipe(tmp_path, ONE_TASK, rounds=2).execute(SimEnv(num_clients=1, runs=tmp_path, console="quiet"))
    np.testing.assert_array_equal(run.get_result().params["bias"], [6.0])  # (0 + 1) · 2, (2 + 1) · 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"processes": 0}, "processes is 0"),
        ({"processes": 2, "backend": "mpi"}, "backend is 'mpi'"),
        ({"processes": 99, "backend": "nccl"}, "a GPU a process"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        torchrun(first_model, **settings)


def test_not_in_a_script() -> None:
    with pytest.raises(ConfigError, match="starts a script anew"):
        torchrun(first_model, processes=2)


def test_started_by_torchrun_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="Start the script with `python`"):
        torchrun(first_model, processes=2)


def test_in_a_sandbox_without_a_network(tmp_path: Path) -> None:
    sandbox = Sandbox(readable=[tmp_path])
    if problem := sandbox.problem():
        pytest.skip(problem)
    script, work = tmp_path / "train.py", tmp_path / "work"
    script.write_text(
        ONE_TASK.replace("def main", "import torch\nnet = torch.nn.Linear(1, 1)\nwith torch.no_grad(): net.bias.zero_()\n\ndef main")
    )
    work.mkdir()
    command = sandbox.command([str(script)], work=work)
    done = subprocess.run(command, env={**environment(work), "HANSE_ROUNDS": "2"}, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "round 2 of 2" in done.stdout


def test_when_the_site_is_killed_no_process_is_left(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(FAILS.replace("distributed.barrier()", "signal.pause()"))
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    alone = subprocess.Popen([sys.executable, script, "hangs"], env=variables, stdout=subprocess.PIPE, text=True)
    assert alone.stdout is not None
    pids: list[int] = []
    for line in alone.stdout:
        if "pid" in line:
            pids.append(int(line.split()[-1]))
        if len(pids) == 2:
            break
    group = [psutil.Process(pid) for pid in pids]
    alone.kill()
    alone.wait()
    _, alive = psutil.wait_procs(group, timeout=60)
    assert not alive
