from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site
from hanse.errors import TooFewUpdates
from hanse.messages.codec import read
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.cyclic import cyclic

ZERO = FLModel({"w": np.zeros(1)})


def train(model: FLModel, site: Site) -> FLModel:
    """w becomes 2 w + the site's number: which order was taken shows in the result."""
    w = model.params["w"]
    metrics = {"before": float(w[0])}
    if site.config.get("diff"):
        return FLModel({"w": w + site.rank + 1}, ParamsType.DIFF, metrics=metrics)
    return FLModel({"w": 2 * w + site.rank + 1}, metrics=metrics)


@pytest.mark.parametrize("diff", [False, True])
async def test_each_site_trains_what_the_one_before_made(federate: Any, diff: bool) -> None:
    """0, 1, 2·1 + 2 = 4, 2·4 + 3 = 11; then 23, 48, 99."""
    async with federate(train, sites=3, config={"diff": diff}) as federation:
        model = await cyclic(federation.cohort, ZERO, rounds=2)
        assert [event["site"] for event in federation.noted("update")] == ["site-1", "site-2", "site-3"] * 2
        assert [event["metrics"]["before"] for event in federation.noted("round")] == [(0 + 1 + 4) / 3, (11 + 23 + 48) / 3]
        assert [(event["good"], event["asked"]) for event in federation.noted("round")] == [(3, 3)] * 2
    assert model.params["w"].tolist() == [99.0]
    assert (model.current_round, model.total_rounds) == (1, 2)


async def test_a_model_goes_on_as_the_site_sent_it(federate: Any) -> None:
    """To the last bit: nothing is multiplied by its weight and divided again."""
    sent = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    async with federate(lambda model, site: FLModel({"w": sent}, meta={"examples": 3}), sites=1) as federation:
        model = await cyclic(federation.cohort, FLModel(), rounds=1)
    np.testing.assert_array_equal(model.params["w"], sent)


async def test_sites_see_round_and_config(federate: Any) -> None:
    def spy(model: FLModel, site: Site) -> FLModel:
        seen = {"round": model.current_round, "total": model.total_rounds, "rate": site.config["rate"]}
        return FLModel(model.params, metrics=seen)

    async with federate(spy, sites=2) as federation:
        await cyclic(federation.cohort, ZERO, rounds=2, config={"rate": 0.5})
        assert [event["metrics"] for event in federation.noted("round")] == [{"round": n, "total": 2, "rate": 0.5} for n in range(2)]


async def test_a_random_order_is_shuffled_anew_and_the_seeds_own(federate: Any, tmp_path: Path) -> None:
    async def orders(seed: int) -> list[tuple[str, ...]]:
        (tmp_path / "commit.safetensors").unlink(missing_ok=True)
        async with federate(train, sites=5, seed=seed) as federation:
            await cyclic(federation.cohort, ZERO, rounds=3, order="random")
            updates = federation.noted("update")
            return [tuple(event["site"] for event in updates if event["round"] == number) for number in range(3)]

    first = await orders(1)
    assert all(sorted(order) == [f"site-{n}" for n in range(1, 6)] for order in first)
    assert len(set(first)) > 1
    assert await orders(1) == first
    assert await orders(2) != first


async def test_who_fails_is_passed_over(federate: Any) -> None:
    def mostly(model: FLModel, site: Site) -> FLModel:
        if site.rank == 1:
            raise ValueError("no data")
        return train(model, site)

    async with federate(mostly, sites=3) as federation:
        model = await cyclic(federation.cohort, ZERO, rounds=1, min_updates=2)
        assert model.params["w"].tolist() == [5.0]
        with pytest.raises(TooFewUpdates, match="round 2: 2 of 3 sites trained, 3 needed") as caught:
            await cyclic(federation.cohort, model, rounds=2)
        assert caught.value.reasons.keys() == {"site-2"}
        assert "no data" in caught.value.reasons["site-2"]


async def test_who_is_late_is_passed_over(federate: Any) -> None:
    never, writer = os.pipe()

    def stuck(model: FLModel, site: Site) -> FLModel:
        if site.rank == 0:
            os.read(never, 1)
        return train(model, site)

    async with federate(stuck, sites=2, workers=1) as federation:
        model = await cyclic(federation.cohort, ZERO, rounds=1, min_updates=1, within_s=0.5)
        assert [(event["site"], event["code"]) for event in federation.noted("failure")] == [("site-1", "DeadlineExceeded")]
    assert model.params["w"].tolist() == [2.0]
    os.close(never)
    os.close(writer)


async def test_with_evaluate_the_rounds_last_model_is_scored_and_the_best_kept(federate: Any, tmp_path: Path) -> None:
    app = App()
    app.train(lambda model, site: FLModel({"w": model.params["w"] + 1}))
    app.evaluate(lambda model, site: {"loss": float((model.params["w"][0] - 4) ** 2)})
    async with federate(app, sites=2) as federation:
        model = await cyclic(
            federation.cohort, ZERO, rounds=9, evaluate=True, best=Goal("min loss"), stop_when=Condition("loss > 3"), min_updates=2
        )
        assert [event["metrics"]["loss"] for event in federation.noted("round")] == [4.0]
        model = await cyclic(federation.cohort, model, rounds=3, evaluate=True, best=Goal("min loss"))
        assert [event["metrics"]["loss"] for event in federation.noted("round")] == [4.0, 0.0, 4.0]
    assert model.params["w"].tolist() == [6.0]
    assert read(tmp_path / "best.safetensors")[0].params["w"].tolist() == [4.0]


async def test_a_model_the_first_site_brings(federate: Any) -> None:
    def bring(model: FLModel, site: Site) -> FLModel:
        return FLModel({"w": np.ones(1) if model.params is None else model.params["w"] * 3})

    async with federate(bring, sites=3) as federation:
        model = await cyclic(federation.cohort, FLModel(), rounds=1)
    assert model.params["w"].tolist() == [9.0]
