from __future__ import annotations

from pathlib import Path

import pytest

from hanse.errors import Refused, WireError
from hanse.messages.wire import Blob, Offer, TaskRef
from hanse.site.kept import Counted, Kept
from hanse.site.policy import Spent

OFFER = Offer(job="j1", manifest=b"m", signature=b"s", archive=Blob(bytes(32), 1), rank=0, sites=1)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    kept = Kept(tmp_path, "j1")
    kept.save_offer(OFFER)
    return kept


@pytest.mark.parametrize("job", ["..", ".hidden", "a/b", "a\0b", "", "ä" * 101])
def test_an_id_that_is_no_name_for_a_folder_is_refused(tmp_path: Path, job: str) -> None:
    with pytest.raises(Refused, match="no name for a folder"):
        Kept(tmp_path, job)


def test_a_task_begins_from_the_newest_state_before_it(kept: Kept) -> None:
    for ref, state in (((0, 0), b"00"), ((0, 10), b"010"), ((0, 9), b"09"), ((2, 0), b"20")):
        kept.save_state(TaskRef(*ref), state)
    expected = {(0, 0): None, (0, 1): b"00", (0, 10): b"09", (0, 11): b"010", (1, 0): b"010", (2, 0): b"010", (2, 1): b"20", (9, 0): b"20"}
    for again in (kept, Kept(kept.path.parent, "j1")):
        assert {ref: again.state_before(TaskRef(*ref)) for ref in expected} == expected


def test_what_no_task_can_need_any_more_is_forgotten(kept: Kept) -> None:
    for ref in (TaskRef(0, 0), TaskRef(0, 1), TaskRef(1, 0), TaskRef(2, 0)):
        kept.save_state(ref, str(ref).encode())
        kept.save_update(ref, b"update")
    kept.forget_before(2)
    for again in (kept, Kept(kept.path.parent, "j1")):
        assert again.state_before(TaskRef(1, 0)) is None
        assert again.state_before(TaskRef(2, 0)) == str(TaskRef(1, 0)).encode()
        assert [again.update(TaskRef(commit, 0)) for commit in range(3)] == [None, None, b"update"]


def test_everything_is_there_again(kept: Kept) -> None:
    counted = Counted(newest=TaskRef(3, 1), trained=4, commits=3, spent=Spent(rounds=4, upload_bytes=7, cpu_seconds=0.5))
    kept.save_counted(counted)
    again = Kept(kept.path.parent, "j1")
    assert again.offer() == OFFER
    assert again.counted() == counted
    assert not [path for path in kept.path.parent.rglob("*.part")]
    again.remove()
    assert not kept.path.exists()


def test_a_folder_without_an_offer_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="holds no offer"):
        Kept(tmp_path, "j2").offer()
