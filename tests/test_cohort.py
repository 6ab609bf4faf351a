"""The cohort over a courier whose sites answer when the test says so; what needs real sites is at the end."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.app import Site
from hanse.cohort import Best, Cohort, fold_group, group_by_rank, group_of, group_starts
from hanse.errors import ConfigError, Failure, TooFewUpdates
from hanse.filters import CastTo, ClipNorm, Exclude, Filters, GaussianNoise
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Reduced, Update
from hanse.server.run_folder import RunFolder
from hanse.simulation.roster import NamedSites
from hanse.transport.courier import Ask, Folded
from hanse.workflows.condition import Condition

SITES = ("a", "b", "c", "d")
LATE_S = 0.02  # how long the tests wait for an answer that never comes


class Desk:
    """A courier whose sites answer in the order in which the test calls `answer`, before or while they are asked."""

    def __init__(self, *sites: str) -> None:
        self.roster = NamedSites(sites or SITES)
        self.asked: list[Ask] = []
        self.given_up = 0
        self.happened: list[str] = []
        self._answers: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    def answer(self, site: str, value: float | None = None, **update: Any) -> None:
        """The site sends the one number `value` as its params, or whatever `update` says."""
        model = {} if value is None else {"model": FLModel({"w": np.full(1, value, np.float32)}, metrics={"value": value})}
        self._answers.put_nowait((site, model | update))

    def fails(self, site: str, message: str) -> None:
        self.answer(site, failure=Failure("ValueError", message))

    async def ask(self, ask: Ask) -> AsyncGenerator[Update, None]:
        self.asked.append(ask)
        try:
            for _ in ask.sites:
                site, fields = await self._answers.get()
                yield Update(site, ask.task_id(site), **fields)
        finally:
            self.given_up += 1

    async def fold(self, ask: Ask, aggregator: Aggregator) -> AsyncGenerator[Folded, None]:
        arrived: dict[str, Update] = {}
        async with aclosing(self.ask(ask)) as updates:
            async for update in updates:
                arrived[update.site] = update
                self.happened.append(f"{update.site} arrives")
                number = next(number for number, group in enumerate(ask.groups) if update.site in group)
                if arrived.keys() >= set(ask.groups[number]):
                    ranked = [arrived[site] for site in ask.groups[number]]
                    partial_sum, light = fold_group(ranked, aggregator, ask.task, (), 0)
                    yield Folded(number, partial_sum, light, partial(self.happened.append, f"{number} is free"))


class Bench:
    """A cohort over a desk, with a real run folder."""

    def __init__(self, path: Path, *sites: str, **cohort: Any) -> None:
        self.desk = Desk(*sites)
        self.events: list[dict[str, Any]] = []
        self.progress: list[tuple[int, int, int]] = []
        self.folder = RunFolder(path, {}, listen=self.events.append, progress=lambda *at: self.progress.append(at))
        self.restored = self.folder.resume()
        self.cohort = Cohort(self.desk, self.folder, **{"job_id": "job", **cohort})

    def noted(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    async def ask(self, **how: Any) -> list[Update]:
        return [update async for update in self.cohort.ask(TASK, **how)]

    async def reduce(self, **how: Any) -> Reduced:
        return await self.cohort.reduce(how.pop("task", TASK), how.pop("aggregator", WeightedMean()), **how)


TASK = Task("train", FLModel({"w": np.zeros(1, np.float32)}))
Open = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path) -> Open:
    return partial(Bench, tmp_path)


def value_of(reduced: Reduced) -> float:
    return float(reduced.model.params["w"][0])


# ------------------------------------------------------------------------------------------------------------------------- who is asked


def test_a_sample_is_drawn_without_replacement_and_ranked(bench: Open) -> None:
    cohort = bench().cohort
    draws = [cohort.sample(2) for _ in range(60)]
    assert {draw for draw in draws} == set(itertools.combinations(SITES, 2))
    assert cohort.sample() == cohort.sample(4) == SITES
    counts = Counter(site for draw in draws for site in draw)
    assert all(15 <= counts[site] <= 45 for site in SITES)  # 30 of 60, give or take four standard deviations


@pytest.mark.parametrize("count", [0, -1, 5])
def test_no_such_sample(bench: Open, count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} sites a round are asked for, of 4"):
        bench().cohort.sample(count)


async def test_draws_hang_on_the_seed_and_the_number_of_commits(bench: Open) -> None:
    def draws(cohort: Cohort) -> list[Any]:
        return [cohort.sample(2), cohort.sample(2), cohort.sample(2), cohort.rng.random()]

    first = bench()
    before = draws(first.cohort)
    await first.cohort.commit(FLModel(TASK.model.params))
    after = draws(first.cohort)
    assert len({str(each) for each in (before, after)}) == 2
    resumed = bench()
    assert draws(resumed.cohort) == after
    assert draws(bench(seed=1).cohort) != after
    (resumed.folder.path / "commit.safetensors").unlink()
    assert draws(bench().cohort) == before


def test_groups_are_set_by_rank() -> None:
    ranks = {f"s{rank:03}": rank for rank in range(130)}
    assert [len(group) for group in group_by_rank(ranks, 130)] == [8] * 13 + [6, 5, 3, 3, 2, 1, 1] + [1] * 5
    assert group_by_rank({"s009": 9, "s001": 1, "s000": 0}, 130) == (("s000", "s001"), ("s009",))
    assert [group_starts(sites)[1] for sites in (8, 40, 65, 1024, 6400, 1_000_000)] == [1, 2, 4, 64, 64, 3906]
    assert [len(group_starts(sites)) for sites in (8, 40, 65, 1000, 1_000_000)] == [8, 23, 22, 32, 287]
    assert (group_of(0, 130), group_of(8, 130), group_of(129, 130)) == (0, 1, 24)
    assert group_by_rank({"s001": 1, "s000": 0}, 130, single=True) == (("s000",), ("s001",))


@given(st.integers(1, 300), st.data())
def test_a_samples_groups_are_parts_of_the_rosters(roster: int, data: st.DataObject) -> None:
    sampled = data.draw(st.lists(st.integers(0, roster - 1), unique=True, min_size=1))
    everyone = group_by_rank({str(rank): rank for rank in range(roster)}, roster)
    groups = group_by_rank({str(rank): rank for rank in sampled}, roster)
    assert len(everyone) == len(group_starts(roster))
    assert [site for group in groups for site in group] == [str(rank) for rank in sorted(sampled)]
    places = [next(number for number, group in enumerate(everyone) if set(part) <= set(group)) for part in groups]
    assert places == sorted(set(places))


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (["a", "x"], "asks a site that is not in the job: 'x' is none of a, b, c, d"),
        (["a", "a"], "asks 2 sites, 1 of them different"),
        ([], "asks 0 sites"),
    ],
)
async def test_whom_no_one_can_ask(bench: Open, of: list[str], says: str) -> None:
    opened = bench()
    with pytest.raises(ConfigError, match=says):
        await opened.ask(of=of)
    with pytest.raises(ConfigError, match=says):
        await opened.reduce(of=of)
    assert opened.desk.asked == []


@pytest.mark.parametrize("min_updates", [-1, 3])
async def test_no_such_min_updates(bench: Open, min_updates: int) -> None:
    opened = bench()
    with pytest.raises(ConfigError, match=f"min_updates is {min_updates}, of 2 sites asked"):
        await opened.ask(of=["a", "b"], min_updates=min_updates)


async def test_a_task_id_counts_commits_and_asks(bench: Open) -> None:
    opened = bench()
    ids = []
    for _ in range(2):
        for _ in range(2):
            opened.desk.answer("b", 1.0)
            ids += [update.task_id for update in await opened.ask(of=["b"])]
        await opened.cohort.commit(TASK.model)
    assert ids == [TaskId("job", commit, index, "b") for commit in range(2) for index in range(2)]


# ------------------------------------------------------------------------------------------------------------------------------- asking


async def test_updates_come_as_they_arrive_failed_ones_too(bench: Open) -> None:
    opened = bench()
    opened.desk.answer("c", 3.0, records=(Record("loss", 0.5, 1),), seconds=2.0)
    opened.desk.fails("a", "no data")
    opened.desk.answer("b", model=FLModel(metrics={"value": 2.0}, meta={"steps": 7}))
    updates = await opened.ask(of=["a", "b", "c"], min_updates=2)
    assert [(update.site, update.failure is None) for update in updates] == [("c", True), ("a", False), ("b", True)]
    assert opened.noted("update") == [
        {"event": "update", "round": 0, "task": "train", "site": "c", "seconds": 2.0, "metrics": {"value": 3.0}, "weight": None},
        {"event": "update", "round": 0, "task": "train", "site": "b", "seconds": 0.0, "metrics": {"value": 2.0}, "weight": 7},
    ]
    assert opened.noted("failure") == [
        {"event": "failure", "round": 0, "task": "train", "site": "a", "code": "ValueError", "message": "no data", "hint": ""}
    ]
    assert opened.noted("record") == [
        {"event": "record", "round": 0, "site": "c", "key": "loss", "value": 0.5, "step": 1, "kind": "scalar"}
    ]
    assert opened.progress == [(0, 1, 3), (0, 2, 3), (0, 3, 3)]
    assert opened.desk.given_up == 1


@pytest.mark.parametrize("way", [Bench.ask, Bench.reduce])
async def test_too_few_updates_name_every_reason(bench: Open, way: Any) -> None:
    opened = bench()
    opened.desk.answer("b", 1.0)
    opened.desk.fails("d", "disk full")
    opened.desk.fails("a", "no data")
    with pytest.raises(TooFewUpdates) as caught:
        await way(opened, min_updates=2, within_s=LATE_S)
    assert caught.value.reasons == {
        "a": "ValueError: no data",
        "c": f"DeadlineExceeded: no update within {LATE_S} s",
        "d": "ValueError: disk full",
    }
    assert str(caught.value).startswith("round 1, task 'train': 1 good updates of 4 asked, 2 needed.")
    assert [event["site"] for event in opened.noted("failure")][-1] == "c"
    assert opened.desk.given_up == 1


@pytest.mark.parametrize("way", [Bench.ask, Bench.reduce])
async def test_by_default_one_failure_is_too_many_and_none_are_if_none_are_needed(bench: Open, way: Any) -> None:
    opened = bench()
    for _ in range(2):
        opened.desk.answer("a", 1.0)
        opened.desk.fails("b", "no")
    with pytest.raises(TooFewUpdates, match="1 good updates of 2 asked, 2 needed"):
        await way(opened, of=["a", "b"])
    await way(opened, of=["a", "b"], min_updates=0)


@pytest.mark.parametrize("way", [Bench.ask, Bench.reduce])
async def test_stragglers_have_a_grace_once_there_are_enough(bench: Open, way: Any) -> None:
    opened = bench()
    opened.desk.answer("d", 1.0)
    opened.desk.fails("b", "no")
    opened.desk.answer("c", 3.0)
    await way(opened, min_updates=2, grace_s=LATE_S, within_s=30.0)
    late = opened.noted("failure")[-1]
    assert (late["site"], late["code"]) == ("a", "DeadlineExceeded")
    assert late["message"] == f"no update within {LATE_S} s of grace after 2 updates"
    assert opened.desk.given_up == 1


@pytest.mark.parametrize("way", [Bench.ask, Bench.reduce])
async def test_failures_are_not_enough_for_the_grace_to_begin(bench: Open, way: Any) -> None:
    opened = bench()
    opened.desk.answer("d", 1.0)
    opened.desk.fails("b", "no")
    with pytest.raises(TooFewUpdates) as caught:
        await way(opened, min_updates=2, grace_s=LATE_S / 2, within_s=LATE_S)
    assert caught.value.reasons["a"] == f"DeadlineExceeded: no update within {LATE_S} s"


@pytest.mark.parametrize("way", [Bench.ask, Bench.reduce])
async def test_the_grace_does_not_outlast_the_deadline(bench: Open, way: Any) -> None:
    opened = bench()
    opened.desk.answer("d", 1.0)
    await way(opened, min_updates=1, grace_s=30.0, within_s=LATE_S)
    assert [event["site"] for event in opened.noted("failure")] == ["a", "b", "c"]


async def test_no_straggler_no_waiting(bench: Open) -> None:
    opened = bench()
    for site in SITES:
        opened.desk.answer(site, 1.0)
    assert len(await opened.ask(min_updates=1, grace_s=30.0, within_s=30.0)) == 4


async def test_who_asks_may_leave_early(bench: Open) -> None:
    opened = bench()
    opened.desk.answer("c", 1.0)
    async with aclosing(opened.cohort.ask(TASK)) as updates:
        assert (await anext(updates)).site == "c"
    assert opened.desk.given_up == 1


# ----------------------------------------------------------------------------------------------------------------------------- reducing


@pytest.mark.parametrize("how", [{}, {"within_s": 30.0}])
async def test_any_order_of_arrival_gives_the_same_bits(bench: Open, how: dict[str, Any]) -> None:
    values = dict(zip(SITES, [1e8, 1.0, -1e8, 3.0], strict=True))  # ((1e8 + 1) - 1e8 + 3) / 4 in float32; other orders differ
    opened = bench()
    for order in itertools.permutations(SITES):
        for site in order:
            opened.desk.answer(site, values[site])
        reduced = await opened.reduce(**how)
        assert value_of(reduced) == 0.75
        assert [update.site for update in reduced.updates] == list(SITES)
        assert all(update.model.params is None for update in reduced.updates)
        assert reduced.metrics == reduced.model.metrics == {"value": 1.0}


async def test_a_group_that_is_early_waits_for_its_turn(bench: Open) -> None:
    opened = bench()
    for site in ("c", "a", "d", "b"):
        opened.desk.answer(site, 1.0)
    await opened.reduce()
    assert opened.desk.happened == [
        "c arrives", "a arrives", "0 is free", "d arrives", "b arrives", "1 is free", "2 is free", "3 is free",
    ]  # fmt: skip


async def test_a_group_that_is_late_is_left_out(bench: Open) -> None:
    opened = bench()
    for site, value in [("d", 5.0), ("c", 1.0)]:
        opened.desk.answer(site, value)
    reduced = await opened.reduce(min_updates=2, within_s=LATE_S)
    assert value_of(reduced) == 3.0
    assert reduced.failures.keys() == {"a", "b"}
    assert opened.desk.happened[-2:] == ["2 is free", "3 is free"]


async def test_what_cannot_be_combined_is_a_failure_of_its_site(bench: Open) -> None:
    opened = bench()
    opened.desk.answer("a", float("nan"))
    opened.desk.answer("b", 2.0)
    opened.desk.answer("c", model=FLModel({"other": np.zeros(1)}))
    opened.desk.answer("d", model=FLModel({"w": np.full(1, 4.0, np.float32)}, meta={"examples": 10}))  # the others count the same
    reduced = await opened.reduce(min_updates=1)
    assert value_of(reduced) == 2.0
    assert {site: failure.code for site, failure in reduced.failures.items()} == dict.fromkeys("acd", "UpdateRejected")
    assert "NaN" in reduced.failures["a"].message
    assert "'w'" in reduced.failures["c"].message
    assert [event["site"] for event in opened.noted("failure")] == ["a", "c", "d"]


async def test_without_a_reference_the_first_group_is_the_measure(bench: Open) -> None:
    opened = bench()
    for site, shape in [("c", 1), ("b", 2), ("a", 1)]:
        opened.desk.answer(site, model=FLModel({"w": np.ones(shape)}))
    reduced = await opened.reduce(task=Task("train", FLModel()), of=["a", "b", "c"], min_updates=2)
    assert reduced.failures.keys() == {"b"}
    assert reduced.model.params["w"].tolist() == [1.0]


async def test_only_metrics(bench: Open) -> None:
    opened = bench()
    for site, examples in [("a", 1), ("b", 3)]:
        opened.desk.answer(site, model=FLModel(metrics={"accuracy": float(site == "b")}, meta={"examples": examples}))
    reduced = await opened.reduce(of=["a", "b"])
    assert reduced.model.params is None
    assert reduced.metrics == {"accuracy": 0.75}


# -------------------------------------------------------------------------------------------------------------------- rounds and commits


async def rounds(opened: Bench, model: FLModel, total: int, metric: Mapping[int, float] | None = None, **how: Any) -> list[int]:
    done = []
    async for number in opened.cohort.rounds(model, total, **how):
        done.append(number)
        await opened.cohort.commit(model, {"accuracy": (metric or {}).get(number, 0.0)})
    return done


@pytest.mark.parametrize(("current", "left"), [(None, [0, 1, 2]), (0, [1, 2]), (1, [2]), (2, []), (7, [])])
async def test_rounds_go_on_after_the_models_own(bench: Open, current: int | None, left: list[int]) -> None:
    assert await rounds(bench(), FLModel(current_round=current), 3) == left


async def test_rounds_end_early_by_the_last_commits_metrics(bench: Open) -> None:
    opened = bench()
    until = Condition("accuracy >= 0.5")
    assert await rounds(opened, FLModel(), 5, {0: 0.4, 2: 0.5}, until=until) == [0, 1, 2]
    [message] = opened.noted("message")
    assert message["text"] == "stopped after round 3 of 5: accuracy >= 0.5"


async def test_a_restarted_job_ends_early_as_well(bench: Open) -> None:
    until = Condition("accuracy >= 0.5")
    assert await rounds(bench(), FLModel(metrics={"accuracy": 0.6}, current_round=1), 5, until=until) == []
    assert await rounds(bench(), FLModel(metrics={"accuracy": 0.4}, current_round=1), 3, until=until) == [2]


async def test_a_commit_is_what_a_restart_finds(bench: Open) -> None:
    opened = bench()
    assert opened.restored is None
    model = FLModel({"w": np.arange(3.0)}, optimizer_params={"m/w": np.ones(3)}, meta={"mine": [1]})
    async for number in opened.cohort.rounds(model, 2):
        if number == 1:
            break
        opened.desk.answer("a", 1.0)
        opened.desk.fails("b", "no")
        await opened.ask(of=["a", "b"], min_updates=1)
        committed = await opened.cohort.commit(model, {"accuracy": 0.5})
        opened.cohort.log("not committed any more")
    assert (committed.current_round, committed.total_rounds, committed.metrics) == (0, 2, {"accuracy": 0.5})
    [event] = opened.noted("round")
    assert event["seconds"] >= 0
    assert event | {"seconds": 0, "time": 0} == {
        "event": "round", "round": 0, "time": 0, "seconds": 0, "asked": 2, "good": 1, "metrics": {"accuracy": 0.5}, "best": False,
    }  # fmt: skip
    again = bench()
    assert again.restored is not None
    restored = again.restored[0]
    np.testing.assert_array_equal(restored.params["w"], np.arange(3.0))
    np.testing.assert_array_equal(restored.optimizer_params["m/w"], np.ones(3))
    assert (restored.current_round, restored.total_rounds, restored.metrics) == (0, 2, {"accuracy": 0.5})
    assert restored.meta == {"mine": [1]}
    again.desk.answer("a", 1.0)
    assert [update.task_id.commit for update in await again.ask(of=["a"])] == [1]
    assert "not committed" not in (again.folder.path / "metrics.jsonl").read_text()


async def test_a_rounds_counts_are_those_of_its_first_task(bench: Open) -> None:
    opened = bench()
    async for _ in opened.cohort.rounds(FLModel(), 2):
        for name, sites in [("train", "ab"), ("evaluate", "abcd")]:
            for site in sites:
                opened.desk.answer(site, 1.0)
            await opened.reduce(task=Task(name, TASK.model), of=list(sites))
        await opened.cohort.commit(TASK.model)
    assert [(event["good"], event["asked"]) for event in opened.noted("round")] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(("lowest", "kept"), [(False, [0, 2]), (True, [0, 3])])
async def test_the_best_is_strictly_better_than_every_one_before(bench: Open, lowest: bool, kept: list[int]) -> None:
    opened = bench()
    values = [0.5, 0.5, 0.7, 0.1, float("nan"), None]
    better = []
    async for number in opened.cohort.rounds(FLModel(), len(values)):
        metrics = {} if values[number] is None else {"x": values[number]}
        model = FLModel({"w": np.full(1, number)}, optimizer_params={"m": np.zeros(1)})
        if await opened.cohort.keep_best(model, metrics, "x", lowest=lowest):  # type: ignore[arg-type]
            better.append(number)
        await opened.cohort.commit(model, metrics)  # type: ignore[arg-type]
    assert better == kept
    assert opened.folder.best == Best("x", values[kept[-1]], kept[-1])  # type: ignore[arg-type]
    assert [event["round"] for event in opened.noted("round") if event["best"]] == kept
    again = bench()
    assert again.folder.best == opened.folder.best
    assert not await again.cohort.keep_best(FLModel({"w": np.zeros(1)}), {"x": 0.5}, "x", lowest=lowest)


async def test_notes(bench: Open) -> None:
    opened = bench()
    async for _ in opened.cohort.rounds(FLModel(current_round=2), 4):
        opened.cohort.log("careful", level="warning")
        opened.cohort.event("mine", scores={"a": 1})
        break
    assert opened.events == [
        {"event": "message", "round": 3, "level": "warning", "text": "careful"},
        {"event": "mine", "round": 3, "scores": {"a": 1}},
    ]


# ------------------------------------------------------------------------------------------------------------------------------ filters


async def test_what_leaves_the_server_is_filtered_and_without_the_optimizers_moments(bench: Open) -> None:
    opened = bench(filters=Filters(server_out=[Exclude(["own"])]))
    opened.desk.answer("a", 1.0)
    params = {"w": np.zeros(1, np.float32), "own": np.zeros(1)}
    await opened.reduce(task=Task("train", FLModel(params, optimizer_params={"m": np.ones(1)})), of=["a"])
    [sent] = [ask.task.model for ask in opened.desk.asked]
    assert (sent.params.keys(), sent.optimizer_params) == ({"w"}, {})
    assert params.keys() == {"w", "own"}


async def test_a_model_sent_in_few_bits_comes_back_in_its_own_dtype(bench: Open) -> None:
    opened = bench(filters=Filters(server_out=[CastTo("float16")]))
    for site in ("a", "b"):
        opened.desk.answer(site, model=FLModel({"w": np.full(1, 2049 if site == "a" else 2048, np.float16)}))
    reduced = await opened.reduce(of=["a", "b"])
    assert opened.desk.asked[0].task.model.params["w"].dtype == np.float16
    assert (reduced.model.params["w"].dtype, value_of(reduced)) == (np.float32, 2048.0)


async def test_noise_at_the_server_is_drawn_anew_for_each_ask(bench: Open) -> None:
    async def noise(opened: Bench) -> list[float]:
        for _ in range(2):
            opened.desk.answer("a", 1.0)
            await opened.ask(of=["a"])
        return [float(ask.task.model.params["w"][0]) for ask in opened.desk.asked]

    filters = Filters(server_out=[GaussianNoise(1.0)])
    first = await noise(bench(filters=filters))
    assert first[0] != first[1]
    assert await noise(bench(filters=filters)) == first
    assert await noise(bench(filters=filters, seed=1)) != first


async def test_what_comes_in_is_filtered_and_may_be_refused(bench: Open) -> None:
    opened = bench(filters=Filters(server_in=[ClipNorm(1.0)]))
    opened.desk.answer("a", 5.0)
    opened.desk.answer("b", model=FLModel({"unknown": np.ones(1)}))
    clipped, refused = await opened.ask(of=["a", "b"], min_updates=1)
    assert clipped.model.params["w"].tolist() == [1.0]
    assert refused.failure is not None
    assert (refused.failure.code, refused.model.params) == ("ConfigError", None)
    assert "'unknown'" in refused.failure.message


def test_a_group_is_filtered_where_it_is_folded() -> None:
    """Noise at the server's door is the site's own, whatever group it is in; a group without a good update has no sum."""
    ask = Ask(TASK, ("job", 0, 0), (SITES,))
    updates = [Update(site, ask.task_id(site), FLModel({"w": np.zeros(1, np.float32)})) for site in SITES]
    noise = [fold_group([update], WeightedMean(), TASK, [GaussianNoise(1.0)], seed=3)[0] for update in updates]
    together, light = fold_group(updates, WeightedMean(), TASK, [GaussianNoise(1.0)], seed=3)
    alone = [each.params["w"][0] for each in noise if each]
    assert len(set(alone)) == 4
    assert together is not None
    assert together.params["w"][0] == pytest.approx(sum(alone))
    assert [update.site for update in light] == list(SITES)
    failed = Update("a", ask.task_id("a"), failure=Failure("ValueError", "no"))
    assert fold_group([failed], WeightedMean(), TASK, [], seed=0) == (None, (failed,))


# --------------------------------------------------------------------------------------------------------------------------- real sites


async def test_ask_and_reduce_agree_on_real_sites(federate: Any, nothing_left: None) -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        if site.rank == 3:
            raise ValueError("no data")
        return FLModel({"w": model.params["w"] + np.float32(site.rank)}, metrics={"rank": site.rank}, meta={"examples": site.rank + 1})

    async with federate(train, sites=70, filters=Filters(server_in=[ClipNorm(60.0)])) as federation:
        cohort = federation.cohort
        reduced = await cohort.reduce(TASK, WeightedMean(), min_updates=69)
        updates = [update async for update in cohort.ask(TASK, min_updates=69)]
    good = sorted((update for update in updates if update.failure is None), key=lambda update: update.site)
    assert [update.site for update in good] == [update.site for update in reduced.updates]
    values = [min(rank, 60.0) for rank in range(70) if rank != 3]
    assert [float(update.model.params["w"][0]) for update in good] == pytest.approx(values)
    weights = [rank + 1 for rank in range(70) if rank != 3]
    assert value_of(reduced) == pytest.approx(np.average(values, weights=weights), rel=1e-6)
    assert reduced.failures["site-04"].message.endswith("no data")


async def test_who_leaves_early_ends_the_workers_that_are_at_it(federate: Any, nothing_left: None) -> None:
    never, writer = os.pipe()

    def train(model: FLModel, site: Site) -> FLModel:
        if site.rank == 1 and site.config["wait"]:
            os.read(never, 1)
        return FLModel({"w": np.full(1, site.rank, np.float32)})

    async with federate(train, sites=2) as federation:
        before = federation.sites.pids
        async with aclosing(federation.cohort.ask(Task("train", TASK.model, {"wait": True}))) as updates:
            assert (await anext(updates)).site == "site-1"
        (other,) = set(before) & set(federation.sites.pids)
        reduced = await federation.cohort.reduce(Task("train", TASK.model, {"wait": False}), WeightedMean())
        assert value_of(reduced) == 0.5
        assert other in federation.sites.pids
        assert federation.warnings == []  # it was not the worker's fault
    os.close(never)
    os.close(writer)


class OwnMean(WeightedMean):
    """Not registered, so it is added up in the main process."""


@pytest.mark.parametrize("aggregator", [WeightedMean(), OwnMean()], ids=["in the workers", "here"])
@pytest.mark.parametrize(("workers", "stuck"), [(1, 19), (2, 0)])
async def test_a_site_that_never_answers_holds_up_no_other(federate: Any, workers: int, stuck: int, aggregator: WeightedMean) -> None:
    never, writer = os.pipe()

    def train(model: FLModel, site: Site) -> FLModel:
        if site.rank == stuck:
            os.read(never, 1)
        return FLModel({"w": np.full(1, site.rank, np.float32)})

    async with federate(train, sites=20, workers=workers) as federation:
        for _ in range(2):
            reduced = await federation.cohort.reduce(TASK, aggregator, min_updates=19, grace_s=LATE_S)
            assert value_of(reduced) == (190 - stuck) / 19
            assert reduced.failures.keys() == {f"site-{stuck + 1:02}"}
        updates = [update async for update in federation.cohort.ask(TASK, min_updates=19, grace_s=LATE_S)]
        assert [update.site for update in updates if update.failure] == [f"site-{stuck + 1:02}"]
    os.close(never)
    os.close(writer)
