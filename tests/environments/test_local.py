"""Server and sites as processes of this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hanse.environments.federation import connected, kit_in
from hanse.environments.local import joined_sites, local_federation, local_project
from hanse.errors import ConfigError, LinkBroken

pytestmark = pytest.mark.usefixtures("clean")


async def test_it_can_be_entered_again(tmp_path: Path) -> None:
    """With the keys, certificates and states that are there."""
    kits = []
    for _ in range(2):
        async with local_federation(tmp_path, ["b", "a"]) as federation, connected(kit_in(federation.admin_kit)) as client:
            assert [(site["site"], site["connected"]) for site in await client.call("sites")] == [("a", True), ("b", True)]
        kits.append([(path, path.read_bytes()) for path in sorted(tmp_path.glob("**/credentials/*"))])
    assert kits[0] == kits[1]
    assert joined_sites(tmp_path) == ["a", "b"]


async def test_a_site_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(LinkBroken, match=r"the process of a ended with status 1: .*policy.yaml.*nonsense"):
        async with local_federation(tmp_path, ["a"], policy="nonsense: 1\n"):
            raise AssertionError("it has started")


async def test_a_process_that_dies(tmp_path: Path) -> None:
    async with local_federation(tmp_path, ["a"]) as federation:
        os.kill(federation.members[1].process.pid, signal.SIGKILL)
        with pytest.raises(LinkBroken, match=r"the process of a was killed by SIGKILL: .*is connected"):
            await federation.broken()


async def test_what_is_raised_inside_comes_out(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with local_federation(tmp_path, ["a"]):
            raise ZeroDivisionError


def test_names_that_no_participant_may_have() -> None:
    for wrong in ("Bad Homburg", "poc-admin", "-"):
        with pytest.raises(ConfigError):
            local_project([wrong], port=1)
