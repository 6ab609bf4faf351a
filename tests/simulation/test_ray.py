"""Whole jobs on a Ray cluster of two nodes, which are real processes: the same bits as without Ray, also where a node dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hanse.app import App
from hanse.environments import SimEnv
from hanse.errors import ConfigError, JobFailed, LinkBroken
from hanse.filters import ClipNorm, Filters, GaussianNoise
from hanse.jobs.asynchronous import FedBuffRecipe
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.server.run import Run
from hanse.simulation.clock import Devices

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="needs the package ray: pip install 'hanse[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402

from hanse.simulation.ray_engine import own_folder  # noqa: E402

MODEL = {"w": np.zeros(3, np.float32)}
STORE_BYTES = 100 << 20
APP = """
import os
import signal
from pathlib import Path
import numpy as np
from hanse import App, FLModel

if "{driver}" != os.environ.get("DRIVER", ""):
    raise RuntimeError("no data folder here")
app = App()

@app.train
def train(model, site):
    n = site.state["n"] = site.state.get("n", 0) + 1
    print(f"round {{model.current_round}} at {{site.name}}")
    if site.rank == 1 and model.current_round == 1:
        raise ValueError("no data today")
    if os.getppid() == site.config.get("raylet") and model.current_round == 1:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    w = model.params["w"]
    return FLModel({{"w": w + n * site.rng.normal(size=w.shape).astype("f4")}}, metrics={{"n": n, "rank": site.rank}})
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False})
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


Execute = Callable[..., Run]


@pytest.fixture
def execute(tmp_path: Path) -> Execute:
    def execute(recipe: Any, *, sites: int, **env: Any) -> Run:
        return recipe.execute(SimEnv(num_clients=sites, runs=tmp_path / "runs", console="quiet", **env))

    return execute


def bits(run: Run) -> bytes:
    return (run.folder / "model.safetensors").read_bytes()


def recipe_of(code: dict[str, Any], **settings: Any) -> FedAvgRecipe:
    filters = Filters(site_out=[ClipNorm(3.0)], server_in=[GaussianNoise(0.1)])
    return FedAvgRecipe(name="job", **{"model": MODEL, "rounds": 3, "filters": filters, "seed": 4, **code, **settings})


@pytest.mark.parametrize("sites", [8, 100])
def test_functions_give_the_same_bits(app: App, sites: int, execute: Execute, cluster: Cluster) -> None:
    recipe = recipe_of({"app": app})
    run, here = execute(recipe, sites=sites, engine="ray", address=cluster.address), execute(recipe, sites=sites)
    assert run.facts["workers"] == 2
    assert (run.facts["environment"]["engine"], run.facts["environment"]["address"]) == ("ray", cluster.address)
    assert bits(run) == bits(here)
    assert run.metrics == here.metrics
    assert not ray.is_initialized()


@pytest.mark.parametrize("recipe", ["fedavg", "fedbuff"])
def test_simulated_time_passes_as_it_does_without_ray(recipe: str, app: App, execute: Execute, cluster: Cluster) -> None:
    devices = Devices(seconds=60, spread=0.8, upload_bytes_per_s=2, availability=0.5)
    if recipe == "fedavg":
        job: Any = recipe_of({"app": app}, within_s=100.0, min_updates=1)
    else:
        job = FedBuffRecipe(name="job", app=app, model=MODEL, rounds=3, buffer=4, concurrency=6)
    run, here = execute(job, sites=12, devices=devices, engine="ray", address=cluster.address), execute(job, sites=12, devices=devices)
    assert bits(run) == bits(here)
    times = [[(event["virtual_s"], event["good"]) for event in each.events("round")] for each in (run, here)]
    assert times[0] == times[1]
    assert times[0][-1][0] > times[0][0][0] > 60
    assert recipe == "fedbuff" or all(0 < good < 12 for _, good in times[0])


def test_a_script_gives_the_same_bits(script: Path, execute: Execute, cluster: Cluster) -> None:
    """Its variables live in the worker that its site stays with."""
    recipe = recipe_of({"script": script, "argv": ["0.5"]})
    assert bits(execute(recipe, sites=40, engine="ray", address=cluster.address)) == bits(execute(recipe, sites=40))


def test_failures_states_and_what_is_printed(load: Callable[[str], Any], execute: Execute, cluster: Cluster) -> None:
    """With a model that goes through the object store, and a deadline: each update comes by itself."""
    model = {"w": np.zeros(100_000, np.float32)}
    recipe = recipe_of({"app": load(APP.format(driver="")).app}, model=model, min_updates=8, within_s=100.0)
    run, here = execute(recipe, sites=9, engine="ray", address=cluster.address), execute(recipe, sites=9)
    assert bits(run) == bits(here)
    assert run.metrics == here.metrics
    assert [(event["site"], event["round"], event["message"]) for event in run.events("failure")] == [
        (event["site"], event["round"], event["message"]) for event in here.events("failure")
    ]
    assert [(event["site"], event["round"]) for event in run.events("failure")] == [("site-2", 1)]
    logs = {path.name: path.read_text() for path in (run.folder / "logs").iterdir()}
    assert logs == {path.name: path.read_text() for path in (here.folder / "logs").iterdir()}
    assert logs["site-3.log"] == "round 0 at site-3\nround 1 at site-3\nround 2 at site-3\n"


