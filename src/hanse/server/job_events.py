"""What happens in a job, for those who follow it: what its run folder has, then what comes."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hanse.errors import Refused
from hanse.server.run_folder import EVENTS

LOGS = "logs"
MAX_WAITING = 10_000
"""A follower that lags so many events behind is let go."""

_MAX_OLD_LINES = 1_000
_MAX_RECENT = 100_000  # of a round; should there be more, a follower that comes in the round misses the first

Event = dict[str, Any]


class JobEvents:
    """The events of one job. Those of its committed rounds are in `metrics.jsonl`, those since then are kept here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / EVENTS
        self._written_bytes = self._path.stat().st_size if self._path.is_file() else 0
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
        folder = self._folder / LOGS
        folder.mkdir(exist_ok=True)
        with (folder / f"{site}.log").open("a") as file:
            file.writelines(line + "\n" for line in lines)
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
        events = [*_old_output(self._folder), *_events(self._path, None if self._over else self._written_bytes), *self._recent]
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


def _events(path: Path, size: int | None) -> list[Event]:
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [json.loads(line) for line in file.read(-1 if size is None else size).splitlines()]


def _old_output(folder: Path) -> list[Event]:
    events: list[Event] = []
    for path in sorted((folder / LOGS).glob("*.log")):
        lines = path.read_text(errors="replace").splitlines()[-_MAX_OLD_LINES:]
        events += [{"event": "output", "site": path.stem, "line": line} for line in lines]
    return events
