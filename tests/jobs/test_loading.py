"""From a recipe to a folder and back: the same job, to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import yaml

from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import Yogi
from hanse.app import App
from hanse.environments import SimEnv
from hanse.errors import ConfigError, HanseError, NotInstalled
from hanse.filters import CastTo, ClipNorm, Filters
from hanse.jobs.cyclic import CyclicRecipe
from hanse.jobs.evaluate import FedEvalRecipe
from hanse.jobs.fedavg import FedAvgRecipe, FedOptRecipe, FedProxRecipe
from hanse.jobs.loading import read_job
from hanse.jobs.recipe import Recipe, WorkflowRecipe

MODEL = {"w": np.zeros(3, np.float32)}
EVERYTHING = """
import numpy as np
from hanse import App, FLModel, Task, WeightedMean, SGD

app = App()

@app.train
def train(model, site):
    w = model.params["w"] + site.config["lr"] * site.rng.normal(size=3)
    return FLModel({"w": w.astype("f4")}, metrics={"loss": float(w[0])}, meta={"steps": site.rank + 1})

@app.evaluate
def evaluate(model, site):
    return {"loss": float(model.params["w"].sum()) + site.rank}

@app.task("submit_model")
def submit(model, site):
    return FLModel({"w": np.full(3, site.rank, "f4")})

async def twice(cohort, model, *, rounds, scale):
    async for _ in cohort.rounds(model, rounds):
        for _ in range(2):
            reduced = await cohort.reduce(Task("train", model), WeightedMean())
            model = SGD(scale).step(model, reduced.model)
        model = await cohort.commit(model, {"draw": cohort.rng.random()})
    return model
