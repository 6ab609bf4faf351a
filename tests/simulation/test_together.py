"""Sites that a worker trains many at once: the numbers of the plain loop but for rounding, and the same bits for any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.aggregation.mean import WeightedMean
from hanse.app import App, Site
from hanse.cohort import fold_group
from hanse.environments import SimEnv
from hanse.errors import JobFailed
from hanse.filters import ClipNorm, Filters
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task
from hanse.messages.update import Columns, Update
from hanse.server.run import Run
from hanse.simulation.together import fold_together, joined
from hanse.site.runner import Stacked

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from hanse.adapters.local_sgd import LocalSGD  # noqa: E402

SITES = 150
FAILING = "site-007"


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def data(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    if site.name == FAILING and site.config.get("fails"):
        raise OSError("no disk")
    if site.config.get("prints"):
        print("data of", site.name)
    rng = np.random.default_rng(site.rank)
    count = 5 + site.rank % 7
    x = rng.standard_normal((count, 6), np.float32)
    if site.name == FAILING and site.config.get("diverges"):
        x *= np.inf
    return torch.from_numpy(x), torch.from_numpy(rng.integers(3, size=count))


plain, stacked = App(), App()
settings: dict[str, Any] = {"module": net, "data": data, "lr": 0.3, "momentum": 0.5, "batch_size": 4, "epochs": 2}
plain.train(LocalSGD(**settings, stacked=False))
stacked.train(LocalSGD(**settings))

Execute = Callable[..., Run]


@pytest.fixture
def execute(tmp_path: Path) -> Execute:
    def execute(app: App, workers: int = 1, **changes: Any) -> Run:
        recipe = FedAvgRecipe(name="job", app=app, model=net(), rounds=3, sites_per_round=60, best="min loss", seed=4)
        env = SimEnv(num_clients=SITES, runs=tmp_path / "runs", console="quiet", workers=workers)
        return replace(recipe, **changes).execute(env)

    return execute


def bits(run: Run) -> bytes:
    return (run.folder / "model.safetensors").read_bytes()


def assert_agree(one: Run, other: Run) -> None:
    """But for rounding, and not to the bit: else nothing was trained together."""
    ours, theirs = one.get_result().params, other.get_result().params
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    assert bits(one) != bits(other)
    assert [metrics["loss"] for metrics in one.metrics] == pytest.approx([metrics["loss"] for metrics in other.metrics], rel=1e-4)


def updates_of(run: Run) -> list[dict[str, Any]]:
    return [{name: event[name] for name in ("round", "site", "weight")} for event in run.events("update")]


def test_together_or_one_by_one(execute: Execute) -> None:
    one_by_one, first = execute(plain), execute(stacked)
    assert_agree(first, one_by_one)
    assert updates_of(first) == updates_of(one_by_one)
    assert np.abs(first.get_result().params["0.weight"] - net().state_dict()["0.weight"].numpy()).max() > 0.05
    for workers in (2, 3):
        assert bits(execute(stacked, workers)) == bits(first)


def test_an_aggregator_that_looks_at_each_update(execute: Execute) -> None:
    mean = WeightedMean("equal")
    assert_agree(execute(stacked, aggregator=mean), execute(plain, aggregator=mean))


def test_filters_at_the_servers_door(execute: Execute) -> None:
    filters = Filters(server_in=[ClipNorm(0.05)])
    assert_agree(execute(stacked, filters=filters), execute(plain, filters=filters))


def test_filters_at_the_site_have_it_trained_alone(execute: Execute) -> None:
    filters = Filters(site_out=[ClipNorm(0.05)])
    assert bits(execute(stacked, filters=filters)) == bits(execute(plain, filters=filters))


def test_parameters_that_stay_at_the_site_have_it_trained_alone(execute: Execute) -> None:
    config = {"local_params": ["2.*"]}
    assert bits(execute(stacked, config=config)) == bits(execute(plain, config=config))


@pytest.mark.parametrize(("how", "code"), [("fails", "OSError"), ("diverges", "UpdateRejected")])
def test_one_site_that_fails(execute: Execute, how: str, code: str) -> None:
    """It is told for that site, by its own reason, and the others go on."""
    changes: dict[str, Any] = {"config": {how: True}, "min_updates": 50, "sites_per_round": SITES, "rounds": 2}
    run, one_by_one = execute(stacked, 2, **changes), execute(plain, **changes)
    failures, expected = run.events("failure"), one_by_one.events("failure")
    assert [(event["site"], event["code"]) for event in failures] == [(FAILING, code)] * 2
    assert [event["message"] for event in failures] == [event["message"] for event in expected]
    assert_agree(run, one_by_one)
    assert sorted(event["site"] for event in run.events("update")) == sorted(event["site"] for event in one_by_one.events("update"))


def test_all_sites_that_fail(execute: Execute) -> None:
    with pytest.raises(JobFailed, match="none of the module's"):
        execute(stacked, model=nn.Linear(2, 2))


def test_what_a_site_prints_is_its_own(execute: Execute) -> None:
    run = execute(stacked, config={"prints": True}, rounds=1, sites_per_round=SITES)
    for name in ("site-001", "site-077", "site-150"):
        assert (run.folder / "logs" / f"{name}.log").read_text() == f"data of {name}\n"


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([1] * 20, [16, 4]),
        ([7] * 20, [14] * 10),  # an eighth is 17
        ([300, 2, 2], [300, 4]),  # none is split
        ([4000] + [1] * 300, [4000, 256, 44]),
        ([3], [3]),
    ],
)
def test_neighbouring_groups_are_joined(groups: list[int], expected: list[int]) -> None:
    sites = iter(range(10_000))
    named = [tuple(f"site-{next(sites)}" for _ in range(size)) for size in groups]
    made = joined(named)
    assert [len(group) for group in made] == expected
    assert [site for group in made for site in group] == [site for group in named for site in group]


def columns(*rows: int) -> Columns:
    meta = {"examples": [row + 1 for row in rows], "steps": [2] * len(rows)}
    return Columns([f"site-{row}" for row in rows], ("job", 0, 0), [0.5] * len(rows), {"loss": [float(row) for row in rows]}, meta)


def updates(count: int) -> list[Update]:
    return list(columns(*range(count)))


@pytest.mark.parametrize("by", [None, "examples", "steps", "equal", {"site-0": 2.0, "site-1": 5.0, "site-2": 1.0}])
def test_a_stack_weighs_as_its_sites_do(by: Any) -> None:
    """(1·0 + 2·3 + 3·6) / 6 = 4 by examples, (0 + 3 + 6) / 3 = 3 by steps or equally, (2·0 + 5·3 + 1·6) / 8 by the numbers given."""
    task = Task("train", FLModel({"w": np.zeros((2, 2), np.float32)}))
    stack = Stacked(columns(0, 1, 2), {"w": np.arange(3, dtype=np.float32)[:, None, None] * np.full((2, 2), 3, np.float32)})
    sites = ["site-0", "site-1", "site-2"]
    partial, light = fold_together(sites, [stack], lambda done: [], WeightedMean(by), task, (), 0)
    expected = 21 / 8 if isinstance(by, dict) else {None: 4, "examples": 4, "steps": 3, "equal": 3}[by]
    assert partial is not None
    total = WeightedMean(by)
    total.merge(partial)
    result = total.result()
    np.testing.assert_allclose(result.params["w"], np.full((2, 2), expected), rtol=1e-6)
    assert result.metrics["loss"] == pytest.approx(expected / 3)
    assert isinstance(light, Columns) == (by in (None, "examples", "steps"))
    assert list(light) == updates(3)
    one_by_one, _ = fold_group(stack.each(), WeightedMean(by), task, (), 0)
    assert one_by_one is not None
    assert one_by_one.meta["tensors"] == partial.meta["tensors"]
    assert one_by_one.meta["unit"] == partial.meta["unit"]


@pytest.mark.parametrize("size", [3, 20_000])
def test_updates_of_a_group_may_share_their_memory(size: int) -> None:
    """1·0 + 2·1 + 4·3 = 14 over 7 examples; the third diverged. Small ones wait for one another, large ones do not."""
    task = Task("train", FLModel({"w": np.zeros(size, np.float32)}))
    memory = np.empty(size, np.float32)

    def trained() -> Iterator[Update]:
        for row, update in enumerate(updates(4)):
            memory[:] = np.nan if row == 2 else row
            yield replace(update, model=replace(update.model, params={"w": memory}))

    partial, light = fold_group(trained(), WeightedMean(), task, (), 0)
    assert partial is not None
    assert set(partial.params["w"].tolist()) == {14.0}
    assert partial.meta["tensors"] == {"w": ["float32", 7.0]}
    assert [update.failure is None for update in light] == [True, True, False, True]
    assert all(update.model.params is None for update in light)


def test_what_is_left_is_folded_after_the_stacks() -> None:
    task = Task("train", FLModel({"w": np.zeros(1, np.float32)}))
    alone = updates(5)[4]
    alone.model.params = {"w": np.full(1, 10, np.float32)}
    asked: list[set[str]] = []

    def left(done: Any) -> list[Update]:
        asked.append(set(done))
        return [alone]

    stack = Stacked(columns(0, 1), {"w": np.array([[1], [np.nan]], np.float32)})
    partial, light = fold_together(["site-1", "site-0", "site-4"], [stack], left, WeightedMean(), task, (), 0)
    assert asked == [{"site-0", "site-1"}]
    failed, *good = light
    assert failed.site == "site-1"
    assert failed.failure is not None
    assert "holds NaN" in failed.failure.message
    assert good == [columns(0).row(0), columns(4).row(0)]
    assert partial is not None
    assert partial.params["w"].tolist() == [1 * 1 + 5 * 10]


@pytest.mark.parametrize("names", [("loss", "loss"), ("loss", "error")])
def test_stacks_are_told_in_the_order_of_their_sites(names: tuple[str, str]) -> None:
    """In columns, if they tell the same; else one by one."""
    task = Task("train", FLModel({"w": np.zeros(1, np.float32)}))
    parts = [columns(3, 0), columns(1, 2)]
    parts = [replace(part, metrics={name: part.metrics["loss"]}) for part, name in zip(parts, names, strict=True)]
    stacks = [Stacked(part, {"w": np.ones((2, 1), np.float32)}) for part in parts]
    sites = [f"site-{row}" for row in range(4)]
    partial, light = fold_together(sites, stacks, lambda done: [], WeightedMean(), task, (), 0)
    assert partial is not None
    assert partial.params["w"].tolist() == [10]
    assert isinstance(light, Columns) == (names == ("loss", "loss"))
    assert [(update.site, update.model.meta, *update.model.metrics.values()) for update in light] == [
        (f"site-{row}", {"examples": row + 1, "steps": 2}, row) for row in range(4)
    ]
