"""What a patched Lightning trainer receives, does and sends: at simulated sites, and in processes of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hanse.environments import PocEnv, SimEnv
from hanse.errors import ConfigError
from hanse.jobs.evaluate import FedEvalRecipe
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.messages.params import flatten

pytest.importorskip("lightning")
EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning"

# The loss is w · x with x = 1, the step 0.5: each step takes 0.5 off w.
SCRIPT = """
import logging
import warnings
import lightning
import torch
from torch.utils.data import DataLoader

import hanse.adapters.lightning as flare

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Line(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, x, _):
        return (self.w * x).mean()

    def validation_step(self, x, _):
        self.log("w", self.w)
        self.log("not_finite", self.w * torch.inf)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


model, data = Line(), DataLoader(torch.ones(6), batch_size=2)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(LIMIT, accelerator="cpu", devices=1, **quiet)
flare.patch(trainer)
while flare.is_running():
    if VALIDATE or flare.is_evaluate():
        trainer.validate(model, data, verbose=False)
    if flare.is_train():
        trainer.fit(model, data)
"""


def script(folder: Path, limit: str, validate: bool) -> Path:
    path = folder / "train.py"
    path.write_text(SCRIPT.replace("LIMIT", limit).replace("VALIDATE", str(validate)))
    return path


@pytest.mark.parametrize(("limit", "steps"), [("max_epochs=2", 6), ("max_steps=4, max_epochs=-1", 4)])
def test_each_round_begins_with_the_global_model_and_has_all_its_steps(tmp_path: Path, limit: str, steps: int) -> None:
    recipe = FedAvgRecipe(name="a", script=script(tmp_path, limit, True), model={"w": np.array(10.0, np.float32)}, rounds=3, best="min w")
    run = recipe.execute(SimEnv(num_clients=2, runs=tmp_path / "runs", console="quiet"))
    assert [metrics["w"] for metrics in run.metrics] == [10 - 0.5 * steps * round for round in range(3)]
    assert {event["weight"] for event in run.events("update")} == {steps}
    assert all(event["metrics"].keys() == {"w"} for event in run.events("update"))
    assert run.get_result().params["w"] == 10 - 1.5 * steps


def test_without_validation_there_are_no_metrics_and_evaluation_is_a_task(tmp_path: Path) -> None:
    path, env = script(tmp_path, "max_epochs=1", False), SimEnv(num_clients=2, runs=tmp_path / "runs", console="quiet")
    trained = FedAvgRecipe(name="a", script=path, model={"w": np.array(1.0, np.float32)}, rounds=2).execute(env)
    assert [dict(metrics) for metrics in trained.metrics] == [{}, {}]
    scored = FedEvalRecipe(name="b", script=path, model=trained.get_result()).execute(env)
    assert scored.metrics == [{"w": -2.0}]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's `train` module."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    yield importlib.import_module("train")
    sys.modules.pop("train", None)


def test_the_example_has_the_same_bits_in_processes_of_its_own(example: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    recipe = FedAvgRecipe(name="a", script=EXAMPLE / "train.py", model=example.Digits(), rounds=2)
    runs = [
        recipe.execute(env)
        for env in (
            SimEnv(num_clients=2, workers=1, runs=tmp_path / "one", console="quiet"),
            PocEnv(num_clients=2, runs=tmp_path / "poc", console="quiet"),
        )
    ]
    first, second = (flatten(run.get_result().params)[0] for run in runs)
    assert {name: array.tobytes() for name, array in first.items()} == {name: array.tobytes() for name, array in second.items()}
    assert runs[0].metrics == runs[1].metrics
    assert runs[0].metrics[0]["accuracy"] + 0.3 < runs[0].metrics[1]["accuracy"]


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        (object(), "patch got a object: it takes a lightning.Trainer"),
        (SimpleNamespace(fit=None, validate=None, fit_loop=None), "patched already"),
    ],
    ids=["other", "twice"],
)
def test_what_cannot_be_patched(trainer: Any, says: str) -> None:
    patch: Callable[[Any], None] = importlib.import_module("hanse.adapters.lightning").patch
    with pytest.raises(ConfigError, match=says):
        patch(trainer)


def test_several_processes_at_a_site_are_refused() -> None:
    lightning = pytest.importorskip("lightning")

    class Many(lightning.Trainer):  # type: ignore[misc, name-defined]
        world_size = 2

    trainer = Many(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu", devices=1)
    with pytest.raises(ConfigError, match="the trainer runs in 2 processes"):
        importlib.import_module("hanse.adapters.lightning").patch(trainer)
