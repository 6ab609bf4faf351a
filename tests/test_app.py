from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.update import Record


def site(**changes: Any) -> Site:
    given: dict[str, Any] = {"name": "site-1", "rank": 0, "count": 2, "job_id": "j", "config": {"lr": 0.1}, "state": {}, "seed": 5}
    return Site(**{**given, "stream": ("site", "site-1", "train", 0, 0), **changes})


def test_each_task_has_its_function() -> None:
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel({"w": model.params["w"] * site.config["lr"]}, metrics={"loss": 1.0})

    @app.evaluate
    def evaluate(model: FLModel, site: Site) -> dict[str, float]:
        return {"accuracy": 0.5}

    @app.task("describe")
    def describe(model: FLModel, site: Site) -> FLModel:
        return FLModel(metrics={"rank": site.rank})

    assert app.tasks == ("train", "evaluate", "describe")
    assert app.handles("describe")
    assert not app.handles("submit_model")
    assert app.run("train", FLModel({"w": np.full(1, 2.0)}), site()).params == {"w": np.full(1, 0.2)}
    assert app.run("evaluate", FLModel(), site()).metrics == {"accuracy": 0.5}
    assert app.run("describe", FLModel(), site(rank=1)).metrics == {"rank": 1}
    assert train(FLModel({"w": np.ones(1)}), site()).metrics == {"loss": 1.0}  # it still is a function


def test_a_task_without_a_function_lists_those_there_are() -> None:
    app = App()
    app.train(lambda model, site: FLModel())
    with pytest.raises(ConfigError, match=r"no function for task 'evaluate'; it has 'train'\. Add one with @app\.evaluate"):
        app.run("evaluate", FLModel(), site())
    with pytest.raises(ConfigError, match=r"it has none\. Add one with @app\.task\('describe'\)"):
        App().run("describe", FLModel(), site())


@pytest.mark.parametrize(("task", "answer"), [("train", None), ("train", {"loss": 1.0}), ("evaluate", 0.5), ("describe", {"a": 1.0})])
def test_an_answer_of_the_wrong_kind_names_the_function(task: str, answer: Any) -> None:
    app = App()

    def mine(model: FLModel, site: Site) -> Any:
        return answer

    app.task(task)(mine)
    with pytest.raises(ConfigError, match=f"mine returned a {type(answer).__name__}: .* {task!r} returns an FLModel"):
        app.run(task, FLModel(), site())


def test_one_function_a_task_with_two_arguments() -> None:
    app = App()
    app.train(lambda model, site: FLModel())
    with pytest.raises(ConfigError, match="'train' has a function already"):
        app.train(lambda model, site: FLModel())
    with pytest.raises(ConfigError, match=r"must take \(model, site\)"):
        app.evaluate(lambda model: {})  # type: ignore[arg-type,misc]
    with pytest.raises(ConfigError, match="needs the task's name"):
        app.task(lambda model, site: FLModel())  # type: ignore[arg-type]


def test_random_numbers_belong_to_site_and_task() -> None:
    here = site().rng.random()
    assert here == site().rng.random()
    assert here != site(stream=("site", "site-2", "train", 0, 0)).rng.random()
    assert here != site(seed=6).rng.random()


def test_log() -> None:
    one = site()
    one.log("loss", np.float32(0.5), step=2)
    one.log("note", "hello")
    assert one.records == [Record("loss", 0.5, 2), Record("note", "hello", kind="text")]
    with pytest.raises(ConfigError, match="neither a number nor a text"):
        one.log("x", [1, 2])  # type: ignore[arg-type]


def test_its_module_is_the_one_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its first function was imported from another."""
    (tmp_path / "borrowed.py").write_text("def evaluate(model, site):\n    return {}\n")
    (tmp_path / "owner.py").write_text("from borrowed import evaluate\nfrom hanse import App\n\napp = App()\napp.evaluate(evaluate)\n")
    monkeypatch.syspath_prepend(tmp_path)
    owner = importlib.import_module("owner")
    assert owner.app.module is vars(owner)
