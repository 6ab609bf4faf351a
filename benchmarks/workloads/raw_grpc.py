"""The bytes of `transport` over plain gRPC streams with the same TLS: `server FOLDER SITES MIB ROUNDS` and `site FOLDER PORT MIB ROUNDS`.

In each round every site downloads so many MiB and uploads as many, in pieces of 1 MiB; nothing is kept or looked at. The server prints its
port, and at the end the seconds of each round, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

PIECE = bytes(1 << 20)
OPTIONS = [("grpc.max_receive_message_length", 4 << 20), ("grpc.max_send_message_length", 4 << 20)]


async def serve(folder: Path, sites: int, mib: int, rounds: int) -> None:
    gates = [asyncio.Event() for _ in range(rounds)]
    done = asyncio.Queue[None]()

    async def down(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await gates[int(request)].wait()
        for _ in range(mib):
            await context.write(PIECE)

    async def up(pieces: AsyncIterator[bytes], _: object) -> bytes:
        size = 0
        async for piece in pieces:
            size += len(piece)
        assert size == mib << 20
        done.put_nowait(None)
        return b"done"

    handlers = {"Down": grpc.unary_stream_rpc_method_handler(down), "Up": grpc.stream_unary_rpc_method_handler(up)}
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("raw.Raw", handlers)])
    pair = ((folder / "key.pem").read_bytes(), (folder / "certificate.pem").read_bytes())
    roots = (folder / "roots.pem").read_bytes()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], roots, require_client_auth=True))
    await server.start()
    print(port, flush=True)
    seconds = []
    for gate in gates:
        began = time.perf_counter()
        gate.set()
        for _ in range(sites):
            await done.get()
        seconds.append(time.perf_counter() - began)
    await server.stop(1)
    print(json.dumps(seconds))


async def take_part(folder: Path, port: str, mib: int, rounds: int) -> None:
    credentials = grpc.ssl_channel_credentials(
        (folder / "roots.pem").read_bytes(), (folder / "key.pem").read_bytes(), (folder / "certificate.pem").read_bytes()
    )
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=OPTIONS) as channel:
        down, up = channel.unary_stream("/raw.Raw/Down"), channel.stream_unary("/raw.Raw/Up")
        for number in range(rounds):
            stream = down(str(number).encode())
            while await stream.read() is not grpc.aio.EOF:
                pass
            answer = up()
            for _ in range(mib):
                await answer.write(PIECE)
            await answer.done_writing()
            assert await answer == b"done"


if __name__ == "__main__":
    what, folder, *numbers = sys.argv[1:]
    if what == "server":
        asyncio.run(serve(Path(folder), *map(int, numbers)))
    else:
        asyncio.run(take_part(Path(folder), numbers[0], *map(int, numbers[1:])))
