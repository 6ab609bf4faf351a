"""Server and sites as processes of this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from hanse.environments.federation import connected, kit_in
from hanse.environments.local import OPEN_POLICY, joined_sites, local_federation, local_project
from hanse.errors import ConfigError, LinkBroken
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Update
from hanse.site.policy import check_update, read_policy

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


def test_by_default_a_job_may_send_what_it_may_in_a_simulation(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(OPEN_POLICY)
    model = FLModel({"w": np.zeros(3)}, metrics={"loss": 0.5}, meta={"examples": 3, "learning_rate": 0.1, "scheduler": "cosine"})
    update = Update("a", TaskId("job", 0, 0, "a"), model, records=(Record("note", "text", kind="text"),))
    assert check_update(read_policy(tmp_path / "policy.yaml"), update, task=Task("train", FLModel())) == update


def test_names_that_no_participant_may_have() -> None:
    for wrong in ("Bad Homburg", "poc-admin", "-"):
        with pytest.raises(ConfigError):
            local_project([wrong], port=1)
