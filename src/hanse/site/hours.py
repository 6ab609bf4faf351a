"""When a site begins tasks: within the daily window of its policy, and while nobody has paused it. A task that runs may finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from hanse.errors import ConfigError, StorageFull
from hanse.identity.kit import Kit
from hanse.site.kept import write_whole
from hanse.site.policy import Window

PAUSED = "paused"
"""The file in a site's state folder that pauses it, with one line that says by whom and why."""

LOOK_AGAIN_S = 2.0
_LONGEST_LINE = 200

logger = logging.getLogger(__name__)


class Hours:
    """Whether tasks may begin. What it finds changed it says to the log, and `note` puts it into the audit log.

    now: the present in local time. wait: passes so many seconds. Both are for tests to give.
    """

    def __init__(
        self,
        window: Window | None,
        state: Path,
        note: Callable[..., None],
        *,
        now: Callable[[], datetime] = datetime.now,
        wait: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._window, self._file, self._note, self._now, self._wait = window, state / PAUSED, note, now, wait
        self._paused: str | None = None
        self._waits = False

    async def open(self) -> None:
        """Returns when a task may begin."""
        while (why := self.closed()) is not None:
            if not self._waits:
                self._waits = True
                logger.info("tasks wait: %s", why)
                self._note("waits", why=why)
            await self._wait(LOOK_AGAIN_S)
        self._waits = False

    async def watch(self) -> None:
        """Notice, for ever, when the site is paused or resumed, though there is no task."""
        while True:
            try:
                self.closed()
            except StorageFull as error:
                logger.error("%s", error)
            await self._wait(LOOK_AGAIN_S)

    def closed(self) -> str | None:
        """Why no task may begin now; None if one may."""
        paused = _line(self._file)
        if paused != self._paused:
            self._note("resumed" if paused is None else "paused", **({} if paused is None else {"why": paused}))
            logger.info("the site is %s", "resumed" if paused is None else f"paused {paused}")
            self._paused = paused
        if paused is not None:
            return f"the site is paused {paused}"
        if self._window is not None and not self._window.holds(self._now().time()):
            return f"training may run from {self._window} here, and it is {self._now():%H:%M} [window]"
        return None


def pause(kit: Kit, *, who: str, why: str = "") -> None:
    """Have the site begin no task until it is resumed, also after a restart of its agent. Raises StorageFull."""
    kit.state_folder.mkdir(parents=True, exist_ok=True)
    said = f"by {who}, {datetime.now():%Y-%m-%d %H:%M}{': ' if why else ''}{why}"
    write_whole(kit.state_folder / PAUSED, said.encode())


def resume(kit: Kit) -> None:
    """Have the site begin tasks again. Raises ConfigError if it is not paused."""
    try:
        (kit.state_folder / PAUSED).unlink()
    except FileNotFoundError as error:
        raise ConfigError(f"site {kit.name} is not paused") from error


def _line(path: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_LONGEST_LINE).strip() or "by somebody"
    return None
