"""On real sites, against the papers' formulas written out in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.server_optimizer import SGD, Adagrad, Adam, ServerOptimizer, Yogi
from hanse.app import App, Site
from hanse.errors import TooFewUpdates
from hanse.messages.codec import read
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.workflows.condition import Condition, Goal
from hanse.workflows.fedavg import fedavg

Vector = np.ndarray[Any, np.dtype[np.float64]]
START = np.array([0.0, 4.0])
WEIGHTS = [1, 3]  # the two sites' examples


def step_at(rank: int, w: Vector) -> Vector:
    """What site `rank` adds to w in a round: part of the way to a point of its own. Powers of two, so float64 is exact for a while."""
    return 0.5 * (np.array([8.0, -2.0]) * (rank + 1) - w)


def train(model: FLModel, site: Site) -> FLModel:
    w = model.params["w"]
    diff = step_at(site.rank, w)
    examples = {"examples": WEIGHTS[site.rank]}
    if site.config.get("diff"):
        return FLModel({"w": diff}, ParamsType.DIFF, meta=examples)
    return FLModel({"w": w + diff}, meta=examples)


def mean_step(w: Vector) -> Vector:
    """The weighted mean of the sites' steps: the Δ of Reddi et al."""
    return sum((n * step_at(rank, w) for rank, n in enumerate(WEIGHTS)), np.zeros(2)) / sum(WEIGHTS)


def run_rounds(rounds: int, update: Callable[[int, Vector, Vector], Vector]) -> Vector:
    w = START
    for number in range(rounds):
        w = update(number, w, mean_step(w))
    return w


def fedavg_reference(rounds: int) -> Vector:
    return run_rounds(rounds, lambda _, w, delta: w + delta)


def momentum_reference(rounds: int) -> Vector:
    state = {"m": np.zeros(2)}

    def update(_: int, w: Vector, delta: Vector) -> Vector:
        state["m"] = 0.9 * state["m"] + delta
        return w + 0.5 * state["m"]

    return run_rounds(rounds, update)


def adaptive_reference(kind: str, rounds: int) -> Vector:
    """Algorithm 2 of Reddi et al. (ICLR 2021), line by line; learning rate 0.1, the rest as by default."""
    beta1, beta2, tau = (0.0 if kind == "adagrad" else 0.9), 0.99, 1e-3
    m, v = np.zeros(2), np.full(2, tau**2)
    w = START
    for _ in range(rounds):
        delta = mean_step(w)
        m = beta1 * m + (1 - beta1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "adam":
            v = beta2 * v + (1 - beta2) * delta**2
        else:
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        w = w + 0.1 * m / (np.sqrt(v) + tau)
    return w


@pytest.mark.parametrize("diff", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (None, fedavg_reference(3)),
        (SGD(0.5, momentum=0.9), momentum_reference(3)),
        (Adagrad(0.1), adaptive_reference("adagrad", 3)),
        (Adam(0.1), adaptive_reference("adam", 3)),
        (Yogi(0.1), adaptive_reference("yogi", 3)),
    ],
    ids=["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"],
)
async def test_three_rounds_as_the_papers_have_them(federate: Any, optimizer: ServerOptimizer | None, expected: Vector, diff: bool) -> None:
    async with federate(train, sites=2, config={"diff": diff}) as federation:
        model = await fedavg(federation.cohort, FLModel({"w": START}), rounds=3, server_optimizer=optimizer)
    np.testing.assert_allclose(model.params["w"], expected, rtol=1e-14)
    assert (model.current_round, model.total_rounds) == (2, 3)


async def test_one_round_by_hand(federate: Any) -> None:
    """site-1: w + ½ (8 - 0, -2 - 4) = (4, 1); site-2: (8, 0); (1 · (4, 1) + 3 · (8, 0)) / 4 = (7, ¼)."""
    async with federate(train, sites=2) as federation:
        model = await fedavg(federation.cohort, FLModel({"w": START}), rounds=1)
    assert model.params["w"].tolist() == [7.0, 0.25]


async def test_moments_are_kept_for_the_next_round_and_sent_to_nobody(federate: Any) -> None:
    def spy(model: FLModel, site: Site) -> FLModel:
        assert not model.optimizer_params
        return train(model, site)

    async with federate(spy, sites=2) as federation:
        half = await fedavg(federation.cohort, FLModel({"w": START}), rounds=2, server_optimizer=Adam(0.1))
        whole = await fedavg(federation.cohort, half, rounds=5, server_optimizer=Adam(0.1))
        assert [event["round"] for event in federation.noted("round")] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(whole.params["w"], adaptive_reference("adam", 5), rtol=1e-14)


async def test_fedprox_rides_in_the_task(federate: Any) -> None:
    """A site takes two steps of 0.1 on ½ (w - c)² + mu/2 (w - wᵗ)²."""
    mu, rate = 0.5, 0.1

    def proximal(model: FLModel, site: Site) -> FLModel:
        assert (model.current_round, model.total_rounds) == (0, 1)
        w, start = model.params["w"], model.params["w"]
        for _ in range(2):
            w = w - rate * ((w - site.rank) + site.config["proximal_mu"] * (w - start))
        return FLModel({"w": w})

    async with federate(proximal, sites=3, config={"proximal_mu": 99.0}) as federation:
        model = await fedavg(federation.cohort, FLModel({"w": np.array([2.0])}), rounds=1, config={"proximal_mu": mu})
    ends = []
    for center in range(3):
        first = 2.0 - rate * (2.0 - center)
        ends.append(first - rate * ((first - center) + mu * (first - 2.0)))
    np.testing.assert_allclose(model.params["w"], [sum(ends) / 3], rtol=1e-14)


