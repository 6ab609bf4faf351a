"""The trainer as a process of its own, told what to do by the test in the agent's place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hanse.client.script import Script
from hanse.client.session import SiteInfo
from hanse.errors import LinkBroken
from hanse.filters import ClipNorm, Filters
from hanse.jobs.bundle import MODEL
from hanse.messages.codec import decode, decode_update, encode, encode_task, encode_update
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Update
from hanse.messages.wire import TaskRef
from hanse.site import launcher, orders
from hanse.site.launcher import Trainer
from hanse.site.orders import Begin, Close, Closed, Lines, Perform, Performed, Restore, Unfit
from hanse.site.runner import SiteRunner
from hanse.transport.memory import SharedBody

Start = Callable[..., Trainer]

APP = """
import numpy as np
from hanse import App, FLModel

app = App()
kept = []

@app.train
def train(model, site):
    kept.append(model.params["w"])
    rounds = site.state["rounds"] = site.state.get("rounds", 0) + 1
    print("where", site.config["where"])
    w = kept[-1] + site.rng.normal(size=kept[-1].size) * rounds
    return FLModel({"w": w.astype("f4")}, metrics={"rounds": rounds, "first": float(kept[0][0])}, meta={"examples": 3})

@app.task("hungry")
def hungry(model, site):
    return FLModel({"w": np.ones(200_000_000, "f8")})

@app.task("odd")
def odd(model, site):
    return FLModel({"w": np.ones(1)}, meta={"why": object()})

@app.task("busy")
def busy(model, site):
    while True:
        pass
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Trainer] = []

    def start(job: Path, **begin: Any) -> Trainer:
        about = {"folder": str(job), "site": "site-1", "rank": 0, "sites": 1, "config": {"where": "there"}, **begin}
        started.append(launcher.start(Begin(**about), tmp_path / f"work-{len(started)}", sandbox=None))
        return started[-1]

    yield start
    for trainer in started:
        if trainer.process.returncode is None:
            trainer.end()


def task(value: float, size: int = 3, name: str = "train") -> Task:
    return Task(name, FLModel({"w": np.full(size, value, "f4")}))


def perform(trainer: Trainer, ref: TaskRef, asked: Task, *, shared: bool = False) -> tuple[Update, Performed, list[str]]:
    frame, order, lines = encode_task(asked), orders.encode(Perform(task=ref)), list[str]()
    if shared:
        body = SharedBody(frame)
        trainer.link.send_shared(order, body)
        body.close()
    else:
        trainer.link.send(order, frame)
    while True:
        received = trainer.link.receive()
        said = orders.decode_answer(received.message)
        if isinstance(said, Lines):
            lines += said.lines
            continue
        assert isinstance(said, Performed), said
        assert received.body is not None
        update = decode_update(bytes(received.body.buffer))
        received.body.release()
        return update, said, lines


def simulated(code: Any, values: list[float], *, size: int = 3, filters: Filters | None = None, seed: int = 0) -> list[Update]:
    runner, state = SiteRunner(code, filters=filters, sink=lambda site, line: None), dict[str, Any]()
    info = SiteInfo("site-1", job_id="job", seed=seed, config={"where": "there"})
    found = []
    for commit, value in enumerate(values):
        update = runner.run(info, task(value, size), TaskId("job", commit, 0, "site-1"), state)
        found.append(decode_update(b"".join(encode_update(update))))
    runner.close()
    return found


@pytest.mark.parametrize("size", [3, 40_000, 400_000])
@pytest.mark.parametrize("shared", [False, True])
def test_it_gives_the_bits_of_the_simulation_without_the_first_model(
    start: Start, job_folder: Callable[..., Path], load: Callable[[str], Any], size: int, shared: bool
) -> None:
    filters = Filters(site_out=[ClipNorm(0.5)])
    folder = job_folder(APP, filters=filters, seed=7)
    (folder / MODEL).unlink()
    trainer = start(folder)
    for commit, expected in enumerate(simulated(load(APP).app, [1, 2, 3], size=size, filters=filters, seed=7)):
        update, said, lines = perform(trainer, TaskRef(commit, 0), task(commit + 1, size), shared=shared)
        assert update.failure is None, update.failure
        assert_array_equal(update.model.params["w"], expected.model.params["w"])
        assert dict(update.model.metrics) == dict(expected.model.metrics)  # "first": what the code keeps of a task stays as it was
        assert update.task_id == ("job", commit, 0, "site-1")
        assert said.task == TaskRef(commit, 0)
        assert said.cpu_s > 0
        assert lines == ["where there"]
        assert said.state is not None
        assert decode(said.state)[0].params == {"rounds": commit + 1}


