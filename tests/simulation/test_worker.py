"""One worker process, spoken to over its link."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import threadpoolctl

from hanse.app import App, Site
from hanse.client.script import Script
from hanse.filters import Filters, GaussianNoise
from hanse.messages.codec import decode, decode_update, encode, encode_task
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.simulation.roster import NumberedSites
from hanse.simulation.worker import Begin, Close, Closed, Done, End, Run, Staff, decode_answer, encode_order, work
from hanse.transport.memory import MemoryLink, Received, SharedBody, map_shared

MEAN = {"kind": "weighted_mean", "by": None, "threads": 1}


class Worker:
    """The engine's end of a worker's link."""

    def __init__(self, staff: Staff) -> None:
        self.link, there = MemoryLink.pair()
        self.pid = os.fork()
        if self.pid == 0:
            self.link.close()
            work(there, lambda: staff, staff.threads)
        there.close()

    def begin(self, ask: int, model: FLModel, *, fold: Any = MEAN, **config: Any) -> None:
        body = SharedBody(encode_task(Task("train", model, config)))
        self.link.send_shared(encode_order(Begin(ask, fold)), body)
        body.close()

    def run(self, ask: int, *sites: str, states: dict[str, bytes] | None = None, index: int = 0) -> tuple[Done, Received]:
        self.send(Run(ask, 0, ("job", 0, index), list(sites), states or {}))
        received = self.link.receive()
        answer = decode_answer(received.message)
        assert isinstance(answer, Done)
        assert answer.ask == ask
        return answer, received

    def send(self, order: Any) -> None:
        self.link.send(encode_order(order))

    def status(self) -> int:
        """How it ended, which it must have or be about to."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


Hire = Callable[..., Worker]


@pytest.fixture
def hire(tmp_path: Path) -> Iterator[Hire]:
    hired = []

    def hire(code: Any, **staff: Any) -> Worker:
        if not isinstance(code, App | Script):
            function, code = code, App()
            code.train(function)
        common: dict[str, Any] = {
            "roster": NumberedSites(5),
            "job_id": "job",
            "seed": 0,
            "filters": Filters(),
            "logs": str(tmp_path / "logs"),
        }
        hired.append(Worker(Staff(**{**common, "code": code, **staff})))
        return hired[-1]

    yield hire
    for worker in hired:
        worker.link.close()
    for child in psutil.Process().children():
        child.kill()
        child.wait()


def train(model: FLModel, site: Site) -> FLModel:
    if site.rank == 3:
        raise ValueError("no data")
    site.log("rank", site.rank)
    site.state["runs"] = site.state.get("runs", 0) + 1
    w = model.params["w"] + np.float32(site.rank)
    return FLModel({"w": w}, metrics={"runs": site.state["runs"]}, meta={"examples": site.rank + 1})


def test_updates_are_folded_where_they_are(hire: Hire) -> None:
    """1 · 0 + 2 · 1 + 3 · 2 = 8, by 6 examples; the one that failed has no part in it."""
    worker = hire(train)
    worker.begin(7, FLModel({"w": np.zeros(2, np.float32)}))
    done, received = worker.run(7, "site-1", "site-2", "site-3", "site-4")
    assert [(update.site, update.failure and update.failure.code) for update in done.updates] == [
        ("site-1", None), ("site-2", None), ("site-3", None), ("site-4", "ValueError"),
    ]  # fmt: skip
    assert all(update.model.params is None for update in done.updates)
    assert [update.model.meta.get("examples") for update in done.updates] == [1, 2, 3, None]
    assert done.updates[1].task_id == TaskId("job", 0, 0, "site-2")
    assert done.updates[1].records[0].value == 1
    assert received.body is not None
    partial = decode(received.body.buffer)[0]
    assert partial.params["w"].tolist() == [8.0, 8.0]
    assert partial.meta["tensors"] == {"w": ["float32", 6.0]}
    received.body.release()


def test_a_group_without_a_good_update_has_no_sum(hire: Hire) -> None:
    worker = hire(train)
    worker.begin(1, FLModel({"w": np.zeros(2, np.float32)}))
    done, received = worker.run(1, "site-4")
    assert (len(done.updates), received.body) == (1, None)
    assert worker.run(1, "site-1")[1].body is not None  # it goes on


@pytest.mark.parametrize("size", [3, 1 << 18])
def test_an_update_by_itself(hire: Hire, size: int) -> None:
    worker = hire(train)
    worker.begin(1, FLModel({"w": np.zeros(size, np.float32)}), fold=None)
    done, received = worker.run(1, "site-3")
    assert done.updates == ()
    assert (received.shared is None) is (size == 3)
    if received.shared is not None:
        update = decode_update(map_shared(received.shared))
        os.close(received.shared[0])
    else:
        assert received.body is not None
        update = decode_update(received.body.buffer)
    assert set(update.model.params["w"].tolist()) == {2.0}
    assert update.task_id == TaskId("job", 0, 0, "site-3")


