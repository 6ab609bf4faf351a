"""A blob that comes over a connection is hashed and written in a thread, while the event loop receives what follows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from hanse.errors import StorageFull, WireError
from hanse.transport.blobs import Incoming

_BATCH = 4
"""So many pieces of 1 MiB go to the thread at once; while it writes them, as many wait at most, and then receiving waits too."""


class Receiver:
    """Adds pieces to an `Incoming`, as an async context: at its end everything received is written and the part closed.

    offset: how many bytes were received, with those of earlier connections.
    """

    def __init__(self, incoming: Incoming) -> None:
        self.offset = incoming.offset
        self._incoming = incoming
        self._waiting: list[bytes] = []
        self._working: asyncio.Future[Path | None] | None = None

    async def write(self, chunk: bytes) -> None:
        """Raises what `Incoming.write` raises, for this piece or one before."""
        self.offset += len(chunk)
        self._waiting.append(chunk)
        if len(self._waiting) >= _BATCH:
            await self._done()
            self._hand_over(self._write)

    async def finish(self) -> Path:
        """See `Incoming.finish`."""
        await self._done()
        self._hand_over(self._write_and_finish)
        path = await self._done()
        assert path is not None
        return path

    async def __aenter__(self) -> Receiver:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        """The thread is waited for: a descriptor that it still writes to must not be closed."""
        if self._working is not None and not self._working.done():
            self._working.add_done_callback(lambda _: self._close())
            await asyncio.wait({self._working})
        else:
            self._close()

    def _hand_over(self, work: Callable[[list[bytes]], Path | None]) -> None:
        batch, self._waiting = self._waiting, []
        self._working = asyncio.get_running_loop().run_in_executor(None, work, batch)

    async def _done(self) -> Path | None:
        return None if self._working is None else await asyncio.shield(self._working)

    def _write(self, batch: list[bytes]) -> None:
        for chunk in batch:
            self._incoming.write(chunk)

    def _write_and_finish(self, batch: list[bytes]) -> Path:
        self._write(batch)
        return self._incoming.finish()

    def _close(self) -> None:
        if self._working is None or self._working.exception() is None:
            # The transfer has ended in some other way, and its error is on its way: a part that cannot take these bytes is deleted.
            with contextlib.suppress(StorageFull, WireError):
                self._write(self._waiting)
        self._incoming.close()
