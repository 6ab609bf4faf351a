"""Jobs in which something stays at the sites: what arrives, what is evaluated, and the same bits everywhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App
from hanse.environments import PocEnv, SimEnv, resume
from hanse.errors import ConfigError, JobFailed
from hanse.filters import ClipNorm, Filters
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.loading import read_job
from hanse.jobs.personal import DittoRecipe, PersonalRecipe
from hanse.jobs.scaffold import FedDynRecipe, ScaffoldRecipe
from hanse.messages.params import flatten
from hanse.server.run import Run
from hanse.server.run_folder import RunFolder
from hanse.simulation import engine

CODE = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from hanse import App, FLModel
from hanse.adapters.torch import proximal_term
from hanse.adapters.torch_correction import FedDyn, Scaffold
from hanse.adapters.torch_personal import tensors

app = App()


def make():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), "head": nn.Linear(8, 1)})


def data(site):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(site.rank))
    return x, x.sum(1, keepdim=True) * (site.rank - 1)  # what is up at one site is down at another


def loss_of(net, x, y):
    return (net["head"](net["body"](x)) - y).square().mean()


@app.train
def train(model, site):
    x, y = data(site)
    net, config = make(), site.config
    if "killed" in config and site.rank == 1 and model.current_round == 1 and not Path(config["killed"]).exists():
        Path(config["killed"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    corrections = None
    if config.get("kind") == "scaffold":
        corrections = Scaffold(net, optimizer, model, site.state)
    elif config.get("kind") == "feddyn":
        corrections = FedDyn(net, model, site.state, config["feddyn_alpha"])
    else:
        net.load_state_dict(model.params)
    for rows in torch.randperm(64).split(16):
        optimizer.zero_grad()
        loss_of(net, x[rows], y[rows]).backward()
        if corrections:
            corrections.apply()
        optimizer.step()
    if "ditto_lambda" in config:
        own = make()
        own.load_state_dict(tensors(site.state.get("personal", model.params)))
        local = torch.optim.SGD(own.parameters(), lr=0.05)
        for rows in torch.randperm(64).split(16):
            local.zero_grad()
            (loss_of(own, x[rows], y[rows]) + proximal_term(own, model.params, config["ditto_lambda"])).backward()
            local.step()
        site.state["personal"] = own.state_dict()
    if corrections:
        return corrections.finish(meta={"examples": 64})
    return FLModel(net.state_dict(), meta={"examples": 64})


@app.evaluate
def evaluate(model, site):
    x, y = data(site)
    net = make()
    net.load_state_dict(tensors(site.state.get("personal", model.params)))
    with torch.no_grad():
        return {"loss": loss_of(net.eval(), x, y), "head": net["head"].weight.sum()}
"""

RECIPES: dict[str, Callable[..., Any]] = {
    "scaffold": lambda **more: ScaffoldRecipe(name="job", config={"kind": "scaffold"}, **more),
    "feddyn": lambda **more: FedDynRecipe(name="job", config={"kind": "feddyn"}, **more),
    "personal": lambda **more: PersonalRecipe(name="job", local=["head.*", "body.1.*"], **more),
    "ditto": lambda **more: DittoRecipe(name="job", **({"strength": 0.5} | more)),
}


@pytest.fixture
def module(load: Callable[[str], Any]) -> Any:
    pytest.importorskip("torch")
    return load(CODE)


@pytest.fixture
def make(module: Any) -> Callable[..., Any]:
    """The recipe of that name, three rounds of the network above."""

    def make(name: str, **more: Any) -> Any:
        return RECIPES[name](**({"app": module.app, "model": module.make(), "rounds": 3, "best": "min loss"} | more))

    return make


def same(one: Run, other: Run) -> None:
    (mine, _), (theirs, _) = (flatten(run.get_result().params) for run in (one, other))
    assert {name: array.tobytes() for name, array in mine.items()} == {name: array.tobytes() for name, array in theirs.items()}
    assert one.metrics == other.metrics


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bits_with_one_worker_and_with_two(name: str, make: Any, tmp_path: Path) -> None:
    runs = [make(name).execute(SimEnv(num_clients=3, workers=n, runs=tmp_path / str(n), console="quiet")) for n in (1, 2)]
    same(*runs)
    if name in ("personal", "ditto"):  # one model for all can do nothing here
        assert runs[0].metrics[-1]["loss"] < runs[0].metrics[0]["loss"]