async def test_a_model_the_sites_bring(federate: Any) -> None:
    def bring(model: FLModel, site: Site) -> FLModel:
        start = np.zeros(1) if model.params is None else model.params["w"]
        return FLModel({"w": start + site.rank})

    async with federate(bring, sites=3) as federation:
        model = await fedavg(federation.cohort, FLModel(), rounds=2)
    assert model.params["w"].tolist() == [2.0]


async def test_another_aggregator(federate: Any) -> None:
    async with federate(train, sites=2) as federation:
        model = await fedavg(federation.cohort, FLModel({"w": START}), rounds=1, aggregator=WeightedMean({"site-1": 3.0, "site-2": 1.0}))
    assert model.params["w"].tolist() == [5.0, 0.75]


async def test_sites_are_drawn_anew_each_round(federate: Any, tmp_path: Any) -> None:
    async def drawn(seed: int) -> list[set[str]]:
        (tmp_path / "commit.safetensors").unlink(missing_ok=True)
        async with federate(lambda model, site: FLModel({"w": model.params["w"]}), sites=6, seed=seed) as federation:
            await fedavg(federation.cohort, FLModel({"w": START}), rounds=6, sites_per_round=2)
            assert all((event["good"], event["asked"]) == (2, 2) for event in federation.noted("round"))
            return [{event["site"] for event in federation.noted("update") if event["round"] == number} for number in range(6)]

    first = await drawn(1)
    assert all(len(sites) == 2 for sites in first)
    assert len({frozenset(sites) for sites in first}) > 1
    assert await drawn(1) == first
    assert await drawn(2) != first


# The number in this model grows by 1 each round; its score is best, 0, where it is 2.

counting = App()


@counting.train
def count(model: FLModel, site: Site) -> FLModel:
    return FLModel({"w": model.params["w"] + 1}, metrics=score(model, site))


def score(model: FLModel, site: Site) -> dict[str, float]:
    return {"score": -float((model.params["w"][0] - 2) ** 2)}


scoring = App()
scoring.train(lambda model, site: FLModel({"w": model.params["w"] + 1}, metrics={"train_loss": 1.0}))
scoring.evaluate(score)


@pytest.mark.parametrize(
    ("app", "evaluate", "scores", "best_round"),
    [(counting, False, [-4.0, -1.0, 0.0, -1.0], 2), (scoring, True, [-1.0, 0.0, -1.0, -4.0], 1)],
    ids=["the model received", "the new model"],
)
async def test_the_best_is_the_model_that_was_scored(
    federate: Any, tmp_path: Any, app: App, evaluate: bool, scores: list[float], best_round: int
) -> None:
    async with federate(app, sites=2) as federation:
        last = await fedavg(federation.cohort, FLModel({"w": np.zeros(1)}), rounds=4, evaluate=evaluate, best=Goal("max score"))
        assert [event["metrics"]["score"] for event in federation.noted("round")] == scores
        assert federation.folder.best is not None
        assert federation.folder.best.round == best_round
        if evaluate:
            assert all(event["metrics"]["train_loss"] == 1.0 for event in federation.noted("round"))
    assert last.params["w"].tolist() == [4.0]
    assert read(tmp_path / "best.safetensors")[0].params["w"].tolist() == [2.0]


async def test_it_stops_early(federate: Any) -> None:
    async with federate(counting, sites=2) as federation:
        model = await fedavg(federation.cohort, FLModel({"w": np.zeros(1)}), rounds=9, stop_when=Condition("score >= 0"))
        assert federation.noted("message")[-1]["level"] == "info"
    assert (model.current_round, model.params["w"].tolist(), model.metrics) == (2, [3.0], {"score": 0.0})


async def test_a_metric_to_stop_by_that_never_comes_is_told_once(federate: Any) -> None:
    async with federate(counting, sites=2) as federation:
        await fedavg(federation.cohort, FLModel({"w": np.zeros(1)}), rounds=3, stop_when=Condition("acuracy >= 0"))
        (said,) = federation.noted("message")
        assert (said["round"], said["level"]) == (0, "warning")
        assert said["text"] == "'acuracy >= 0' is no reason to stop: there is no metric 'acuracy', only score"


async def test_the_round_goes_on_while_enough_are_left(federate: Any) -> None:
    def mostly(model: FLModel, site: Site) -> FLModel:
        if site.rank == model.current_round:
            raise ValueError("no data")
        return FLModel({"w": np.full(1, float(site.rank))})

    async with federate(mostly, sites=3) as federation:
        model = await fedavg(federation.cohort, FLModel({"w": np.zeros(1)}), rounds=2, min_updates=2)
        assert model.params["w"].tolist() == [1.0]
        assert [(event["round"], event["site"]) for event in federation.noted("failure")] == [(0, "site-1"), (1, "site-2")]
        with pytest.raises(TooFewUpdates) as caught:
            await fedavg(federation.cohort, model, rounds=3)
        assert caught.value.reasons.keys() == {"site-3"}


async def test_deadlines_reach_training_and_scoring(federate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with federate(scoring, sites=2) as federation:
        asked = []
        reduce = federation.cohort.reduce

        async def spy(task: Any, aggregator: Any, **how: Any) -> Any:
            asked.append((task.name, {name: how[name] for name in ("within_s", "grace_s", "min_updates")}))
            return await reduce(task, aggregator, **how)

        monkeypatch.setattr(federation.cohort, "reduce", spy)
        how = {"within_s": 50.0, "grace_s": 40.0, "min_updates": 1}
        await fedavg(federation.cohort, FLModel({"w": np.zeros(1)}), rounds=1, evaluate=True, **how)
        assert asked == [("train", how), ("evaluate", how)]
