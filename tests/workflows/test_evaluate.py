from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site
from hanse.errors import TooFewUpdates
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.workflows.evaluate import SERVER, cross_site_evaluation, federated_evaluation

MODEL = FLModel({"w": np.array([10.0])}, optimizer_params={"m": np.ones(1)}, meta={"mine": 1})


def evaluate(model: FLModel, site: Site) -> FLModel:
    """How far the model is from the site's own number; site-3 has no data for a model above 100."""
    if site.rank == 2 and model.params["w"][0] > 100:
        raise ValueError("no data")
    return FLModel(metrics={"far": float(abs(model.params["w"][0] - site.rank))}, meta={"examples": site.rank + 1})


async def test_every_site_scores_the_model_and_it_comes_back_as_it_was(federate: Any) -> None:
    """(1 · 10 + 2 · 9 + 3 · 8) / 6."""
    app = App()
    app.task("evaluate")(evaluate)
    async with federate(app, sites=3) as federation:
        model = await federated_evaluation(federation.cohort, MODEL)
        assert [event["metrics"] for event in federation.noted("update")] == [{"far": 10.0}, {"far": 9.0}, {"far": 8.0}]
        [event] = federation.noted("round")
        assert (event["asked"], event["good"]) == (3, 3)
    assert model.metrics == {"far": 52 / 6}
    assert (model.params["w"].tolist(), model.meta) == ([10.0], {"mine": 1})


async def test_who_cannot_score_it(federate: Any) -> None:
    app = App()
    app.task("evaluate")(evaluate)
    async with federate(app, sites=3) as federation:
        large = FLModel({"w": np.array([200.0])})
        model = await federated_evaluation(federation.cohort, large, min_updates=2)
        assert model.metrics == {"far": (200 + 2 * 199) / 3}
    async with federate(app, sites=3) as federation:
        with pytest.raises(TooFewUpdates, match="task 'evaluate': 2 good updates of 3 asked"):
            await federated_evaluation(federation.cohort, large)


async def test_every_model_at_every_site(federate: Any) -> None:
    """site-1 has a model 0; site-2 says that its own is the job's less 5; the others have none that fits."""
    app = App()
    app.task("evaluate")(evaluate)

    @app.task("submit_model")
    def submit(model: FLModel, site: Site) -> FLModel:
        if site.rank == 2:
            raise ValueError("none here")
        if site.rank == 3:
            return FLModel({"other": np.zeros(1)})
        if site.rank == 4:
            return FLModel(metrics={"x": 1.0})
        if site.rank == 1:
            return FLModel({"w": np.array([-5.0])}, ParamsType.DIFF)
        return FLModel({"w": np.zeros(1)})

    async with federate(app, sites=5) as federation:
        model = await cross_site_evaluation(federation.cohort, MODEL)
        [event] = federation.noted("cross_site")
        failures = [(failure["site"], failure["task"]) for failure in federation.noted("failure")]
        assert failures == [("site-3", "submit_model"), ("site-4", "submit_model")]
        [committed] = federation.noted("round")
    rows = {SERVER: 10, "site-1": 0, "site-2": 5}
    assert event["scores"] == {
        name: {f"site-{rank + 1}": {"far": float(abs(value - rank))} for rank in range(5)} for name, value in rows.items()
    }
    assert model.metrics == committed["metrics"] == {"far": 110 / 15}  # (1 · 10 + 2 · 9 + 3 · 8 + 4 · 7 + 5 · 6) / 15
    assert model.params["w"].tolist() == [10.0]


async def test_a_model_that_one_site_cannot_score(federate: Any) -> None:
    app = App()
    app.task("evaluate")(evaluate)
    app.task("submit_model")(lambda model, site: FLModel({"w": np.full(1, 100.0 * site.rank + 50)}))
    async with federate(app, sites=3) as federation:
        await cross_site_evaluation(federation.cohort, MODEL, min_updates=2)
        [event] = federation.noted("cross_site")
    assert {name: len(row) for name, row in event["scores"].items()} == {SERVER: 3, "site-1": 3, "site-2": 2, "site-3": 2}


async def test_sites_models_without_one_of_the_jobs(federate: Any) -> None:
    app = App()
    app.task("evaluate")(evaluate)
    app.task("submit_model")(lambda model, site: FLModel({"w": np.full(1, float(site.rank))}))
    async with federate(app, sites=2) as federation:
        await cross_site_evaluation(federation.cohort, FLModel())
        [event] = federation.noted("cross_site")
        assert federation.noted("round")[0]["metrics"] == {}
    assert event["scores"] == {
        "site-1": {"site-1": {"far": 0.0}, "site-2": {"far": 1.0}},
        "site-2": {"site-1": {"far": 1.0}, "site-2": {"far": 0.0}},
    }