def test_it_goes_on_from_the_state_it_is_given(start: Start, job_folder: Callable[..., Path]) -> None:
    trainer = start(job_folder(APP))
    trainer.link.send(orders.encode(Restore()), encode(FLModel(params={"rounds": 41})))
    assert perform(trainer, TaskRef(5, 0), task(0))[0].model.metrics["rounds"] == 42
    trainer.link.send(orders.encode(Restore()))
    assert perform(trainer, TaskRef(5, 0), task(0))[0].model.metrics["rounds"] == 1


def test_a_script_runs_to_its_end_when_the_job_is_over(start: Start, job_folder: Callable[..., Path], script: Path) -> None:
    script.write_text(script.read_text() + "raise RuntimeError('at the end')\n")
    trainer = start(job_folder(script, argv=["2"]))
    for commit, expected in enumerate(simulated(Script(script, ("2",)), [1, 2])):
        update, *_ = perform(trainer, TaskRef(commit, 0), task(commit + 1))
        assert_array_equal(update.model.params["w"], expected.model.params["w"])
    trainer.link.send(orders.encode(Close()))
    closed = orders.decode_answer(trainer.link.receive().message)
    assert isinstance(closed, Closed)
    assert closed.problem is not None
    assert "at the end" in closed.problem.message
    assert trainer.process.wait(60) == 0


def test_a_changed_file_is_told(start: Start, job_folder: Callable[..., Path]) -> None:
    folder = job_folder(APP)
    (code,) = (folder / "code").glob("*.py")
    code.write_text(APP + "\n# changed\n")
    trainer = start(folder)
    said = orders.decode_answer(trainer.link.receive().message)
    assert isinstance(said, Unfit)
    assert said.failure.code == "ConfigError"
    assert code.name in said.failure.message
    assert trainer.process.wait(60) == 0


def test_an_answer_without_a_form_is_a_failure_and_no_death(start: Start, job_folder: Callable[..., Path]) -> None:
    trainer = start(job_folder(APP))
    update, *_ = perform(trainer, TaskRef(0, 0), task(1, name="odd"))
    assert update.failure is not None
    assert update.failure.code == "ConfigError"
    assert perform(trainer, TaskRef(0, 1), task(1))[0].failure is None


def test_memory_is_limited(start: Start, job_folder: Callable[..., Path]) -> None:
    trainer = start(job_folder(APP), memory_bytes=800 << 20)
    update, *_ = perform(trainer, TaskRef(0, 0), task(1, name="hungry"))
    assert update.failure is not None
    assert "allocate" in update.failure.message
    assert perform(trainer, TaskRef(0, 1), task(1))[0].failure is None


def test_cpu_seconds_are_limited(start: Start, job_folder: Callable[..., Path]) -> None:
    trainer = start(job_folder(APP), cpu_s=0.1)
    with pytest.raises(LinkBroken):
        perform(trainer, TaskRef(0, 0), task(1, name="busy"))
    ended = trainer.end()
    assert str(ended) == "was killed by SIGXCPU"
    assert 0.1 < ended.cpu_s < 10


def test_it_dies_with_the_agent(tmp_path: Path, job_folder: Callable[..., Path]) -> None:
    code = f"""
import os, sys
from pathlib import Path
from hanse.site import launcher, orders
begin = orders.Begin(folder={str(job_folder(APP))!r}, site="site-1", rank=0, sites=1, config={{"where": "there"}})
trainer = launcher.start(begin, Path({str(tmp_path / "work")!r}), sandbox=None)
from hanse.messages.codec import encode_task
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task
from hanse.messages.wire import TaskRef
order = orders.encode(orders.Perform(task=TaskRef(0, 0)))
trainer.link.send(order, encode_task(Task("odd", FLModel())))
trainer.link.receive()
trainer.link.send(order, encode_task(Task("busy", FLModel())))
print(trainer.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False).stdout
    trainer = os.pidfd_open(int(said)) if Path(f"/proc/{int(said)}").exists() else None
    if trainer is not None:
        import select

        assert select.select([trainer], [], [], 60)[0]
        os.close(trainer)


def test_it_ends_if_the_agent_is_gone_before_it_is_up(start: Start, job_folder: Callable[..., Path]) -> None:
    trainer = start(job_folder(APP))
    trainer.link.send(orders.encode(Perform(task=TaskRef(0, 0))), encode_task(task(1, name="busy")))  # it could do this, and for ever
    trainer.link.close()
    assert trainer.process.wait(60) == 1


def test_importing_it_is_light() -> None:
    heavy = ["grpc", "cryptography", "sqlalchemy", "torch", "hanse.jobs.recipe", "hanse.workflows"]
    code = f"import sys, hanse.site.trainer; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
