"""What happens in a job, for those who follow it: what its run folder has, then what comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

from hanse.errors import Refused
from hanse.sandbox import files_beneath, open_beneath
from hanse.server.events import Event, events_in
from hanse.server.job_link import is_full
from hanse.server.run_folder import EVENTS

LOGS = "logs"
MAX_WAITING = 10_000
"""A follower that lags so many events behind is let go."""

_MAX_OLD_LINES = 1_000
_MAX_RECENT = 100_000  # of a round; should there be more, a follower that comes in the round misses the first

logger = logging.getLogger(__name__)


class JobEvents:
    """The events of one job. Those of its committed rounds are in `metrics.jsonl`, those since then are kept here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / EVENTS
        self._written_bytes = path.stat().st_size if path.is_file() else 0
        self._recent: deque[Event] = deque(maxlen=_MAX_RECENT)
        self._followers: set[asyncio.Queue[Event | None]] = set()
        self._over = False

    def begin(self) -> None:
        """The workflow starts, or starts again from its last commit: what came after that is void."""
        self._recent.clear()

    def add(self, event: Event) -> None:
        """One that will be in the file with the next commit."""
        self._recent.append(event)
        self._tell(event)

    def committed(self, written_bytes: int) -> None:
        """All events so far are in the file, which is so long now."""
        self._written_bytes = written_bytes
        self._recent.clear()

    def output(self, site: str, lines: list[str]) -> None:
        """Training code at the site printed these lines: they go to the site's log."""
        with contextlib.suppress(FileExistsError):
            (self._folder / LOGS).mkdir()
        try:
            with open(open_beneath(self._folder, f"{LOGS}/{site}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
                file.writelines(line + "\n" for line in lines)
        except OSError as error:
            if is_full(error):
                raise
            logger.warning("what site %s prints is not kept: %s", site, error)  # the workflow's code put something else in its place
        for line in lines:
            self._tell({"event": "output", "site": site, "line": line})

    def end(self) -> None:
        """Nothing more will come; the file has everything."""
        self._over = True
        self._recent.clear()
        for follower in self._followers:
            follower.put_nowait(None)

    async def follow(self, *, live: bool) -> AsyncIterator[Event]:
        """What sites have printed (the last lines of each), the events so far and, if `live`, what comes until the job's end.

        Raises Refused if the reader lags too far behind.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue(MAX_WAITING + 1)
        events = [*_old_output(self._folder), *_events(self._folder, None if self._over else self._written_bytes), *self._recent]
        live = live and not self._over
        if live:
            self._followers.add(queue)
        try:
            for event in events:
                yield event
            while live and (next_event := await queue.get()) is not None:
                if queue.qsize() >= MAX_WAITING:
                    raise Refused("this reader lags too far behind the job's events: it is let go.", hint="Follow the job anew.")
                yield next_event
        finally:
            self._followers.discard(queue)

    def _tell(self, event: Event) -> None:
        for follower in self._followers:
            if follower.qsize() < MAX_WAITING:
                follower.put_nowait(event)


def _events(folder: Path, size: int | None) -> list[Event]:
    with contextlib.suppress(OSError), open(open_beneath(folder, EVENTS), "rb") as file:
        return [event for line in file.read(-1 if size is None else size).splitlines() for event in events_in(line)]
    return []


def _old_output(folder: Path) -> list[Event]:
    events: list[Event] = []
    for path in sorted(path for path in map(Path, files_beneath(folder)) if path.parent == Path(LOGS)):
        with contextlib.suppress(OSError), open(open_beneath(folder, path), errors="replace") as file:
            events += [{"event": "output", "site": path.stem, "line": line} for line in file.read().splitlines()[-_MAX_OLD_LINES:]]
    return events
