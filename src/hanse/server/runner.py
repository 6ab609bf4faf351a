"""Runs one job's workflow to its end, and sees to it that the run folder says how it ended."""

from __future__ import annotations

import asyncio
import signal
import threading
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

from hanse.aggregation.mean import free_memory
from hanse.errors import HanseError, JobFailed, JobStopped
from hanse.server.run_folder import RunFolder


def run_to_end(job: Callable[[], Awaitable[object]], folder: RunFolder, *, signals: bool = True) -> None:
    """Run `job` on an event loop of its own. Ctrl-C and, with `signals`, SIGTERM stop it at once.

    Raises JobFailed, or JobStopped, once the run folder is complete.
    """
    name = folder.facts["job"]["name"]
    try:
        _on_a_loop(job, signals)
    except (KeyboardInterrupt, asyncio.CancelledError):
        done, total = folder.facts["rounds"]["done"], folder.facts["rounds"]["total"]
        reason = f"stopped after {done} of {total} rounds"
        folder.finish("stopped", reason)
        raise JobStopped(f"job {name!r} was {reason}.", folder=str(folder.path), hint=f"Go on with: hanse resume {folder.path}") from None
    except HanseError as error:
        folder.finish("failed", str(error))
        raise JobFailed(f"job {name!r} failed: {error}", folder=str(folder.path)) from None
    except Exception as error:
        folder.event("message", level="error", text=traceback.format_exc())
        at = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"
        folder.finish("failed", reason)
        raise JobFailed(f"job {name!r} failed: {reason}", folder=str(folder.path)) from error
    finally:
        free_memory()
    folder.finish("completed")


def _on_a_loop(job: Callable[[], Awaitable[object]], signals: bool) -> None:
    """Run to the end, in this thread if it has no loop yet (a notebook's has), and pass on what stops it."""

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        if not signals or threading.current_thread() is not threading.main_thread():
            await job()
            return
        before = signal.getsignal(signal.SIGTERM)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await job()
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    if asyncio._get_running_loop() is None:
        asyncio.run(main())
        return

    loop = asyncio.new_event_loop()
    errors: list[BaseException] = []
    ended = threading.Event()  # an interrupted `join` would take the thread for ended

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(main())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="hanse-job")
    try:
        thread.start()
        ended.wait()
    except KeyboardInterrupt:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        ended.wait()
        raise
    if errors:
        raise errors[0]
