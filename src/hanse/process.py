"""What a process of Hanse asks of the system for itself: to end with its parent, and how its memory is kept."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # of <malloc.h>


def die_with_parent() -> None:
    """Linux ends this process when the one that started it ends. Elsewhere it ends when it finds its link broken."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def tune_memory(*, arenas: int | None = None, map_from_bytes: int | None = None, keep_bytes: int | None = None) -> None:
    """Set what is given, where the C library is glibc: how many heaps its threads share, from which size on a piece of memory is mapped by
    itself, and how much freed memory is kept (-1: all of it)."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError):  # glibc alone has it
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_ARENA_MAX, arenas), (_MMAP_THRESHOLD, map_from_bytes), (_TRIM_THRESHOLD, keep_bytes)):
            if value is not None:
                mallopt(parameter, value)