@pytest.mark.parametrize("name", ["scaffold", "personal"])
def test_the_same_bits_in_processes_of_their_own_though_one_is_killed(name: str, make: Any, tmp_path: Path) -> None:
    """What a site keeps lies with its agent: a training process that dies begins its task again from there, here and in a simulation."""
    whole = make(name).execute(SimEnv(num_clients=2, runs=tmp_path / "whole", console="quiet"))
    for kind in (SimEnv, PocEnv):
        killed = tmp_path / f"{kind.__name__}-was-killed"
        recipe = make(name)
        recipe = replace(recipe, config={**recipe.config, "killed": str(killed)})
        same(whole, recipe.execute(kind(num_clients=2, runs=tmp_path / kind.__name__, console="quiet")))
        assert killed.exists()


def killed_at_third(commit: Any) -> Any:
    def commit_or_die(folder: RunFolder, model: Any) -> Any:
        if folder.commits == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return commit(folder, model)

    return commit_or_die


@pytest.mark.parametrize("name", RECIPES)
def test_a_job_that_broke_off_goes_on_to_the_same_bits(name: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites go on from what they kept; the main process was killed in the third round."""
    whole = make(name).execute(SimEnv(num_clients=3, workers=2, runs=tmp_path / "whole", console="quiet"))
    if (child := os.fork()) == 0:
        try:
            monkeypatch.setattr(RunFolder, "commit", killed_at_third(RunFolder.commit))
            make(name).execute(SimEnv(num_clients=3, workers=2, runs=tmp_path / "cut", console="quiet"))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again = resume(tmp_path / "cut" / "job-001", console="quiet")
    assert again.events("start")[-1]["resumed"] == 2
    same(whole, again)


def test_what_is_local_never_arrives(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every frame that the simulation's main process gets is looked at; in a real federation it is the same code that sends it."""
    arrived: list[set[str]] = []

    model = make("personal").model
    recipe = make("personal", filters=Filters(site_out=[ClipNorm(100.0)]))
    monkeypatch.setattr(engine, "describe_part", lambda *_: None)  # so that each update comes by itself
    decode = engine.decode_update
    monkeypatch.setattr(engine, "decode_update", lambda data: _noted(decode(data), arrived))
    run = recipe.execute(SimEnv(num_clients=3, runs=tmp_path, console="quiet"))
    trained = [names for names in arrived if names]
    assert trained == [{"body.0.weight", "body.0.bias"}] * 9
    first = model.state_dict()
    for name, array in run.get_result().params.items():
        changed = not np.array_equal(array, first[name].numpy())
        assert changed is name.startswith("body.0."), name
    heads = {event["metrics"]["head"] for event in run.events("update") if event["task"] == "evaluate" and event["round"] == 2}
    assert len(heads) == 3  # each site is scored with its own


def _noted(update: Any, arrived: list[set[str]]) -> Any:
    arrived.append(set() if update.model.params is None else set(flatten(update.model.params)[0]))
    return update


def test_a_head_of_its_own_serves_each_site_better_than_one_for_all(make: Any, module: Any, tmp_path: Path) -> None:
    env = SimEnv(num_clients=3, runs=tmp_path, console="quiet")
    own = make("personal", rounds=15).execute(env)
    shared = FedAvgRecipe(name="shared", app=module.app, model=module.make(), rounds=15, best="min loss").execute(env)
    ditto = make("ditto", strength=0.05, rounds=15).execute(env)
    assert own.metrics[-1]["loss"] < 0.25 * shared.metrics[-1]["loss"]
    assert ditto.metrics[-1]["loss"] < 0.25 * shared.metrics[-1]["loss"]
    same_shared = {name: array.tobytes() for name, array in ditto.get_result().params.items()}
    assert set(same_shared) == set(module.make().state_dict())


SCRIPT = """
import numpy as np
import hanse.client as flare

flare.init()
rank = flare.system_info()["rank"]
while flare.is_running():
    model = flare.receive()
    body, head = model.params["body"], model.params["head"]
    flare.send(flare.FLModel({"body": body + 1, "head": head + rank}, metrics={"loss": float(head[0])}))
"""


def test_a_script_needs_no_line_for_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    model = {"body": np.zeros(1), "head": np.zeros(1)}
    recipe = PersonalRecipe(name="script", script=tmp_path / "train.py", model=model, rounds=4, local=["head"], best="min loss")
    run = recipe.execute(SimEnv(num_clients=3, runs=tmp_path, console="quiet"))
    assert {name: array.tolist() for name, array in run.get_result().params.items()} == {"body": [4.0], "head": [0.0]}
    last = {event["site"]: event["metrics"]["loss"] for event in run.events("update") if event["round"] == 3}
    assert last == {"site-1": 0.0, "site-2": 3.0, "site-3": 6.0}


ONE_STEP = """
import torch
import hanse.client as flare
from hanse import App
from hanse.adapters.torch_correction import Scaffold

app = App()


def task(model, state, rank):
    net = torch.nn.Linear(3, 1)
    corrections = Scaffold(net, optimizer := torch.optim.SGD(net.parameters(), lr=0.1), model, state)
    for _ in range(3):
        optimizer.zero_grad()
        (net(torch.eye(3)) - rank).square().sum().backward()
        corrections.apply()
        optimizer.step()
    return corrections.finish()


app.train(lambda model, site: task(model, site.state, site.rank))

if __name__ == "__main__":
    flare.init()
    while flare.is_running():
        flare.send(task(flare.receive(), flare.get_state(), flare.system_info()["rank"]))
"""


def test_scaffold_in_a_script_is_scaffold_in_a_function(load: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = load(ONE_STEP)
    torch.manual_seed(0)
    common: dict[str, Any] = {"model": torch.nn.Linear(3, 1), "rounds": 4, "sites_per_round": 2}
    env = SimEnv(num_clients=3, workers=2, runs=tmp_path, console="quiet")
    runs = [ScaffoldRecipe(name="job", **what, **common).execute(env) for what in ({"app": module.app}, {"script": Path(module.__file__)})]
    same(*runs)


@pytest.mark.parametrize("name", RECIPES)
def test_a_job_folder_holds_it(name: str, make: Any, tmp_path: Path) -> None:
    again = read_job(make(name).export(tmp_path / "job"))
    assert type(again) is type(make(name))
    assert again.arguments_as_data() == make(name).arguments_as_data()
    assert again.config == make(name).config


def test_a_site_whose_code_renames_its_head_fails_and_sends_nothing(tmp_path: Path) -> None:
    app = App()

    @app.train
    def train(model: Any, site: Any) -> Any:
        from hanse.messages.flmodel import FLModel

        return FLModel({"body": model.params["body"], "top": model.params["head"]})

    recipe = PersonalRecipe(name="a", app=app, model={"body": np.zeros(1), "head": np.zeros(1)}, rounds=1, local=["head"])
    with pytest.raises(JobFailed, match="tensor 'top' is not in the task's model"):
        recipe.execute(SimEnv(num_clients=2, runs=tmp_path, console="quiet"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"local": []}, "must be a list of patterns"),
        ({"local": "head.*"}, "must be a list of patterns"),
        ({"local": ["tail.*"]}, r"keeps 0 of the first model's 2 tensors local.*\n?.*body"),
        ({"local": ["*"]}, "keeps 2 of the first model's 2"),
        ({"local": ["head"], "model": None}, "Give the recipe a first model"),
    ],
)
def test_patterns_must_name_a_part(app: App, arguments: dict[str, Any], says: str) -> None:
    common: dict[str, Any] = {"name": "a", "app": app, "model": {"body": np.zeros(1), "head": np.zeros(1)}, "rounds": 1}
    with pytest.raises(ConfigError, match=says):
        PersonalRecipe(**(common | arguments))


@pytest.mark.parametrize(
    ("recipe", "arguments", "says"),
    [
        (ScaffoldRecipe, {"server_learning_rate": 0}, "server_learning_rate=0"),
        (ScaffoldRecipe, {"model": None}, "first model of named params"),
        (ScaffoldRecipe, {"model": {"control": np.zeros(1)}}, "called 'control'"),
        (FedDynRecipe, {"alpha": -1}, "alpha=-1"),
        (FedDynRecipe, {"averaged": "x"}, "averaged='x'"),
        (FedDynRecipe, {"model": None}, "first model"),
        (DittoRecipe, {"strength": 0}, "strength=0"),
    ],
)
def test_settings_are_checked(app: App, recipe: Any, arguments: dict[str, Any], says: str) -> None:
    common: dict[str, Any] = {"name": "a", "app": app, "model": {"w": np.zeros(3)}, "rounds": 1}
    with pytest.raises(ConfigError, match=says):
        recipe(**(common | arguments))