"""


def outcome(recipe: Recipe, folder: Path) -> tuple[bytes, list[Any]]:
    run = recipe.execute(SimEnv(num_clients=3, runs=folder, console="quiet"))
    return (run.folder / "model.safetensors").read_bytes(), list(run.metrics)


@pytest.fixture
def recipes(load: Any, script: Path) -> dict[str, Recipe]:
    module = load(EVERYTHING)
    common: dict[str, Any] = {"model": MODEL, "config": {"lr": 0.5}, "seed": 5, "name": "job"}
    app = {**common, "app": module.app}
    filters = Filters(server_out=[CastTo("float16")], site_out=[ClipNorm(0.5)])
    return {
        "script": FedAvgRecipe(rounds=2, script=script, argv=["0.5"], aggregator=WeightedMean("steps"), **common),
        "fedavg": FedAvgRecipe(rounds=2, sites_per_round=2, min_updates=1, stop_when="loss > 1e9", best="min loss", **app),
        "fedprox": FedProxRecipe(rounds=2, mu=0.3, within_s=100.0, grace_s=50.0, evaluate=False, **app),
        "fedopt": FedOptRecipe(rounds=2, server_optimizer=Yogi(0.2), filters=filters, **app),
        "cyclic": CyclicRecipe(rounds=2, order="random", **app),
        "fedeval": FedEvalRecipe(cross_site=True, **app),
        "workflow": WorkflowRecipe(run=module.twice, arguments={"rounds": 2, "scale": 0.5}, **app),
    }


@pytest.mark.parametrize("which", ["script", "fedavg", "fedprox", "fedopt", "cyclic", "fedeval", "workflow"])
def test_an_exported_job_gives_the_same_bits(which: str, recipes: dict[str, Recipe], tmp_path: Path) -> None:
    recipe = recipes[which]
    folder = recipe.export(tmp_path / "job")
    again = read_job(folder)
    assert type(again) is type(recipe)
    assert again.arguments_as_data() == recipe.arguments_as_data()
    assert (again.name, again.seed, again.config, again.filters) == (recipe.name, recipe.seed, recipe.config, recipe.filters)
    assert outcome(again, tmp_path / "b") == outcome(recipe, tmp_path / "a")
    twice = again.export(tmp_path / "again")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        assert (twice / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_yaml_toml_and_json_alike(recipes: dict[str, Recipe], tmp_path: Path) -> None:
    says = yaml.safe_load((recipes["fedopt"].export(tmp_path / "yaml") / "job.yaml").read_text())
    recipes["fedopt"].export(tmp_path / "json", format="json")
    shutil.copytree(tmp_path / "yaml", tmp_path / "toml")
    (tmp_path / "toml" / "job.yaml").unlink()
    (tmp_path / "toml" / "job.toml").write_text(tomli_w.dumps(says))
    assert json.loads((tmp_path / "json" / "job.json").read_text()) == says
    bits = [outcome(read_job(tmp_path / format), tmp_path / "runs") for format in ("yaml", "json", "toml")]
    assert bits[0] == bits[1] == bits[2]


def test_a_job_written_by_hand(script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    (folder / "code").mkdir(parents=True)
    shutil.copy(script, folder / "code")
    (folder / "job.toml").write_text("""
        name = "by-hand"
        recipe = "cyclic"
        script = "train.py"
        argv = ["1.0"]
        [arguments]
        rounds = 3
    """)
    recipe = read_job(folder)
    assert isinstance(recipe, CyclicRecipe)
    assert (recipe.rounds, recipe.order, recipe.seed, recipe.model) == (3, "fixed", 0, None)
    assert recipe.sites_run().path == folder.resolve() / "code" / "train.py"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"recipe": "fedsgd"},
            ConfigError,
            r"job.yaml: no recipe 'fedsgd'; there are: cyclic, ditto, fedasync, fedavg, fedbuff, .*, workflow",
        ),
        ({"arguments": {"rounds": 2, "round": 3}}, ConfigError, "job.yaml: .* no argument 'round'"),
        ({"arguments": {}}, ConfigError, "job.yaml: .*missing 1 required .*'rounds'"),
        ({"arguments": {"rounds": 0}}, ConfigError, "rounds=0: it must be a whole number above 0"),
        ({"arguments": {"rounds": 1, "aggregator": {"part": "aggregators", "kind": "mode"}}}, NotInstalled, "no 'mode' among the agg"),
        ({"filters": {"site_out": [{"kind": "clip"}]}}, NotInstalled, "no 'clip' among the filters"),
        ({"filters": {"site": []}}, ConfigError, "job.yaml: .*'site'"),
        ({"script": "../train.py"}, ConfigError, "'../train.py', which lies outside its folder"),
        ({"script": "other.py"}, ConfigError, "other.py', which does not exist"),
        ({"model": "../model.safetensors"}, ConfigError, "lies outside its folder"),
        ({"model": "code/train.py"}, HanseError, "at byte"),
        ({"app": {"file": "net.py", "name": "SIZE"}}, ConfigError, "either app=, an App, or script="),
        ({"script": None, "app": {"file": "net.py", "name": "SIZE"}}, ConfigError, "app is a int: it must be a hanse.App"),
        ({"script": None, "app": {"file": "../../net.py", "name": "app"}}, ConfigError, "lies outside its folder"),
        ({"framework": "torchh"}, NotInstalled, "no adapter 'torchh'"),
    ],
)
def test_what_a_job_may_not_say(change: dict[str, Any], error: type[Exception], says: str, script: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("SIZE = 3\n")
    recipe = FedAvgRecipe(name="a", rounds=1, script=script, argv=["1"], code=[tmp_path / "net.py"], model=MODEL)
    path = recipe.export(tmp_path / "job") / "job.yaml"
    changed = {**yaml.safe_load(path.read_text()), **change}
    path.write_text(yaml.safe_dump({name: value for name, value in changed.items() if value is not None}))
    with pytest.raises(error, match=says):
        read_job(tmp_path / "job")


def test_a_workflows_arguments_are_its_own(load: Any, tmp_path: Path) -> None:
    """Also one that is called as what marks an aggregator in other recipes."""
    module = load(EVERYTHING + "async def flow(cohort, model, *, part, deep): return model\n")
    arguments = {"part": "weights", "deep": {"part": "x", "list": [1, {"part": 2}]}}
    recipe = WorkflowRecipe(name="a", app=module.app, run=module.flow, arguments=arguments)
    again = read_job(recipe.export(tmp_path / "job"))
    assert isinstance(again, WorkflowRecipe)
    assert again.arguments == arguments


def test_it_says_what_is_wrong_with_the_code(tmp_path: Path, load: Any) -> None:
    module = load(EVERYTHING)
    folder = FedEvalRecipe(name="a", app=module.app, model=MODEL).export(tmp_path / "job")
    says = yaml.safe_load((folder / "job.yaml").read_text())
    says["digests"] = {}
    says["app"]["name"] = "train"
    (folder / "job.yaml").write_text(yaml.safe_dump(says))
    with pytest.raises(ConfigError, match="app is a function"):
        read_job(folder)
    assert isinstance(module.app, App)
