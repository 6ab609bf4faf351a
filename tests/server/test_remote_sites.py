"""The courier over a real link; at its other end a server that answers at once, in the order that the test says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.aggregation.mean import WeightedMean
from hanse.cohort import Cohort, group_by_rank
from hanse.errors import Failure, LinkBroken
from hanse.filters import Filters
from hanse.messages.codec import decode_task, encode_update
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Update
from hanse.messages.wire import INLINE_BYTES, Blob, TaskRef
from hanse.server.job_link import Arrived, Ask, GiveUp, Noted, Stop, decode_from_job, encode
from hanse.server.remote_sites import RemoteSites
from hanse.server.run_folder import RunFolder
from hanse.transport.blobs import FolderBlobs
from hanse.transport.courier import Ask as CourierAsk
from hanse.transport.memory import MemoryLink


class Server:
    """Answers each ask with one update for each site, `answer` says which; None: none."""

    def __init__(self, link: MemoryLink, updates: FolderBlobs, tasks: FolderBlobs) -> None:
        self.link, self.updates, self.tasks = link, updates, tasks
        self.messages: list[Any] = []
        self.answer: Callable[[Ask, str, Task], Update | None] = lambda ask, site, task: None
        self.order = random.Random(7)

    def hear(self) -> None:
        try:
            received = self.link.receive_ready()
        except LinkBroken:
            return
        for each in received:
            message = decode_from_job(each.message)
            self.messages.append(message)
            if isinstance(message, Ask):
                frame = self.tasks.map(message.blob) if message.blob else bytes(each.body.buffer) if each.body else b""
                task = decode_task(frame)
                for site in self.order.sample(message.sites, len(message.sites)):
                    if (update := self.answer(message, site, task)) is not None:
                        self.send(message.task, update)
            if each.body is not None:
                each.body.release()

    def send(self, task: TaskRef, update: Update) -> None:
        parts = encode_update(update)
        if update.failure is not None:
            self.link.send(encode(Arrived(task=task, site=update.site, failure=update.failure)))
        elif sum(memoryview(part).nbytes for part in parts) > INLINE_BYTES:
            self.link.send(encode(Arrived(task=task, site=update.site, blob=self.updates.write(parts))))
        else:
            self.link.send(encode(Arrived(task=task, site=update.site)), parts)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    here, there = MemoryLink.pair()
    server = Server(here, FolderBlobs(tmp_path / "updates"), FolderBlobs(tmp_path / "tasks"))
    server.other_end = there  # type: ignore[attr-defined]
    yield server
    here.close()
    there.close()


def courier(server: Server, names: list[str]) -> RemoteSites:
    def gone() -> None:
        raise AssertionError("the server is gone")

    link: MemoryLink = server.other_end  # type: ignore[attr-defined]
    return RemoteSites(link, tuple(names), server.updates.folder, server.tasks, filters=Filters(), seed=0, gone=gone)


def update_of(ask: Ask, site: str, size: int, names: list[str]) -> Update:
    rng = np.random.default_rng(names.index(site))
    model = FLModel({"w": rng.normal(size=size).astype("f4")}, meta={"examples": 1 + names.index(site)})
    return Update(site, TaskId("job", ask.task.commit, ask.task.index, site), model)


def an_ask(names: list[str], size: int, *, index: int = 0) -> CourierAsk:
    groups = group_by_rank({name: rank for rank, name in enumerate(names)}, len(names))
    return CourierAsk(Task("train", FLModel({"w": np.zeros(size, "f4")})), ("job", 0, index), groups)


@pytest.mark.parametrize(("count", "size"), [(3, 10), (3, 1 << 18), (100, 10), (70, 30_000)])
async def test_a_mean_has_the_bits_of_one_taken_in_order(server: Server, tmp_path: Path, count: int, size: int) -> None:
    """Inline and as blobs, sites by themselves and in groups."""
    names = [f"site-{number:03d}" for number in range(count)]
    server.answer = lambda ask, site, task: update_of(ask, site, size, names)
    asyncio.get_running_loop().add_reader(server.link.socket, server.hear)
    sites = courier(server, names)
    folder = RunFolder(tmp_path, {}, listen=lambda event: None, progress=lambda *_: None)
    cohort = Cohort(sites, folder, job_id="job")
    with sites.listening(stop=lambda: None):
        reduced = await cohort.reduce(Task("train", FLModel({"w": np.zeros(size, "f4")})), WeightedMean())
    asyncio.get_running_loop().remove_reader(server.link.socket)
    total = WeightedMean()
    ask = Ask(task=TaskRef(0, 0), sites=names)
    for group in group_by_rank({name: rank for rank, name in enumerate(names)}, count):
        part = WeightedMean()
        for site in group:
            part.add(update_of(ask, site, size, names))
            part.fold()
        total.merge(part.partial())
    np.testing.assert_array_equal(reduced.model.params["w"], total.result().params["w"])
    assert [update.site for update in reduced.updates] == names


async def test_a_large_task_is_one_blob_that_is_gone_afterwards(server: Server) -> None:
    names = ["a", "b", "c"]
    server.answer = lambda ask, site, task: update_of(ask, site, task.model.params["w"].size, names)
    asyncio.get_running_loop().add_reader(server.link.socket, server.hear)
    sites = courier(server, names)
    with sites.listening(stop=lambda: None):
        updates = [update async for update in sites.ask(an_ask(names, 1 << 18))]
    assert {update.site for update in updates} == set(names)
    server.hear()
    asyncio.get_running_loop().remove_reader(server.link.socket)
    ask, over = server.messages
    assert isinstance(ask, Ask)
    assert ask.blob is not None
    assert over == GiveUp(task=TaskRef(0, 0))
    assert not server.tasks.has(ask.blob)


async def test_updates_of_an_ask_outlive_it_and_their_blobs(server: Server) -> None:
    names = ["a"]
    server.answer = lambda ask, site, task: update_of(ask, site, 1 << 18, names)
    asyncio.get_running_loop().add_reader(server.link.socket, server.hear)
    sites = courier(server, names)
    with sites.listening(stop=lambda: None):
        (update,) = [update async for update in sites.ask(an_ask(names, 4))]
    asyncio.get_running_loop().remove_reader(server.link.socket)
    expected = update_of(Ask(task=TaskRef(0, 0), sites=names), "a", 1 << 18, names)
    for path in server.updates.folder.glob("??/*"):
        server.updates.remove(Blob(bytes.fromhex(path.name), path.stat().st_size))
    server.updates.write([bytes(path.stat().st_size) for path in (server.updates.folder / "spare").iterdir()])  # over what is free
    np.testing.assert_array_equal(update.model.params["w"], expected.model.params["w"])


async def test_a_failure_takes_the_updates_place(server: Server) -> None:
    names = ["a", "b"]
    away = Failure("SiteAway", "it is away")

    def answer(ask: Ask, site: str, task: Task) -> Update:
        update = update_of(ask, site, 4, names)
        return update if site == "a" else Update("b", update.task_id, failure=away)

    server.answer = answer
    asyncio.get_running_loop().add_reader(server.link.socket, server.hear)
    sites = courier(server, names)
    with sites.listening(stop=lambda: None):
        folded = [each async for each in sites.fold(an_ask(names, 4), WeightedMean())]
    asyncio.get_running_loop().remove_reader(server.link.socket)
    assert {each.updates[0].site: each.updates[0].failure for each in folded} == {"a": None, "b": away}
    assert all(each.partial is None for each in folded)


async def test_what_comes_after_an_ask_was_given_up_is_let_go(server: Server) -> None:
    names = ["a", "b"]
    server.answer = lambda ask, site, task: update_of(ask, site, 4, names) if site == "a" else None
    asyncio.get_running_loop().add_reader(server.link.socket, server.hear)
    sites = courier(server, names)
    with sites.listening(stop=lambda: None):
        replies = sites.ask(an_ask(names, 4))
        assert (await anext(replies)).site == "a"
        await replies.aclose()
        server.send(TaskRef(0, 0), update_of(Ask(task=TaskRef(0, 0), sites=names), "b", 30_000, names))
        server.answer = lambda ask, site, task: update_of(ask, site, 30_000, names)
        late = [update.site async for update in sites.ask(an_ask(names, 30_000, index=1))]
    asyncio.get_running_loop().remove_reader(server.link.socket)
    assert sorted(late) == names


async def test_stop_is_heard_even_if_it_came_early_or_with_much_else(server: Server) -> None:
    stopped = asyncio.Event()
    server.link.send(encode(Stop()))
    sites = courier(server, ["a"])
    sites.tell(Noted(event=b"x" * 100_000))  # large: it looks for free memory, and takes in what has come
    with sites.listening(stop=stopped.set):
        async with asyncio.timeout(10):
            await stopped.wait()