def test_states_come_with_the_order_and_go_with_the_answer(hire: Hire) -> None:
    worker = hire(train)
    worker.begin(1, FLModel({"w": np.zeros(2, np.float32)}))
    given = {"site-1": b"".join(encode(FLModel({"runs": 41})))}
    done, _ = worker.run(1, "site-1", "site-2", "site-4", states=given)
    assert {site: decode(state)[0].params for site, state in done.states.items()} == {"site-1": {"runs": 42}, "site-2": {"runs": 1}}
    done, _ = worker.run(1, "site-1")
    assert done.updates[0].model.metrics == {"runs": 1}  # the worker itself keeps nothing
    large = {"site-1": b"".join(encode(FLModel({"runs": 1, "x": np.zeros(100_000)})))}
    assert worker.run(1, "site-1", states=large)[0].updates[0].model.metrics == {"runs": 2}


def test_asks_are_kept_apart_until_they_end(hire: Hire) -> None:
    worker = hire(train)
    worker.begin(9, FLModel({"w": np.zeros(1, np.float32)}), fold=None)
    worker.run(9, "site-1")
    before = psutil.Process(worker.pid).num_fds()
    for ask in range(5):
        worker.begin(ask, FLModel({"w": np.full(1, 10.0 * ask, np.float32)}))
    values = []
    for ask in (3, 0, 4):
        _, received = worker.run(ask, "site-2")
        assert received.body is not None
        values.append(decode(received.body.buffer)[0].params["w"].tolist())
    assert values == [[62.0], [2.0], [82.0]]
    for ask in range(5):
        worker.send(End(ask))
    worker.run(9, "site-1")
    assert psutil.Process(worker.pid).num_fds() == before


def test_the_same_task_again_gives_the_same_bits(hire: Hire) -> None:
    def noisy(model: FLModel, site: Site) -> FLModel:
        return FLModel({"w": np.random.normal(size=3) + site.rng.normal(size=3)})

    def sums(**staff: Any) -> list[bytes]:
        worker = hire(noisy, **staff)
        worker.begin(1, FLModel())
        answers = [worker.run(1, *sites, index=index)[1] for sites, index in [(("site-1", "site-2"), 0), (("site-1",), 1)]]
        return [bytes(answer.body.buffer) for answer in answers if answer.body]

    first = sums()
    assert len({*first}) == 2
    assert sums() == first
    assert not {*first} & {*sums(seed=1)}
    assert not {*first} & {*sums(filters=Filters(server_in=[GaussianNoise(1.0)]))}


def test_a_site_knows_who_it_is(hire: Hire) -> None:
    def who(model: FLModel, site: Site) -> FLModel:
        return FLModel(metrics={"rank": site.rank, "count": site.count, **site.config})

    worker = hire(who, config={"a": 1, "b": 1, "c": 1}, site_config={"site-2": {"b": 2, "c": 2}})
    worker.begin(1, FLModel(), c=3)
    done, _ = worker.run(1, "site-1", "site-2")
    assert [dict(update.model.metrics) for update in done.updates] == [
        {"rank": 0, "count": 5, "a": 1, "b": 1, "c": 3},
        {"rank": 1, "count": 5, "a": 1, "b": 2, "c": 3},
    ]


def test_it_settles_in(hire: Hire) -> None:
    """As many threads as it is told, and Ctrl-C is for the main process alone."""

    def about(model: FLModel, site: Site) -> FLModel:
        os.kill(os.getpid(), signal.SIGINT)
        pools = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
        return FLModel(metrics={"threads": max(pools, default=1), "told": int(os.environ["OMP_NUM_THREADS"])})

    worker = hire(about)
    worker.begin(1, FLModel())
    done, _ = worker.run(1, "site-1")
    assert done.updates[0].model.metrics == {"threads": 1, "told": 1}


def test_it_ends_when_it_is_told_or_left_alone(hire: Hire, script: Path) -> None:
    worker = hire(train)
    worker.send(Close())
    assert decode_answer(worker.link.receive().message) == Closed(())
    assert worker.status() == 0
    worker = hire(train)
    worker.link.close()
    assert worker.status() == 0
    worker = hire(train)
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.status() == -signal.SIGTERM


def test_scripts_end_before_it_does(hire: Hire, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("""
import hanse.client as flare
flare.init()
flare.receive()
flare.send(flare.FLModel(metrics={"x": 1.0}))
flare.log("after", 2.0)
raise ValueError("the end")
""")
    worker = hire(Script(path))
    worker.begin(1, FLModel())
    worker.run(1, "site-1", "site-2")
    worker.send(Close())
    closed = decode_answer(worker.link.receive().message)
    assert isinstance(closed, Closed)
    assert [(ending.site, ending.failure and ending.failure.message) for ending in closed.endings] == [
        (f"site-{number}", "train.py:7: the end") for number in (1, 2)
    ]
    assert closed.endings[0].records[0].key == "after"


def test_what_stops_it_is_seen_and_is_its_status(hire: Hire, capfd: pytest.CaptureFixture[str]) -> None:
    worker = hire(train)
    worker.link.send(b"no order")
    assert worker.status() == 1
    assert "msgspec" in capfd.readouterr().err
