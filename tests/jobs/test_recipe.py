from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.aggregation.mean import WeightedMean
from hanse.app import App, Site
from hanse.client.script import Script
from hanse.environments import SimEnv
from hanse.errors import ConfigError, NotInstalled
from hanse.filters import ClipNorm, Filters
from hanse.jobs.evaluate import FedEvalRecipe
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.loading import read_job
from hanse.jobs.recipe import WorkflowRecipe
from hanse.messages.codec import write
from hanse.messages.flmodel import FLModel
from hanse.server.run import Run

MODEL = {"w": np.zeros(3, np.float32)}


class OwnMean(WeightedMean):
    """An aggregator that is no entry point."""


class OwnFilter:
    """A filter that is no entry point."""

    def apply(self, model: FLModel, *, reference: FLModel, rng: Any) -> FLModel:
        return model


async def flow(cohort: Any, model: FLModel, *, rounds: int = 1) -> FLModel:
    return model


def here() -> App:
    """An app that no file has a name for."""
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel({"w": model.params["w"] + 1})

    return app


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "a b"}, "name is 'a b': use letters, digits, - and _"),
        ({"name": "../a"}, "name is"),
        ({"name": ""}, "name is ''"),
        ({"name": 3}, "name is 3"),
        ({"app": None}, "either app=, an App, or script="),
        ({"script": __file__}, "either app=, an App, or script="),
        ({"app": len}, "app is a builtin_function_or_method: it must be a hanse.App"),
        ({"app": None, "script": "nowhere.py"}, "script names 'nowhere.py', which does not exist"),
        ({"app": None, "script": 3}, "script names '3', which does not exist"),
        ({"argv": "--epochs 1"}, r"argv is '--epochs 1': give a list of strings, such as \['--epochs', '1'\]"),
        ({"argv": [1]}, r"argv is \[1\]"),
        ({"code": "net.py"}, "code is 'net.py': give a list of strings"),
        ({"code": ["nowhere.py"]}, "code names 'nowhere.py', which does not exist"),
        ({"config": 3}, "config is 3: it must map names to JSON values"),
        ({"config": {3: 1}}, "config is"),
        ({"config": {"a": np.zeros(1)}}, "config must hold JSON values only: Object of type ndarray"),
        ({"filters": [ClipNorm(1.0)]}, r"give Filters\(...\)"),
        ({"seed": -1}, "seed is -1: it must be a whole number from 0"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": True}, "seed is True"),
        ({"model": 3}, "a builtins.int is no model: give named arrays or a model object of"),
        ({"model": [object()]}, "a builtins.object cannot travel"),
        ({"model": "nowhere.safetensors"}, "model names the file 'nowhere.safetensors', which does not exist"),
        ({"model": {"w": object()}}, "params at 'w': a builtins.object cannot travel"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_what_is_wrong_is_an_error_at_once(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WorkflowRecipe(**{"name": "a", "app": here(), "run": flow, "model": MODEL} | wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"run": here}, "run is .*: it must be an async function"),
        ({"arguments": {"round": 3}}, "arguments do not fit flow: got an unexpected keyword argument 'round'"),
        ({"arguments": {"rounds": {3}}}, "arguments must hold JSON values only: Object of type set"),
        ({"arguments": [3]}, "arguments is"),
    ],
)
def test_a_workflow_that_cannot_be_called(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WorkflowRecipe(**{"name": "a", "app": here(), "run": flow} | wrong)


def test_a_framework_that_is_not_installed() -> None:
    with pytest.raises(NotInstalled, match="no adapter 'tensorflow'; installed: "):
        WorkflowRecipe(name="a", app=here(), run=flow, framework="tensorflow")


def test_a_script_that_is_no_python(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("import hanse.client as flare\nflare.init(\n")
    with pytest.raises(ConfigError, match=r"train.py' is not valid Python: .*line 2"):
        WorkflowRecipe(name="a", script=path, run=flow)


def test_more_sites_than_there_are() -> None:
    recipe = FedAvgRecipe(name="a", app=here(), rounds=1, sites_per_round=3, min_updates=2)
    recipe.check_sites(3)
    with pytest.raises(ConfigError, match="sites_per_round=3, and the number of sites is 2"):
        recipe.check_sites(2)
    with pytest.raises(ConfigError, match="min_updates=3, and the number of sites is 2"):
        FedAvgRecipe(name="a", app=here(), rounds=1, min_updates=3).execute(SimEnv(num_clients=2, runs="/nowhere"))


def test_recipes_are_frozen() -> None:
    recipe = FedAvgRecipe(name="a", app=here(), rounds=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rounds = 2  # type: ignore[misc]
    assert dataclasses.replace(recipe, rounds=2).rounds == 2
    with pytest.raises(ConfigError, match="rounds=0"):
        dataclasses.replace(recipe, rounds=0)


def test_a_script_is_run_with_its_arguments(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    recipe = WorkflowRecipe(name="a", script="train.py", argv=["--epochs", "1"], run=flow)
    assert recipe.sites_run() == Script(script, ("--epochs", "1"))


# ------------------------------------------------------------------------------------------------------------------------ the first model


def torch_module() -> Any:
    torch = pytest.importorskip("torch")
    net = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(net.weight)
    torch.nn.init.zeros_(net.bias)
    return net


def sklearn_estimator() -> Any:
    linear_model = pytest.importorskip("sklearn.linear_model")
    return linear_model.LinearRegression().fit([[0.0], [1.0]], [1.0, 3.0])


@pytest.mark.parametrize(
    ("model", "params", "framework"),
    [
        (lambda: None, None, None),
        (lambda: {"w": np.arange(2)}, {"w": [0, 1]}, None),
        (lambda: FLModel({"deep": [np.arange(2), None]}), {"deep": [[0, 1], None]}, None),
        (lambda: FLModel([np.arange(2)]), [[0, 1]], None),
        (torch_module, {"weight": [[1, 1]], "bias": [0]}, "torch"),
        (lambda: torch_module().state_dict(), {"weight": [[1, 1]], "bias": [0]}, "torch"),
        (lambda: FLModel(torch_module().state_dict()), {"weight": [[1, 1]], "bias": [0]}, "torch"),
        (sklearn_estimator, {"coef_": [2], "intercept_": 1}, "sklearn"),
    ],
    ids=["none", "arrays", "nested", "list", "module", "state dict", "FLModel of tensors", "estimator"],
)
def test_a_model_is_taken_by_its_parameters(model: Callable[[], Any], params: Any, framework: str | None) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return np.round(value, 6).tolist() if isinstance(value, np.ndarray) else value

    first, found = WorkflowRecipe(name="a", app=here(), run=flow, model=model()).first_model()
    assert plain(first.params) == params
    assert found == framework


def test_a_named_framework_goes_before_the_models_own() -> None:
    pytest.importorskip("torch")
    assert WorkflowRecipe(name="a", app=here(), run=flow, model=MODEL, framework="torch").first_model()[1] == "torch"


def test_a_model_of_another_run_is_at_its_beginning(tmp_path: Path) -> None:
    """Or there would be no round left to do with it."""
    trained = FLModel({"w": np.arange(3.0)}, metrics={"loss": 1.0}, current_round=9, total_rounds=10, meta={"mine": 1})
    write(tmp_path / "model.safetensors", trained)
    for model in (trained, tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        first, _ = WorkflowRecipe(name="a", app=here(), run=flow, model=model).first_model()
        assert first.params["w"].tolist() == [0, 1, 2]
        assert (first.current_round, first.total_rounds, first.metrics, first.meta) == (None, None, {}, {"mine": 1})
    app = here()
    app.evaluate(lambda model, site: {"sum": float(model.params["w"].sum())})
    run = FedEvalRecipe(name="a", app=app, model=tmp_path / "model.safetensors").execute(
        SimEnv(num_clients=2, runs=tmp_path, console="quiet")
    )
    assert run.metrics == [{"sum": 3.0}]


# ------------------------------------------------------------------------------------------------------------------------------- exporting


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"app": here()}, "the app is defined in no file at module level: put it in a .py file"),
        ({"aggregator": OwnMean()}, "aggregator is a OwnMean, which no job file can describe: register it as an entry point"),
        ({"filters": Filters(site_out=[OwnFilter()])}, "the filter OwnFilter is not registered: no job file can describe it"),
    ],
    ids=["app", "aggregator", "filter"],
)
def test_a_job_that_cannot_be_written_runs_all_the_same(
    change: dict[str, Any], says: str, app: App, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, Any] = {"name": "a", "app": app, "model": MODEL, "rounds": 2}
    recipe = FedAvgRecipe(**{**plain, **change})
    with pytest.raises(ConfigError, match=says):
        recipe.export(tmp_path / "job")
    assert not (tmp_path / "job").exists()
    run = recipe.execute(SimEnv(num_clients=3, runs=tmp_path / "runs", console="plain"))
    assert f"warning: {says[:40]}" in capsys.readouterr().out.replace("\n", " ")
    assert run.get_status() == "completed"
    assert not (run.folder / "job").exists()
    if "app" not in change:
        expected = FedAvgRecipe(**plain).execute(SimEnv(num_clients=3, runs=tmp_path / "runs", console="quiet"))
        assert run.get_result().params["w"].tobytes() == expected.get_result().params["w"].tobytes()


def test_further_code_lies_beside_the_job(load: Any, tmp_path: Path) -> None:
    (tmp_path / "net_of_the_job").mkdir()
    (tmp_path / "net_of_the_job" / "__init__.py").write_text("STEP = 2\n")
    (tmp_path / "train.py").write_text(
        "import hanse.client as flare\nfrom net_of_the_job import STEP\n"
        "flare.init()\nmodel = flare.receive()\nflare.send(flare.FLModel({'w': model.params['w'] + STEP}))\n"
    )
    recipe = FedAvgRecipe(name="a", script=tmp_path / "train.py", code=[tmp_path / "net_of_the_job"], model=MODEL, rounds=2)
    folder = recipe.export(tmp_path / "moved" / "job")
    (tmp_path / "net_of_the_job" / "__init__.py").unlink()
    (tmp_path / "net_of_the_job").rmdir()
    run = read_job(folder).execute(SimEnv(num_clients=2, runs=tmp_path, console="quiet"))
    assert run.get_result().params["w"].tolist() == [4.0] * 3


def test_a_file_that_runs_its_job_when_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "from hanse import App, FedAvgRecipe, SimEnv\napp = App()\napp.train(lambda model, site: model)\n"
        "FedAvgRecipe(name='a', app=app, rounds=1).execute(SimEnv(num_clients=1, runs='runs'))\n"
    )
    (tmp_path / "job" / "code").mkdir(parents=True)
    (tmp_path / "job" / "code" / "job.py").write_text((tmp_path / "job.py").read_text())
    (tmp_path / "job" / "job.yaml").write_text("name: a\nrecipe: fedavg\narguments: {rounds: 1}\napp: {file: job.py, name: app}\n")
    with pytest.raises(ConfigError, match=r'job.py runs a job when it is imported: put that part under `if __name__ == "__main__":`'):
        read_job(tmp_path / "job")


def test_the_run_folder_tells_of_the_recipe(app: App, tmp_path: Path) -> None:
    recipe = FedAvgRecipe(name="a", app=app, model=MODEL, rounds=1, seed=3, aggregator=WeightedMean("equal"))
    run = recipe.execute(SimEnv(num_clients=2, runs=tmp_path, console="quiet"))
    facts = Run(run.folder).facts
    assert facts["job"]["recipe"] == "fedavg"
    assert facts["job"]["arguments"]["aggregator"] == {"part": "aggregators", "kind": "weighted_mean", "by": "equal"}
    assert facts["seed"] == 3
    assert facts["digests"].keys() == {"job.yaml", "model.safetensors", f"code/{Path(app.module['__file__']).name}"}
