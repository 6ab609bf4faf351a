"""Jobs that are run in more than one environment, and what must be left of them."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hanse.messages.params import flatten
from hanse.server.run import Run

DIGITS = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from hanse import App, FLModel

app = App()


def net():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits(site):
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[site.rank :: site.count] / 16, dtype=torch.float32), torch.tensor(y[site.rank :: site.count])


@app.train
def train(model, site):
    x, y = digits(site)
    local = net()
    local.load_state_dict(model.params)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1, momentum=0.9)
    if "optimizer" in site.state:
        for p, momentum in zip(local.parameters(), site.state["optimizer"]):
            optimizer.state[p]["momentum_buffer"] = torch.tensor(momentum)
    for rows in torch.randperm(len(y)).split(32):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(local(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    site.state["optimizer"] = [optimizer.state[p]["momentum_buffer"].numpy() for p in local.parameters()]
    return FLModel(params=local.state_dict(), metrics={"loss": loss}, meta={"examples": len(y)})


@app.evaluate
def evaluate(model, site):
    x, y = digits(site)
    local = net()
    local.load_state_dict(model.params)
    with torch.no_grad():
        return {"accuracy": (local(x).argmax(1) == y).float().mean().item()}
"""


@pytest.fixture
def digits(load: Callable[[str], Any]) -> Any:
    """A module with a PyTorch network, `net`, and an `app` that trains it on handwritten digits; sites keep their momentum."""
    return load(DIGITS)


@pytest.fixture
def check_same() -> Callable[[Run, Run], None]:
    """Checks that two runs have the same models and metrics, to the last bit."""

    def check(one: Run, other: Run) -> None:
        models = [flatten(run.get_result().params)[0] for run in (one, other)]
        assert models[0].keys() == models[1].keys()
        for name, array in models[0].items():
            there = models[1][name]
            assert (array.dtype, array.shape) == (there.dtype, there.shape)
            assert np.asarray(array).tobytes() == np.asarray(there).tobytes(), name
        assert one.metrics == other.metrics
        assert _updates(one) == _updates(other)

    return check


def _updates(run: Run) -> list[str]:
    """What the sites' updates said, without the order and the time that they took."""
    events = ({name: value for name, value in event.items() if name != "seconds"} for event in run.events("update"))
    return sorted(json.dumps(event, sort_keys=True) for event in events)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary folders are made in."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def clean(temporary: Path) -> Iterator[None]:
    """Afterwards no process is left below this one, and no temporary file."""
    yield
    gc.collect()
    assert [process for process in psutil.Process().children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE] == []
    assert list(temporary.glob("hanse-*")) == []