def test_code_that_a_node_cannot_import(
    load: Callable[[str], Any], execute: Execute, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVER", "here")
    recipe = recipe_of({"app": load(APP.format(driver="here")).app})
    with pytest.raises(JobFailed, match=r"Ray worker [12] cannot start: .*RuntimeError: no data folder here"):
        execute(recipe, sites=8, engine="ray", address=cluster.address)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"engine": "spark"}, "engine='spark': it must be one of processes, ray"),
        ({"address": "auto"}, "with engine='ray'"),
        ({"engine": "ray", "address": 6379}, "address=6379: it is 'host:port'"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SimEnv(num_clients=2, **wrong)


def test_a_cluster_that_is_not_there(app: App, execute: Execute, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(LinkBroken, match=rf"no Ray cluster answers at {address}: .*Is `ray start --head` running there\?"):
            execute(recipe_of({"app": app}), sites=8, engine="ray", address=address)
    with pytest.raises(ConfigError, match="address is 'ray://head:10001': give the head of a Ray cluster as 'host:port'"):
        execute(recipe_of({"app": app}), sites=8, engine="ray", address="ray://head:10001")
    assert not (tmp_path / "runs").exists()


def test_the_command(app: App, tmp_path: Path) -> None:
    recipe_of({"app": app}).export(tmp_path / "job")
    command = [sys.executable, "-m", "hanse.cli.main", "run", str(tmp_path / "job"), "--engine", "ray", "--address", "ray://head:10001"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: address is 'ray://head:10001': give the head of a Ray cluster")


def test_a_cluster_that_is_too_small(app: App, execute: Execute, cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers=3, of 1 threads each: the cluster has 2 CPUs"):
        execute(recipe_of({"app": app}), sites=8, workers=3, engine="ray", address=cluster.address)
    assert not (tmp_path / "runs").exists()


def test_a_node_that_is_killed_in_a_round(load: Callable[[str], Any], execute: Execute, cluster: Cluster) -> None:
    """The last test of the cluster: afterwards only the head is left."""
    (node,) = cluster.worker_nodes
    [raylet] = node.all_processes["raylet"]
    recipe = recipe_of({"app": load(APP.format(driver="")).app}, min_updates=99, config={"raylet": raylet.process.pid})
    run = execute(recipe, sites=100, engine="ray", address=cluster.address)
    assert raylet.process.wait() == -signal.SIGKILL
    assert bits(run) == bits(execute(recipe, sites=100))
    [message] = run.events("message")
    assert re.fullmatch(
        r"Ray worker [12] on [\d.]+ was lost: .*: a new one takes its place, and what it was at runs again", message["text"]
    )
    assert [failure["site"] for failure in run.events("failure")] == ["site-002"]


JOB = """
import os, signal, sys
from hanse import App, FedAvgRecipe, FLModel, SimEnv

app = App()

@app.train
def train(model, site):
    with open(site.config["tell"], "w") as pipe:
        print(os.getpid(), file=pipe)
    signal.pause()

if __name__ == "__main__":
    recipe = FedAvgRecipe(name="job", app=app, model={"w": [0.0]}, rounds=1, config={"tell": sys.argv[1]})
    recipe.execute(SimEnv(num_clients=2, workers=1, engine="ray", console="plain"))
"""


def test_ctrl_c_ends_the_workers_and_the_cluster_that_was_started_for_the_job(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    os.mkfifo(tmp_path / "tell")
    job = subprocess.Popen(
        [sys.executable, "job.py", str(tmp_path / "tell")], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with (tmp_path / "tell").open() as pipe:
        worker = psutil.Process(int(pipe.readline()))
    processes = psutil.Process(job.pid).children(recursive=True)
    assert worker in processes
    job.send_signal(signal.SIGINT)
    said, _ = job.communicate()
    assert "stopped after 0 of 1 rounds" in said
    assert Run(tmp_path / "runs" / "job-001").get_status() == "stopped"
    assert psutil.wait_procs(processes, timeout=20)[1] == []


def test_what_killed_workers_leave_on_a_node_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from hanse.simulation.ray_engine import own_folder; kept = own_folder(); print(kept[0], flush=True); input()"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    one, other = (subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "12")
    theirs = [Path(process.stdout.readline().strip()) for process in (one, other) if process.stdout]
    one.kill()
    one.wait()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine, lock = own_folder()
    assert sorted(tmp_path.iterdir()) == sorted([theirs[1], mine])
    lock.close()
    other.communicate("\n")
