"""SCAFFOLD and FedDyn on sites that pull apart: against the papers' formulas, and against the optimum that averaging misses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hanse.aggregation.control_variates import next_control, next_memory
from hanse.app import Site
from hanse.errors import ConfigError
from hanse.messages.codec import read
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.workflows.fedavg import fedavg
from hanse.workflows.feddyn import feddyn
from hanse.workflows.scaffold import scaffold

Vector = np.ndarray[Any, np.dtype[np.float64]]

# Site i minimizes ½ Σ aᵢ (w − bᵢ)²: curved differently in each coordinate, so where local steps end is not where their mean should be.
CURVES = np.array([[1.0, 4.0], [4.0, 1.0], [0.5, 2.0], [2.0, 2.0]])
POINTS = np.array([[0.0, 8.0], [8.0, -8.0], [-4.0, 4.0], [2.0, 0.0]])
OPTIMUM = (CURVES * POINTS).sum(0) / CURVES.sum(0)
START = np.array([1.0, -1.0])
STEPS, RATE = 5, 0.125


def gradient(site: int, w: Vector) -> Vector:
    return np.asarray(CURVES[site] * (w - POINTS[site]))


def plain(model: FLModel, site: Site) -> FLModel:
    w = model.params["w"]
    for _ in range(STEPS):
        w = w - RATE * gradient(site.rank, w)
    return FLModel({"w": w})


def corrected(model: FLModel, site: Site) -> FLModel:
    """SCAFFOLD's Algorithm 1 at the site."""
    x, c = model.params["w"], model.params["control"]["w"]
    c_i = site.state.get("c", np.zeros_like(c))
    y = x
    for _ in range(STEPS):
        y = y - RATE * (gradient(site.rank, y) - c_i + c)
    site.state["c"] = next_control(c_i, c, x, y, way=STEPS * RATE)
    return FLModel({"w": y - x, "control": {"w": site.state["c"] - c_i}}, ParamsType.DIFF)


def regularized(model: FLModel, site: Site) -> FLModel:
    """FedDyn's Algorithm 1 at the site, its minimum found exactly: aᵢ (θ − bᵢ) − g + α (θ − x) = 0."""
    x, alpha = model.params["w"], site.config["feddyn_alpha"]
    memory = site.state.get("memory", np.zeros_like(x))
    a, b = CURVES[site.rank], POINTS[site.rank]
    theta = (a * b + memory + alpha * x) / (a + alpha)
    site.state["memory"] = next_memory(memory, x, theta, alpha=alpha)
    return FLModel({"w": theta - x}, ParamsType.DIFF) if site.config.get("diff") else FLModel({"w": theta})


def test_one_step_by_hand() -> None:
    """x = 1, cᵢ = 2, c = 3, K ηₗ = 0.5, y = 0: 2 − 3 + 1 / 0.5. g = 1, α = 0.5: 1 − 0.5 · (0 − 1)."""
    assert next_control(2.0, 3.0, 1.0, 0.0, way=0.5) == 1.0
    assert next_memory(1.0, 1.0, 0.0, alpha=0.5) == 1.5


def scaffold_reference(rounds: list[list[int]], rate: float) -> tuple[Vector, Vector]:
    """Algorithm 1 of Karimireddy et al., line by line, with the sites of each round given."""
    x, c, own = START, np.zeros(2), np.zeros((4, 2))
    for sites in rounds:
        delta_y, delta_c = [], []
        for i in sites:
            y = x
            for _ in range(STEPS):
                y = y - RATE * (gradient(i, y) - own[i] + c)
            c_plus = own[i] - c + (x - y) / (STEPS * RATE)
            delta_y.append(y - x)
            delta_c.append(c_plus - own[i])
            own[i] = c_plus
        x = x + rate * np.mean(delta_y, axis=0)
        c = c + len(sites) / 4 * np.mean(delta_c, axis=0)
    return x, c


@pytest.mark.parametrize(("count", "rate"), [(None, 1.0), (2, 1.0), (3, 0.5)])
async def test_scaffold_is_the_papers(federate: Any, count: int | None, rate: float) -> None:
    async with federate(corrected) as federation:
        model = FLModel({"w": START})
        last = await scaffold(federation.cohort, model, rounds=4, sites_per_round=count, server_learning_rate=rate)
        events = federation.noted("update")
    asked = [sorted(int(event["site"][5:]) - 1 for event in events if event["round"] == number) for number in range(4)]
    assert all(len(sites) == (count or 4) for sites in asked)
    x, c = scaffold_reference(asked, rate)
    np.testing.assert_allclose(last.params["w"], x, rtol=1e-12)
    np.testing.assert_allclose(last.optimizer_params["control/w"], c, rtol=1e-12)
    assert set(last.params) == {"w"}


def feddyn_reference(rounds: list[list[int]], alpha: float) -> tuple[Vector, Vector]:
    """Algorithm 1 of Acar et al., line by line."""
    theta, h, memory = START, np.zeros(2), np.zeros((4, 2))
    for sites in rounds:
        local = {}
        for k in sites:
            local[k] = (CURVES[k] * POINTS[k] + memory[k] + alpha * theta) / (CURVES[k] + alpha)
            memory[k] = memory[k] - alpha * (local[k] - theta)
        h = h - alpha / 4 * sum((local[k] - theta for k in sites), np.zeros(2))
        theta = np.mean([local[k] for k in sites], axis=0) - h / alpha
    return theta, h


