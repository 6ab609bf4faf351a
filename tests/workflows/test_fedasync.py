"""FedAsync on real sites, against Algorithm 1 of Xie et al., 2019, written out in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site
from hanse.environments import SimEnv
from hanse.errors import ConfigError
from hanse.jobs.asynchronous import FedAsyncRecipe
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.server.run import Run
from hanse.simulation.clock import Devices
from hanse.workflows.fedasync import fedasync

START = np.array([0.0, 4.0])
SECONDS = {"site-1": 1.0, "site-2": 2.5}


def trained(rank: int, x: Any) -> Any:
    return x + 0.5 * (np.array([8.0, -2.0]) * (rank + 1) - x)


full, diffs = App(), App()


@full.train
def train(model: FLModel, site: Site) -> FLModel:
    return FLModel({"w": trained(site.rank, model.params["w"])}, metrics={"mu": site.config.get("proximal_mu", 0.0)})


@diffs.train
def train_diff(model: FLModel, site: Site) -> FLModel:
    return FLModel({"w": trained(site.rank, model.params["w"]) - model.params["w"]}, ParamsType.DIFF)


def execute(folder: Path, *, workers: int = 2, **settings: Any) -> Run:
    recipe = FedAsyncRecipe(name="job", model={"w": START}, rounds=8, best="min loss", **{"app": full, **settings})
    env = SimEnv(num_clients=2, devices=Devices(seconds=SECONDS), workers=workers, runs=folder, console="quiet")
    return recipe.execute(env)


@pytest.mark.parametrize("app", [full, diffs])
def test_algorithm_1_by_hand(app: App, tmp_path: Path) -> None:
    """The first site answers at 1, 2, 3, …, the second at 2.5, 5, 7.5."""
    run = execute(tmp_path, app=app, alpha=0.5, staleness="polynomial 1")
    events = [(event["site"], event["staleness"], event["virtual_s"]) for event in run.events("update")]
    assert events == [
        ("site-1", 0, 1.0), ("site-1", 0, 2.0), ("site-2", 2, 2.5), ("site-1", 1, 3.0),
        ("site-1", 0, 4.0), ("site-1", 0, 5.0), ("site-2", 3, 5.0), ("site-1", 0, 6.0),
    ]  # fmt: skip
    x = [START]
    for rank, tau in ((0, 0), (0, 1), (1, 0), (0, 2), (0, 4), (0, 5), (1, 3), (0, 7)):  # the site, and the version it began with
        alpha_t = 0.5 / (len(x) - 1 - tau + 1)
        x.append((1 - alpha_t) * x[-1] + alpha_t * trained(rank, x[tau]))
    np.testing.assert_allclose(run.get_result().params["w"], x[-1], rtol=1e-12)


def test_the_same_bits_for_any_number_of_workers(tmp_path: Path) -> None:
    one, two = (execute(tmp_path, workers=workers) for workers in (1, 2))
    assert (one.folder / "model.safetensors").read_bytes() == (two.folder / "model.safetensors").read_bytes()


def test_mu_reaches_the_sites(tmp_path: Path) -> None:
    assert {metrics["mu"] for metrics in execute(tmp_path, mu=0.25).metrics} == {0.25}


async def test_a_wrong_alpha() -> None:
    with pytest.raises(ConfigError, match=r"alpha is 1\.5"):
        await fedasync(None, FLModel(), rounds=1, alpha=1.5)  # type: ignore[arg-type]
