"""A job's events, in a folder where its code may have left links; what followers see is tested with the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from hanse.server.job_events import JobEvents


@pytest.mark.parametrize("behind", ["logs", "logs/a.log"])
async def test_what_a_site_prints_is_not_written_behind_a_link(tmp_path: Path, behind: str, caplog: pytest.LogCaptureFixture) -> None:
    other, folder = tmp_path / "other", tmp_path / "job"
    other.mkdir()
    (other / "a.log").write_text("mine")
    (folder / behind).parent.mkdir(parents=True)
    (folder / behind).symlink_to(other / Path(behind).relative_to("logs"))
    events = JobEvents(folder)
    events.output("a", ["ssh-ed25519 …"])
    assert (other / "a.log").read_text() == "mine"
    assert "site a prints is not kept" in caplog.text
    assert [event async for event in events.follow(live=False)] == []


async def test_events_behind_a_link_are_not_told(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"event": "round"}\n')
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to(tmp_path / "other.jsonl")
    assert [event async for event in JobEvents(folder).follow(live=False)] == []
