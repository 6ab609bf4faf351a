"""The messages of `latency` over plain gRPC streams with the same TLS: `server FOLDER SITES BYTES COUNT` and `site FOLDER PORT`.

In each exchange the server sends every site a message of so many bytes, and each sends it back. The server prints its port, and at the end
the seconds of each exchange, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc


async def serve(folder: Path, sites: int, size: int, count: int) -> None:
    here: asyncio.Queue[grpc.aio.ServicerContext[Any, Any]] = asyncio.Queue()
    over = asyncio.Event()

    async def control(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        here.put_nowait(context)
        await over.wait()

    server = grpc.aio.server()
    handlers = {"Control": grpc.stream_stream_rpc_method_handler(control)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("raw.Raw", handlers)])
    pair = ((folder / "key.pem").read_bytes(), (folder / "certificate.pem").read_bytes())
    roots = (folder / "roots.pem").read_bytes()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], roots, require_client_auth=True))
    await server.start()
    print(port, flush=True)
    streams = [await here.get() for _ in range(sites)]
    message = bytes(size)

    async def exchange(stream: grpc.aio.ServicerContext[Any, Any]) -> None:
        await stream.write(message)
        assert len(await stream.read()) == size

    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        await asyncio.gather(*map(exchange, streams))
        seconds.append(time.perf_counter() - began)
    over.set()
    await server.stop(1)
    print(json.dumps(seconds))


async def answer(folder: Path, port: str) -> None:
    credentials = grpc.ssl_channel_credentials(
        (folder / "roots.pem").read_bytes(), (folder / "key.pem").read_bytes(), (folder / "certificate.pem").read_bytes()
    )
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        stream = channel.stream_stream("/raw.Raw/Control")()
        await stream.wait_for_connection()
        while (message := await stream.read()) is not grpc.aio.EOF:
            await stream.write(message)


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    if what == "server":
        asyncio.run(serve(Path(folder), *map(int, rest)))
    else:
        asyncio.run(answer(Path(folder), rest[0]))
