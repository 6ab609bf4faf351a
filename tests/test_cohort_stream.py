"""`Cohort.stream` on real sites, as workflows of one's own use it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.app import App, Site
from hanse.cohort import Arrival, Cohort
from hanse.errors import ConfigError, TooFewUpdates, UpdateRejected
from hanse.filters import ClipNorm, Filters
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TRAIN, Task
from hanse.simulation.roster import NumberedSites

Federate = Callable[..., Any]
app = App()


@app.train
def train(model: FLModel, site: Site) -> FLModel:
    return FLModel({"w": model.params["w"] + 1}, meta={"examples": 1})


def task() -> Task:
    return Task(TRAIN, FLModel({"w": np.zeros(2)}))


def as_it_is(arrival: Arrival) -> Arrival:
    return arrival


@pytest.mark.parametrize("concurrency", [0, 3])
async def test_as_many_at_a_time_as_there_are(concurrency: int, federate: Federate) -> None:
    async with federate(app, sites=2) as federation:
        with pytest.raises(ConfigError, match=f"concurrency is {concurrency}, of 2 sites: give a number from 1 to 2"):
            await anext(federation.cohort.stream(task, as_it_is, concurrency=concurrency))


async def test_staleness_counts_commits_and_tasks_share_memory(federate: Federate, nothing_left: None) -> None:
    async with federate(app, sites=6, workers=2) as federation:
        cohort, asked = federation.cohort, 0

        def next_task() -> Task:
            nonlocal asked
            asked += 1
            return task()

        seen = []
        async with aclosing(cohort.stream(next_task, as_it_is, concurrency=6)) as updates:
            for number in range(12):
                arrival = await anext(updates)
                assert len(federation.sites._bodies) <= asked  # one for each version, whatever the number of sites
                assert arrival.staleness == federation.folder.commits - arrival.update.task_id.commit
                seen.append(arrival)
                if number % 4 == 3:
                    await cohort.commit(FLModel({"w": np.zeros(2)}))
        assert asked == 3
        assert federation.sites._bodies == {}
        assert len({arrival.update.task_id for arrival in seen}) == 12
        assert {event["staleness"] for event in federation.noted("update")} == {arrival.staleness for arrival in seen}


@given(count=st.integers(1, 12), busy=st.sets(st.integers(0, 11)))
def test_only_idle_sites_are_drawn_and_all_of_them(count: int, busy: set[int]) -> None:
    busy = {rank for rank in busy if rank < count}
    idle = set(range(count)) - busy
    cohort = Cohort(Desk(count), Notes(), job_id="job")  # type: ignore[arg-type]
    drawn = {cohort._draw_idle(sorted(busy)) for _ in range(40 * len(idle))}
    assert drawn <= idle
    assert len(idle) > 3 or drawn == idle


class Desk:
    def __init__(self, count: int) -> None:
        self.roster = NumberedSites(count)


class Notes:
    commits = 0


async def test_what_take_refuses_is_a_failure(federate: Federate) -> None:
    def take(arrival: Arrival) -> str:
        if arrival.update.site == "site-1":
            raise UpdateRejected("not this one")
        return arrival.update.site

    async with federate(app, sites=2) as federation, aclosing(federation.cohort.stream(task, take)) as updates:
        assert [await anext(updates) for _ in range(5)] == ["site-2"] * 5
        assert [(event["site"], event["message"]) for event in federation.noted("failure")] in ([("site-1", "not this one")], [])


async def test_all_have_failed(federate: Federate) -> None:
    def take(arrival: Arrival) -> None:
        raise UpdateRejected("none of these")

    async with federate(app, sites=3) as federation:
        with pytest.raises(TooFewUpdates, match=r"every site has failed(?s:.*)none of these") as raised:
            await anext(federation.cohort.stream(task, take, concurrency=2))
        assert raised.value.reasons.keys() == {"site-1", "site-2", "site-3"}


async def test_the_servers_door_stands_before_take(federate: Federate) -> None:
    async with federate(app, sites=2, filters=Filters(server_in=[ClipNorm(0.5)])) as federation:
        async with aclosing(federation.cohort.stream(task, as_it_is)) as updates:
            arrival = await anext(updates)
        assert np.linalg.norm(arrival.update.model.params["w"]) == pytest.approx(0.5)
        assert arrival.task.model.params["w"].tolist() == [0.0, 0.0]
