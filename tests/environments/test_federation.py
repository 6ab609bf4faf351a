"""An admin's side of a federation, against servers that are not what they should be; the rest is tested with whole jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hanse.environments.federation import connected, events_of, fetch, kit_in
from hanse.environments.local import admin_kit, local_project
from hanse.errors import LinkBroken, WireError
from hanse.identity.certificates import Credentials
from hanse.identity.kit import Kit, read_kit, write_kit
from hanse.messages.wire import Blob, Request
from hanse.provision.kits import provision
from hanse.transport.blobs import FolderBlobs, Incoming, open_file
from hanse.transport.grpc import Peer, serve


class Lying:
    """A server whose results have the same content under names that it chooses, and that is started again before some rounds."""

    def __init__(self, folder: Path, credentials: Credentials) -> None:
        self.credentials = credentials
        self.blobs = FolderBlobs(folder)
        self.blob = self.blobs.write([b"evil"])
        self.names: list[str] = []
        self.cut_before: list[int] = []
        self.restarts: list[asyncio.Task[None]] = []

    async def start(self, port: int = 0) -> None:
        self.server = await serve(self, self.credentials, f"127.0.0.1:{port}")

    async def restart(self) -> None:
        await self.server.close(0)
        await self.start(self.server.port)

    def admit(self, peer: Peer) -> None:
        pass

    def control(self, peer: Peer, incoming: Any) -> Any:
        raise NotImplementedError

    async def call(self, peer: Peer, request: Request) -> Any:
        return {"files": {name: [self.blob.hex, self.blob.size] for name in self.names}}

    async def follow(self, peer: Peer, request: Request) -> AsyncIterator[Any]:
        yield {"event": "output", "site": "a", "line": "from before"}
        for number in range(5):
            if number in self.cut_before:
                self.cut_before.remove(number)
                self.restarts.append(asyncio.create_task(self.restart()))
                await asyncio.Event().wait()
            yield {"event": "round", "round": number}
            yield {"event": "output", "site": "a", "line": f"after {number}"}

    def open_blob(self, peer: Peer, blob: Blob) -> int:
        return open_file(self.blobs.path(blob))

    def incoming(self, peer: Peer, blob: Blob) -> Incoming:
        return self.blobs.incoming(blob)


@pytest.fixture
async def lying(tmp_path: Path) -> AsyncIterator[tuple[Lying, Kit]]:
    """Such a server, over real TLS, and an admin's kit."""
    provision(local_project(["a"], 1), tmp_path / "made")
    service = Lying(tmp_path / "blobs", read_kit(tmp_path / "made" / "server").credentials())
    await service.start()
    folder = admin_kit(tmp_path / "made")
    kit = kit_in(folder)
    kit.server = f"127.0.0.1:{service.server.port}"
    write_kit(folder, kit)
    yield service, kit_in(folder)
    await asyncio.gather(*service.restarts)
    await service.server.close(0)


@pytest.mark.parametrize("name", ["../evil", "/tmp/hanse-evil", "logs/../../evil", "", "."])
async def test_a_result_stays_in_its_folder(lying: tuple[Lying, Kit], tmp_path: Path, name: str) -> None:
    service, kit = lying
    service.names = ["run.json", name]
    folder = tmp_path / "runs" / "a-001"
    folder.mkdir(parents=True)
    async with connected(kit) as client:
        with pytest.raises(WireError, match="lies outside of the run folder"):
            await fetch(client, "a-0001", folder)
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["a-001", "run.json"]


async def test_what_is_left_out(lying: tuple[Lying, Kit], tmp_path: Path) -> None:
    service, kit = lying
    service.names = ["job/code/evil.py", "logs/a.log", "run.json"]
    async with connected(kit) as client:
        await fetch(client, "a-0001", tmp_path / "run", leave_out=["job"])
    assert sorted(path.name for path in (tmp_path / "run").rglob("*") if path.is_file()) == ["a.log", "run.json"]


async def test_events_come_once_though_the_connection_breaks(lying: tuple[Lying, Kit]) -> None:
    service, kit = lying
    service.cut_before = [1, 3]
    said: list[str] = []
    async with connected(kit) as client:
        events = [event async for event in events_of(client, "a-0001", lost=said.append)]
    assert [event["round"] for event in events if event["event"] == "round"] == [0, 1, 2, 3, 4]
    assert len(said) == 2
    assert [event["line"] for event in events if event["event"] == "output"].count("from before") == 1


async def test_nobody_asks_to_try_again(lying: tuple[Lying, Kit]) -> None:
    service, kit = lying
    service.cut_before = [1]
    async with connected(kit) as client:
        with pytest.raises(LinkBroken):
            _ = [event async for event in events_of(client, "a-0001")]
