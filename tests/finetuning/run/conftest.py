"""A vendor and a client with data of their own: rows of a table whose columns another device has turned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hanse.environments import SimEnv
from hanse.finetuning.contract import Gate, Learning, Party, Project, Schema, write_project
from hanse.finetuning.init import init
from hanse.finetuning.models import load_module, params_of
from hanse.finetuning.party import app
from hanse.finetuning.recipe import FinetuneRecipe
from hanse.finetuning.versions import Versions
from hanse.messages.codec import write
from hanse.messages.flmodel import FLModel
from hanse.server.run import Run

MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
"""
ROWS = {"acme": {"train": 300, "holdout": 800}, "north": {"train": 40, "test": 200}}


def rows(site: str, section: str) -> dict[str, Any]:
    rng = np.random.default_rng([len(site), len(section)])
    count = ROWS[site][section]
    labels = np.arange(count) % 2
    inputs = rng.normal(size=(count, 6)) + 1.6 * (2 * labels[:, None] - 1) * np.array([1, 1, 0, 0, 0, 0])
    if site == "north":  # its device sees the second column with the other sign
        inputs[:, 1] *= -1
    return {"inputs": inputs.astype(np.float32), "labels": labels, "device": np.array([f"{site}-{row % 2}" for row in range(count)])}


@dataclass(frozen=True)
class Pair:
    """The project folders of both, and where runs go."""

    vendor: Path
    client: Path
    runs: Path

    def recipe(self, **learning: Any) -> FinetuneRecipe:
        """The job under a contract with these terms, which both folders get."""
        project = msgspec.structs.replace(
            Versions(self.vendor).project, learning=Learning(**{"controls": False, "batch_size": 16, **learning})
        )
        for folder in (self.vendor, self.client):
            write_project(folder, project)
        versions = Versions(self.vendor)
        (version,) = versions.list()
        return FinetuneRecipe(
            name="line-3",
            app=app,
            model=versions.params(version),
            project=msgspec.to_builtins(project),
            client="north",
            threshold=version.threshold,
        )

    def env(self, **settings: Any) -> SimEnv:
        config = {"acme": {"finetuning": str(self.vendor)}, "north": {"finetuning": str(self.client)}}
        return SimEnv(sites=["acme", "north"], site_config=config, runs=self.runs, console="quiet", **{"workers": 1, **settings})

    def execute(self, **learning: Any) -> Run:
        return self.recipe(**learning).execute(self.env())


@pytest.fixture(scope="session")
def base_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the vendor has trained on its own device."""
    import torch

    folder = tmp_path_factory.mktemp("base")
    (folder / "model.py").write_text(MODEL)
    module = load_module(
        folder, Project(name="x", vendor=Party(site="a", organisation="A"), clients=[Party(site="b", organisation="B")]).model
    )
    data = rows("acme", "train")
    x, y = torch.from_numpy(data["inputs"]), torch.from_numpy(data["labels"]).float()
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(module(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write(folder / "base.safetensors", FLModel(params_of(module)))
    return folder / "base.safetensors"


@pytest.fixture
def pair(tmp_path: Path, base_weights: Path) -> Pair:
    project = Project(
        name="line-3",
        vendor=Party(site="acme", organisation="Acme Vision"),
        clients=[Party(site="north", organisation="North Clinic")],
        schema=Schema(kind="table", columns=[f"x{number}" for number in range(6)], slices=["device"]),
        gate=Gate(resamples=200, margin_abs=0.05),
    )
    found = Pair(tmp_path / "vendor", tmp_path / "client", tmp_path / "runs")
    init(found.vendor, project, who="vera", code=_code(tmp_path), weights=base_weights)
    write_project(found.client, project)
    (found.client / "model.py").write_text(MODEL)
    for folder, site in ((found.vendor, "acme"), (found.client, "north")):
        for section in ROWS[site]:
            np.savez(folder / f"{section}.npz", **rows(site, section))
        sections = "".join(f"{section}: {{kind: arrays, file: {section}.npz}}\n" for section in ROWS[site])
        (folder / "data.yaml").write_text(sections)
    return found


def _code(folder: Path) -> Path:
    path = folder / "model.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def figures() -> Callable[[Run, str, str], dict[str, float]]:
    """What one party measured of one model."""

    def of(run: Run, what: str, party: str) -> dict[str, float]:
        (found,) = [event for event in run.events("figures") if (event["what"], event["party"]) == (what, party)]
        return dict(found)

    return of
