"""A network that misbehaves on request: a TCP proxy that cuts, delays, corrupts and refuses what runs through it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self

_AT_ONCE = 1 << 16


class Pump:
    """Pumps bytes between whoever connects to `address` and the server at host:port. Use it as an async context.

    delay_s: every piece waits for so long, in each direction. pumped: how many bytes went through, to the server and from it.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.target = host, port
        self.delay_s = 0.0
        self.connections = 0
        self.pumped = {"up": 0, "down": 0}
        self._cut_at: dict[str, int | None] = {"up": None, "down": None}
        self._corrupt: dict[str, int | None] = {"up": None, "down": None}
        self._cut_once: dict[str, Callable[[], bool]] = {}
        self._refusing = self._frozen = False
        self._moving = asyncio.Event()
        self._moving.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def cut(self) -> None:
        """End all connections now, without a goodbye; new ones are taken."""
        self.cuts += 1
        self._moving.set()
        for writer in list(self._writers):
            writer.transport.abort()

    def cut_after(self, count: int, direction: str = "up") -> None:
        """Cut all connections when so many more bytes have gone in that direction. It happens once."""
        self._cut_at[direction] = self.pumped[direction] + count

    def cut_once(self, happened: Callable[[], bool], direction: str = "down") -> None:
        """Cut all connections before the first piece in that direction that comes when `happened()`. It happens once."""
        self._cut_once[direction] = happened

    def corrupt_once(self, direction: str = "up", after: int = 0) -> None:
        """Turn one bit around in the piece that goes in that direction after so many more bytes."""
        self._corrupt[direction] = self.pumped[direction] + after

    def refuse(self, refusing: bool = True) -> None:
        """End every new connection at once, until refuse(False)."""
        self._refusing = refusing

    def freeze(self, frozen: bool = True) -> None:
        """Keep connections open and move nothing, as a dead machine does, until freeze(False)."""
        (self._moving.clear if frozen else self._moving.set)()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        for direction, source, sink in (("up", reader, far_writer), ("down", far_reader, writer)):
            task = asyncio.create_task(self._pump(direction, source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, direction: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(_AT_ONCE):
                await self._moving.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if (happened := self._cut_once.get(direction)) is not None and happened():
                    del self._cut_once[direction]
                    self.cut()
                    break
                if (at := self._corrupt[direction]) is not None and at < self.pumped[direction] + len(data):
                    self._corrupt[direction] = None
                    data = bytes([*data[:-1], data[-1] ^ 1])
                left = self._cut_at[direction]
                if left is not None and self.pumped[direction] + len(data) > left:
                    data, self._cut_at[direction] = data[: left - self.pumped[direction]], None
                else:
                    left = None
                self.pumped[direction] += len(data)
                sink.write(data)
                await sink.drain()
                if left is not None:
                    self.cut()
        self._writers.discard(sink)
        sink.close()
