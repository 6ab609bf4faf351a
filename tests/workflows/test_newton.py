from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from hanse.analytics import table_app
from hanse.app import Site
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.workflows.newton import logistic_newton


def data() -> tuple[np.ndarray, np.ndarray]:
    """Columns of very different size, labels with noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4)) * [1, 1e4, 1e-3, 5] + [0, 1e4, 0, -3]
    chance = 1 / (1 + np.exp(-(x @ [1.0, 1e-4, -1e3, 0.2] - 0.5)))
    return x, (rng.random(600) < chance).astype(int)


def load(site: Site) -> dict[str, np.ndarray]:
    """Sites of very different size too."""
    x, y = (np.split(part, [40, 400])[site.rank] for part in data())
    return {"first": x[:, 0], "others": x[:, 1:], "ill": y}


@pytest.mark.parametrize("ridge", [0.0, 0.5])
async def test_it_is_the_pooled_fit(federate: Any, ridge: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = data()
    theirs = linear.LogisticRegression(C=1 / ridge if ridge else np.inf, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x, y)
    async with federate(table_app(load), sites=3) as federation:
        found = await logistic_newton(federation.cohort, FLModel(), features=["first", "others"], target="ill", ridge=ridge)
        losses = [event["metrics"]["loss"] for event in federation.noted("round")]
    assert_allclose(found.params["coef_"], theirs.coef_, rtol=1e-6)
    assert_allclose(found.params["intercept_"], theirs.intercept_, rtol=1e-6)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(np.log(2))
    assert len(losses) < 10
    assert found.metrics["gap"] <= 1e-9


async def test_a_step_too_long_is_halved(federate: Any) -> None:
    """From far out, where the Hessian is nearly nothing, the plain step makes the loss larger."""
    model = FLModel({"coef_": np.array([[3.0]]), "intercept_": np.array([0.0])})

    def one(site: Site) -> dict[str, np.ndarray]:
        x, y = data()
        return {"x": x[site.rank :: 2, 0], "y": y[site.rank :: 2]}

    found = []
    for start in (model, FLModel()):
        async with federate(table_app(one), sites=2) as federation:
            for file in federation.folder.path.glob("commit*"):
                file.unlink()
            found.append(await logistic_newton(federation.cohort, start, features=["x"], target="y", rounds=60))
            losses = [event["metrics"]["loss"] for event in federation.noted("round")]
        if start is model:
            assert max(losses[1:]) > losses[0]  # it was halved
    assert_allclose(found[0].params["coef_"], found[1].params["coef_"], rtol=1e-6)


async def test_labels_that_a_line_parts_need_ridge(federate: Any) -> None:
    def parted(site: Site) -> dict[str, np.ndarray]:
        x = np.arange(-30.0, 31.0)[site.rank :: 2]
        return {"x": x, "y": x > 0.5}

    async with federate(table_app(parted), sites=2) as federation:
        with pytest.raises(ConfigError, match=r"no inverse.*give ridge"):
            await logistic_newton(federation.cohort, FLModel(), features=["x"], target="y", rounds=60, tolerance=1e-300)
    async with federate(table_app(parted), sites=2) as federation:
        for file in federation.folder.path.glob("commit*"):
            file.unlink()
        found = await logistic_newton(federation.cohort, FLModel(), features=["x"], target="y", ridge=1.0)
    assert found.metrics["gap"] <= 1e-9
