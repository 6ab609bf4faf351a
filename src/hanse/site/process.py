"""What a process that runs training code does before it begins: the same in a simulation's worker and in a site's trainer."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from importlib import import_module

import threadpoolctl  # type: ignore[import-untyped]

from hanse.app import App
from hanse.client.framework import load_adapter, loaded
from hanse.client.script import Script, imported_modules
from hanse.process import die_with_parent, tune_memory

_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_MMAP_FROM_BYTES = 32 << 20
_KEEP_BYTES = 256 << 20
KEEP_ALL = -1
_LARGE_BYTES = 4 << 20


def thread_settings(threads: int) -> dict[str, str]:
    """The environment variables by which numerical libraries are told how many threads to compute with."""
    return dict.fromkeys(_THREAD_SETTINGS, str(threads))


def preload(code: App | Script, framework: str | None) -> None:
    """Import what the sites' code will: in a simulation before the workers are forked, once for all of them, in memory that they share."""
    if framework is not None:
        load_adapter(framework).preload()
    if isinstance(code, Script):
        for name in imported_modules(code.path):
            with contextlib.suppress(Exception):  # the script will say so itself, to whom it concerns
                import_module(name)


def stay_small() -> None:
    """Have glibc share one heap among threads and give freed memory back. gRPC's threads pass buffers on to each other: with a heap for
    each of them, an agent through which a model of 1 GiB has gone keeps up to half of it."""
    tune_memory(arenas=1, map_from_bytes=_LARGE_BYTES, keep_bytes=4 * _LARGE_BYTES)


def settle_in(threads: int, *, keep_bytes: int = _KEEP_BYTES) -> None:
    """Make this process a worker: die with the parent, leave Ctrl-C to it, and compute with so many threads.

    keep_bytes: so much freed memory is kept for the next task; KEEP_ALL for all of it.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    tune_memory(map_from_bytes=_MMAP_FROM_BYTES, keep_bytes=keep_bytes)  # touching new pages costs more than keeping old ones
    os.environ.update(thread_settings(threads))
    threadpoolctl.threadpool_limits(threads)
    for adapter in loaded():
        adapter.limit_threads(threads)
    gc.freeze()
