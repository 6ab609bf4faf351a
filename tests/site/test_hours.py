from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.errors import ConfigError
from hanse.identity.certificates import Role
from hanse.identity.kit import Kit
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task
from hanse.site.hours import LOOK_AGAIN_S, PAUSED, Hours, pause, resume
from hanse.site.policy import Policy, Window

OneSite = Any  # of conftest.py
TASK = Task("train", FLModel({"w": np.zeros(3, "f4")}))
CODE = """
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    return FLModel(model.params, meta={"examples": 1})
"""


class Clock:
    """Time that passes only when somebody waits; `then` is called at a moment of it."""

    def __init__(self, now: str) -> None:
        self.moment = datetime.fromisoformat(f"2026-03-01 {now}")
        self.waited_s = 0.0
        self.then: dict[float, Callable[[], object]] = {}

    def now(self) -> datetime:
        return self.moment

    async def wait(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)
        self.waited_s += seconds
        for moment in [moment for moment in self.then if moment <= self.waited_s]:
            self.then.pop(moment)()


class Noted(list[tuple[str, dict[str, Any]]]):
    def __call__(self, kind: str, **facts: Any) -> None:
        self.append((kind, facts))


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "21:59"]),
        ("09:30-17:00", ["09:30", "16:59"], ["17:00", "23:00", "00:00", "09:29"]),
    ],
)
def test_a_window_is_a_part_of_every_day(window: str, inside: list[str], outside: list[str]) -> None:
    opened = Window.parse(window)
    assert all(opened.holds(time.fromisoformat(moment)) for moment in inside)
    assert not any(opened.holds(time.fromisoformat(moment)) for moment in outside)
    assert str(opened) == window.replace("-", " to ")


@pytest.mark.parametrize("wrong", ["", "22:00", "22-06", "25:00-06:00", "22:00-22:00", "22:00-06:00-07:00"])
def test_what_is_no_window_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="22:00-06:00"):
        Policy(window=wrong)


async def test_a_task_waits_for_the_window_and_that_is_said_once(tmp_path: Path) -> None:
    clock, noted = Clock("21:50"), Noted()
    hours = Hours(Window.parse("22:00-06:00"), tmp_path, noted, now=clock.now, wait=clock.wait)
    await hours.open()
    assert clock.waited_s == 600
    assert noted == [("waits", {"why": "training may run from 22:00 to 06:00 here, and it is 21:50 [window]"})]
    await hours.open()
    assert clock.waited_s == 600
    clock.moment += timedelta(hours=9)
    await hours.open()
    assert [kind for kind, _ in noted] == ["waits", "waits"]


async def test_a_paused_site_begins_no_task(tmp_path: Path) -> None:
    kit = Kit(federation="f", role=Role.SITE, name="north", organisation="o", server="s:1", folder=tmp_path)
    clock, noted = Clock("12:00"), Noted()
    hours = Hours(None, kit.state_folder, noted, now=clock.now, wait=clock.wait)
    assert hours.closed() is None
    pause(kit, who="ada", why="the scanner is in use")
    clock.then[10 * LOOK_AGAIN_S] = lambda: resume(kit)
    await hours.open()
    assert clock.waited_s == 10 * LOOK_AGAIN_S
    assert [kind for kind, _ in noted] == ["paused", "waits", "resumed"]
    assert noted[0][1]["why"].startswith("by ada, ")
    assert noted[0][1]["why"].endswith(": the scanner is in use")
    with pytest.raises(ConfigError, match="is not paused"):
        resume(kit)


async def test_a_pause_is_noticed_though_there_is_no_task(tmp_path: Path) -> None:
    clock, noted = Clock("12:00"), Noted()
    hours = Hours(None, tmp_path, noted, now=clock.now, wait=clock.wait)
    clock.then[4] = (tmp_path / PAUSED).touch
    clock.then[8] = (tmp_path / PAUSED).unlink

    class End(Exception):
        pass

    def end() -> None:
        raise End

    clock.then[20] = end
    with pytest.raises(End):
        await hours.watch()
    assert noted == [("paused", {"why": "by somebody"}), ("resumed", {})]


async def test_a_paused_agent_stays_connected_and_goes_on_later(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    pause(one_site.kit, who="ada")
    await one_site.start()
    await one_site.take(job_folder(CODE))
    one_site.server.assign((0, 0), TASK)
    ledger = one_site.kit.state_folder / "audit.jsonl"
    async with asyncio.timeout(60):
        while b'"kind":"waits"' not in ledger.read_bytes():
            await asyncio.sleep(0.02)
    resume(one_site.kit)
    assert (await one_site.server.update((0, 0))).failure is None
    kinds = [line["kind"] for line in one_site.audit()]
    assert kinds[:2] == ["start", "paused"]
    assert kinds.index("resumed") < kinds.index("task")
    pause(one_site.kit, who="ada")
    one_site.agents[0].terminate()
    await one_site.agents[0].wait()
    await one_site.start()
    assert [line["kind"] for line in one_site.audit()][-2:] == ["start", "paused"]  # it survives a restart


def test_the_commands(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hanse.cli.site import app
    from hanse.identity.kit import write_kit

    write_kit(tmp_path, Kit(federation="f", role=Role.SITE, name="north", organisation="o", server="s:1"))
    paused = CliRunner().invoke(app, ["pause", str(tmp_path), "--why", "maintenance"])
    assert paused.stdout == f"north is paused. Go on with: hanse site resume {tmp_path}\n"
    hours = Hours(None, tmp_path / "state", Noted())
    assert (hours.closed() or "").endswith(": maintenance")
    assert CliRunner().invoke(app, ["resume", str(tmp_path)]).stdout == "north is resumed\n"
    assert hours.closed() is None
