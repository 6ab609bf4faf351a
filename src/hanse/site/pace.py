"""Holds a site's transfers to the rate that its policy gives them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

BURST_S = 1.0
"""What was not used of this long may be used at once."""


class Pace:
    """A token bucket for one direction: it fills with `bytes_per_second`, holds what comes in a second, and `take` empties it.

    clock: seconds that never go back. wait: passes so many of them. Both are for tests to give.
    """

    def __init__(
        self,
        bytes_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._rate, self._clock, self._wait = bytes_per_second, clock, wait
        self._full_at = clock()

    async def take(self, count: int) -> None:
        """Returns when so many bytes may have been transferred. More than the bucket holds are waited for afterwards, by the next one."""
        now = self._clock()
        self._full_at = max(self._full_at, now) + count / self._rate
        if (wait_s := self._full_at - now - BURST_S) > 0:
            await self._wait(wait_s)
