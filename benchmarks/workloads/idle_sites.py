"""Sites of `idle`: `ADDRESS AUTHORITY FIRST COUNT` connects so many of them, each with a key and a certificate of its own, and stays.

AUTHORITY is the folder of the authority that issues their certificates, as the server's would when they join. Prints a line once all of
them are welcome, and ends when its input does, or with status 1 if a stream ends before.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from hanse.environments.local import FEDERATION, ORGANISATION
from hanse.identity.authority import Authority, new_key, request
from hanse.identity.certificates import Credentials, Identity, Role
from hanse.messages.wire import Hello, Resources, Welcome
from hanse.transport.client import Client

AT_ONCE = 20


async def stay(address: str, authority: Authority, first: int, count: int) -> None:
    welcome = asyncio.Semaphore(0)
    at_once = asyncio.Semaphore(AT_ONCE)

    async def site(name: str) -> None:
        key = new_key()
        certificate = authority.issue(Identity(FEDERATION, Role.SITE, name, ORGANISATION), request(key), days=1)
        client = Client(address, Credentials(key, certificate, authority.roots))
        async with at_once:
            stream = await client.control()
            await stream.send(Hello(version="1", resources=Resources(cores=1)))
            messages = aiter(stream)
            assert isinstance(await anext(messages), Welcome)
        welcome.release()
        async for message in messages:
            raise AssertionError(f"an idle site got {message}")
        raise AssertionError(f"the server has ended the stream of {name}")

    sites = [asyncio.create_task(site(f"idle-{number:04}")) for number in range(first, first + count)]
    failed = asyncio.gather(*sites)
    for _ in sites:
        await asyncio.wait({asyncio.ensure_future(welcome.acquire()), failed}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            failed.result()
    print("connected", flush=True)
    ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait({ended, failed}, return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
        failed.result()
    failed.cancel()


if __name__ == "__main__":
    address, authority, first, count = sys.argv[1:]
    asyncio.run(stay(address, Authority.load(Path(authority)), int(first), int(count)))
