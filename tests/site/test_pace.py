from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task
from hanse.site.pace import BURST_S, Pace
from hanse.site.policy import Caps
from hanse.transport.client import Client

OneSite = Any  # of conftest.py


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def wait(self, seconds: float) -> None:
        self.now += seconds


async def test_a_second_of_bytes_goes_at_once_and_the_rest_at_the_rate() -> None:
    clock = Clock()
    pace = Pace(100, clock=clock, wait=clock.wait)
    await pace.take(100)
    assert clock.now == 0
    await pace.take(50)
    assert clock.now == 0.5
    await pace.take(1000)
    assert clock.now == 10.5
    clock.now += 3600
    await pace.take(100)  # an hour without transfers is no hour of bytes
    await pace.take(100)
    assert clock.now == 3611.5


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 30)), max_size=50))
async def test_never_more_than_the_rate_and_one_bucket(steps: list[tuple[int, float]]) -> None:
    clock, total = Clock(), 0
    pace = Pace(1000, clock=clock, wait=clock.wait)
    for count, idle_s in steps:
        await pace.take(count)
        total += count
        assert total <= 1000 * (clock.now + BURST_S) + 1e-6
        clock.now += idle_s


@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_client_asks_for_every_piece_of_a_blob(one_site: OneSite, way: str, tmp_path: Path) -> None:
    from hanse.transport.blobs import FolderBlobs

    taken: list[int] = []

    async def take(count: int) -> None:
        taken.append(count)

    data = bytes(3_000_000)
    client = Client(one_site.kit.server, one_site.kit.credentials(), up=take if way == "up" else None, down=take if way == "down" else None)
    blobs = FolderBlobs(tmp_path / "own")
    try:
        if way == "up":
            await client.upload(blobs.write([data]), lambda offset, size: data[offset : offset + size])
        else:
            await client.download(one_site.server.blobs.write([data]), blobs)
    finally:
        await client.close()
    assert sum(taken) == len(data)
    assert len(taken) == 3


async def test_a_site_with_a_rate_does_its_tasks(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    one_site.policy("sandbox: 'off'\ncaps: {bytes_per_second: 100000000}\n")
    await one_site.start()
    await one_site.take(
        job_folder("from hanse import App, FLModel\napp = App()\n@app.train\ndef train(model, site):\n    return FLModel(model.params)\n")
    )
    for number, size in enumerate((3, 300_000)):
        one_site.server.assign((number, 0), Task("train", FLModel({"w": np.ones(size, "f4")})))
        assert (await one_site.server.update((number, 0))).model.params["w"].size == size


def test_a_rate_that_would_be_taken_for_a_broken_line_is_refused() -> None:
    import msgspec

    with pytest.raises(msgspec.ValidationError, match="65536"):
        msgspec.convert({"bytes_per_second": 1000}, Caps)
