"""Runs a coroutine to its end from ordinary code, and in a notebook too."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns. Ctrl-C and SIGTERM cancel it once; what it does then is up to it, and a second Ctrl-C ends it.

    Raises what it raises, or KeyboardInterrupt if it let itself be cancelled.
    """
    if asyncio._get_running_loop() is not None:
        return _in_a_thread(main)  # a notebook's loop is running in this one
    try:
        with asyncio.Runner() as runner:
            return runner.run(_stoppable(main))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _stoppable(main: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    if threading.current_thread() is not threading.main_thread():
        return await main
    before = signal.getsignal(signal.SIGTERM)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await main
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _in_a_thread(main: Coroutine[Any, Any, T]) -> T:
    outcome: list[T] = []
    errors: list[BaseException] = []
    began, ended = threading.Event(), threading.Event()
    tasks: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def noted() -> T:
        task = asyncio.current_task()
        assert task is not None
        tasks.append((asyncio.get_running_loop(), task))
        began.set()
        return await main

    def run() -> None:
        try:
            with asyncio.Runner() as runner:
                outcome.append(runner.run(noted()))
        except asyncio.CancelledError:
            errors.append(KeyboardInterrupt())
        except BaseException as error:
            errors.append(error)
        finally:
            began.set()
            ended.set()

    thread = threading.Thread(target=run, name="hanse-job")
    while not ended.is_set():
        try:
            if thread.ident is None and not began.is_set():
                thread.start()  # which waits too, and may be interrupted once the thread is there
            ended.wait()  # an interrupted join would take the thread for ended
        except KeyboardInterrupt:
            if not began.wait(10):
                raise
            for loop, task in tasks:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(task.cancel)
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]