@pytest.mark.parametrize(("count", "diff"), [(None, False), (2, False), (3, True)])
async def test_feddyn_is_the_papers(federate: Any, count: int | None, diff: bool) -> None:
    async with federate(regularized, config={"diff": diff}) as federation:
        last = await feddyn(federation.cohort, FLModel({"w": START}), alpha=0.5, rounds=4, sites_per_round=count)
        events = federation.noted("update")
    asked = [sorted(int(event["site"][5:]) - 1 for event in events if event["round"] == number) for number in range(4)]
    theta, h = feddyn_reference(asked, 0.5)
    np.testing.assert_allclose(last.params["w"], theta, rtol=1e-12)
    np.testing.assert_allclose(last.optimizer_params["h/w"], h, rtol=1e-12)


async def test_averaging_stays_away_from_the_optimum(federate: Any) -> None:
    async with federate(plain) as federation:
        averaged = [(await fedavg(federation.cohort, FLModel({"w": START}), rounds=rounds)).params["w"] for rounds in (60, 80)]
    np.testing.assert_allclose(*averaged, atol=1e-9)  # it is where it will be
    assert np.abs(averaged[0] - OPTIMUM).max() > 0.2


async def test_scaffold_reaches_the_optimum(federate: Any) -> None:
    async with federate(corrected) as federation:
        last = await scaffold(federation.cohort, FLModel({"w": START}), rounds=60, sites_per_round=3)
    np.testing.assert_allclose(last.params["w"], OPTIMUM, atol=1e-6)


async def test_feddyn_reaches_the_optimum(federate: Any) -> None:
    async with federate(regularized) as federation:
        last = await feddyn(federation.cohort, FLModel({"w": START}), alpha=1.0, rounds=60, sites_per_round=3)
    np.testing.assert_allclose(last.params["w"], OPTIMUM, atol=1e-5)


@pytest.mark.parametrize(("function", "algorithm"), [(corrected, scaffold), (regularized, feddyn)])
async def test_it_goes_on_to_the_same_bits(federate: Any, function: Any, algorithm: Any) -> None:
    """The server's part rides in the committed model and the sites' in their states; with one worker or two."""
    settings = {"rounds": 5, "sites_per_round": 3} | ({"alpha": 0.5} if algorithm is feddyn else {})
    start = FLModel({"w": START.astype(np.float32)})
    async with federate(function, workers=1) as federation:
        whole = await algorithm(federation.cohort, start, **settings)
        path = federation.folder.path
    for file in path.iterdir():
        if file.is_file():
            file.unlink()
    async with federate(function, workers=2) as federation:
        half = await algorithm(federation.cohort, start, **(settings | {"rounds": 2}))
        states = dict(federation.sites.states)
    assert half.current_round == 1
    async with federate(function, workers=2, states=states) as federation:
        kept, _ = federation.folder.resume()
        last = await algorithm(federation.cohort, kept, **settings)
    assert last.params["w"].tobytes() == whole.params["w"].tobytes()
    assert last.params["w"].dtype == np.float32


async def test_evaluation_and_the_best_model_are_without_control_variates(federate: Any) -> None:
    from hanse.app import App
    from hanse.workflows.condition import Goal

    app = App()
    app.train(corrected)

    @app.evaluate
    def evaluate(model: FLModel, site: Site) -> dict[str, float]:
        return {"names": len(model.params), "loss": float(np.square(model.params["w"] - OPTIMUM).sum())}

    async with federate(app) as federation:
        last = await scaffold(federation.cohort, FLModel({"w": START}), rounds=3, evaluate=True, best=Goal("min loss"))
        best = read(federation.folder.path / "best.safetensors")[0]
    assert last.metrics["names"] == 1
    assert set(best.params) == {"w"}


async def test_nested_params_and_integers(federate: Any) -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        assert list(model.params["control"]) == ["layer/a~1b"]
        assert model.params["control"]["layer/a~1b"].dtype == np.float32
        return FLModel(
            {"layer": {"a/b": np.ones(2, np.float16), "n": np.array(3)}, "control": {"layer/a~1b": np.full(2, 4.0, np.float32)}},
            ParamsType.DIFF,
        )

    model = FLModel({"layer": {"a/b": np.zeros(2, np.float16), "n": np.array(0)}})
    async with federate(train) as federation:
        last = await scaffold(federation.cohort, model, rounds=2, sites_per_round=2)
    assert last.params["layer"]["a/b"].tolist() == [2.0, 2.0]
    assert last.params["layer"]["n"] == 6
    [control] = last.optimizer_params.values()
    assert control.tolist() == [4.0, 4.0]  # twice 2 / 4 · 4


async def test_running_statistics_have_no_h(federate: Any) -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel({name: np.asarray(array + 1) for name, array in model.params.items()})

    model = FLModel({"w": np.zeros(1), "norm.running_var": np.ones(1), "norm.num_batches_tracked": np.array(0)})
    async with federate(train) as federation:
        last = await feddyn(federation.cohort, model, alpha=0.5, rounds=1)
    assert {name: array.item() for name, array in last.params.items()} == {
        "w": 2.0, "norm.running_var": 2.0, "norm.num_batches_tracked": 1,
    }  # fmt: skip
    assert set(last.optimizer_params) == {"h/w"}


async def test_what_does_not_go(federate: Any) -> None:
    async with federate(plain) as federation:
        with pytest.raises(ConfigError, match="needs a first model"):
            await scaffold(federation.cohort, FLModel(), rounds=1)
        with pytest.raises(ConfigError, match="needs a first model"):
            await feddyn(federation.cohort, FLModel(), alpha=1, rounds=1)
        with pytest.raises(ConfigError, match="named 'control'"):
            await scaffold(federation.cohort, FLModel({"control": START}), rounds=1)
        with pytest.raises(ConfigError, match="above 0"):
            await feddyn(federation.cohort, FLModel({"w": START}), alpha=0, rounds=1)
