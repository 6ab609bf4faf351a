"""An asynchronous workflow and `kill -9`: a real server and real workflow processes; sites are small ones in this process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hanse.cohort import STREAMED
from hanse.jobs.asynchronous import FedBuffRecipe
from hanse.messages.wire import Assignment, Received, TaskRef, Withdraw
from hanse.server.run import Run

if TYPE_CHECKING:
    from tests.server.conftest import Federates, SmallSite

APP = """
import numpy as np
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    return FLModel({"w": model.params["w"] + np.float32(1)}, metrics={"loss": 1.0})
"""
ROUNDS, KILLED_AT = 6, 3


@pytest.mark.parametrize("size", [3, 200_000])
async def test_kill_9_of_the_workflow_goes_on_from_the_last_commit(
    size: int, real_federation: Federates, load: Callable[[str], Any]
) -> None:
    """`b` is at a task of version 0 when the process is killed, and `a` has brought the first of two updates of version 3."""
    recipe = FedBuffRecipe(name="job", model={"w": np.zeros(size, "f4")}, app=load(APP).app, rounds=ROUNDS, buffer=2, best="min loss")
    first_of_a, second_of_a = (TaskRef(KILLED_AT, STREAMED + 2 * nth) for nth in (0, 1))
    first_of_b, new_of_b = TaskRef(0, STREAMED + 1), TaskRef(KILLED_AT, STREAMED + 1)
    async with real_federation() as federation:
        killed, over = asyncio.Event(), asyncio.Event()

        async def wait(site: SmallSite, assignment: Assignment) -> bool:
            if assignment.task == first_of_b:
                site.unacknowledged[first_of_b] = await site.delivery(assignment)
                await killed.wait()
            if assignment.task in (second_of_a, new_of_b):
                await over.wait()
            return True

        def given(site: SmallSite, task: TaskRef) -> bool:
            return any(isinstance(message, Assignment) and message.task == task for message in site.heard)

        a, b = await federation.site("a", recipe, hook=wait), await federation.site("b", recipe, hook=wait)
        job = (await federation.submit(recipe))["job"]
        await a.until(lambda: Received(job=job, task=first_of_a) in a.heard and given(a, second_of_a))
        running = federation.service._active[job].running
        assert running is not None
        assert running.pid is not None
        os.kill(running.pid, signal.SIGKILL)
        await b.until(lambda: given(b, new_of_b) and Withdraw(job=job, tasks=[first_of_b]) in b.heard)
        killed.set()
        await b.until(lambda: Received(job=job, task=first_of_b) in b.heard)  # it was on its way
        async with aclosing(federation.client().follow("logs", job=job, follow=True)) as events:
            async for event in events:
                if event["event"] == "update" and event["round"] == KILLED_AT:
                    break  # what was kept has been taken
        over.set()
        assert (await federation.finished(job))["status"] == "completed"
        run = Run(federation.settings.state / "jobs" / job)
        assert a.performed.count(first_of_a) == 1  # it was acknowledged, and is not asked for again
        updates = [(event["round"], event["site"], event["staleness"]) for event in run.events("update")]
        assert updates[: 2 * KILLED_AT + 1] == [(number, "a", 0) for number in range(KILLED_AT) for _ in range(2)] + [(KILLED_AT, "a", 0)]
        assert [number for number, _, _ in updates] == [number for number in range(ROUNDS) for _ in range(2)]
        assert (KILLED_AT, "b", KILLED_AT) not in updates
        assert run.events("failure") == []
        assert await running._store.update_keys(job) == set()
