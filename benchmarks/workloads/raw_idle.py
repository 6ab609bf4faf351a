"""The server of `idle` as plain gRPC with the same TLS: `FOLDER` holds its kit. It welcomes whoever comes, and then says nothing.

Prints a line when it listens, and ends when its input does.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import grpc

from hanse.identity.kit import read_kit
from hanse.messages.wire import Welcome, encode_message

PINGS = [("grpc.http2.min_ping_interval_without_data_ms", 1000), ("grpc.http2.max_ping_strikes", 0)]  # the sites' pings are welcome


async def serve(folder: Path) -> None:
    kit = read_kit(folder)
    credentials = kit.credentials()

    async def control(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(encode_message(Welcome(version="1")))

    server = grpc.aio.server(options=PINGS)
    handlers = {"Control": grpc.stream_stream_rpc_method_handler(control)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("hanse.Federation", handlers)])
    pair = credentials.key, credentials.certificate
    server.add_secure_port(kit.listen, grpc.ssl_server_credentials([pair], credentials.roots, require_client_auth=True))
    await server.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
