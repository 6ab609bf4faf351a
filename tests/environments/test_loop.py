"""Ordinary code that waits for a coroutine, and what Ctrl-C and SIGTERM do to it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from hanse.environments.loop import run_async


async def interrupted(by: int) -> None:
    """Sends this process a signal and waits for what comes of it."""
    os.kill(os.getpid(), by)
    await asyncio.Event().wait()


async def cleaning_up(by: int) -> str:
    try:
        await interrupted(by)
    except asyncio.CancelledError:
        return "cleaned up"
    return "not reached"


async def three() -> int:
    await asyncio.sleep(0)
    return 3


async def failing() -> int:
    raise ValueError("no")


def test_it_returns_what_comes_out() -> None:
    assert run_async(three()) == 3
    with pytest.raises(ValueError, match="no"):
        run_async(failing())


async def test_in_a_notebook() -> None:
    before = set(threading.enumerate())
    assert run_async(three()) == 3
    with pytest.raises(ValueError, match="no"):
        run_async(failing())
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_it(by: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_async(interrupted(by))
    assert run_async(cleaning_up(by)) == "cleaned up"
    assert signal.getsignal(signal.SIGTERM) is before


async def test_ctrl_c_in_a_notebook() -> None:
    """There the signal comes to the thread that waits, and the job in the other one is cancelled."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a notebook's; the test's own loop has another one
    try:
        with pytest.raises(KeyboardInterrupt):
            run_async(interrupted(signal.SIGINT))
        assert run_async(cleaning_up(signal.SIGINT)) == "cleaned up"
    finally:
        signal.signal(signal.SIGINT, before)
