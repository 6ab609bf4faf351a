from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hanse.errors import ConfigError, JobFailed, JobStopped, TooFewUpdates
from hanse.server.run_folder import RunFolder
from hanse.server.runner import run_to_end

RunJob = Callable[[Callable[[], Awaitable[object]]], None]


@pytest.fixture
def run(tmp_path: Path) -> RunJob:
    facts = {"job": {"name": "a"}, "rounds": {"done": 1, "total": 5}, "status": "running"}

    def run(job: Callable[[], Awaitable[object]]) -> None:
        run_to_end(job, RunFolder(tmp_path, facts, listen=lambda event: None, progress=lambda *_: None))

    return run


def facts(path: Path) -> tuple[str, str]:
    found = json.loads((path / "run.json").read_text())
    return found["status"], found["reason"]


def signalled(number: int) -> Callable[[], Awaitable[object]]:
    """A job that is sent a signal and would go on for ever."""

    async def job() -> None:
        os.kill(os.getpid(), number)
        await asyncio.get_running_loop().create_future()

    return job


async def succeeds() -> None:
    await asyncio.sleep(0)


def test_a_job_that_succeeds(run: RunJob, tmp_path: Path) -> None:
    run(succeeds)
    assert facts(tmp_path) == ("completed", "")


def test_a_job_that_fails_with_an_error_of_ours(run: RunJob, tmp_path: Path) -> None:
    async def job() -> None:
        raise TooFewUpdates("0 of 2.", reasons={"b": "no data"})

    with pytest.raises(JobFailed, match=r"job 'a' failed: 0 of 2.\n  b: no data") as failed:
        run(job)
    assert type(failed.value) is JobFailed
    assert failed.value.folder == str(tmp_path)
    assert facts(tmp_path) == ("failed", "0 of 2.\n  b: no data")


def test_a_workflow_with_a_mistake(run: RunJob, tmp_path: Path) -> None:
    async def job() -> None:
        raise KeyError("accuracy")

    with pytest.raises(JobFailed, match=r"KeyError: 'accuracy' \(test_runner.py, line \d+\)"):
        run(job)
    assert facts(tmp_path)[1].startswith("KeyError: 'accuracy' (test_runner.py, line ")
    message, end = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (message["level"], end["status"]) == ("error", "failed")
    assert 'raise KeyError("accuracy")' in message["text"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_stopped(run: RunJob, tmp_path: Path, number: int) -> None:
    with pytest.raises(JobStopped) as stopped:
        run(signalled(number))
    assert str(stopped.value) == f"job 'a' was stopped after 1 of 5 rounds. Go on with: hanse resume {tmp_path}"
    assert facts(tmp_path) == ("stopped", "stopped after 1 of 5 rounds")


def test_the_callers_own_handlers_are_back_afterwards(run: RunJob) -> None:
    def mine(*_: Any) -> None:
        pass

    before = [signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        run(succeeds)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [mine, mine]
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


# In a notebook a loop is running already: the job gets a thread of its own.


async def test_in_a_running_loop(run: RunJob, tmp_path: Path) -> None:
    seen = []

    async def job() -> None:
        seen.append(threading.current_thread())

    run(job)
    assert seen[0] is not threading.current_thread()
    assert facts(tmp_path) == ("completed", "")
    with pytest.raises(JobFailed, match="wrong"):
        run(fails)
    assert "hanse-job" not in [thread.name for thread in threading.enumerate()]


async def fails() -> None:
    raise ConfigError("wrong")


async def test_interrupted_in_a_running_loop(run: RunJob, tmp_path: Path) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(JobStopped):
            run(signalled(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert facts(tmp_path)[0] == "stopped"
    assert "hanse-job" not in [thread.name for thread in threading.enumerate()]


def test_in_a_thread(run: RunJob, tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=[succeeds])
    thread.start()
    thread.join()
    assert facts(tmp_path) == ("completed", "")
