from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from hanse.errors import ConfigError, IdentityError, StorageFull
from hanse.messages.wire import Blob, Payload, TaskRef
from hanse.server.store import Job, Member, SiteRecord, Store, UpdateKey

ARCHIVE = Blob(bytes(32), 17)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of its own."""
    return f"sqlite:///{tmp_path / 'server.sqlite'}" if request.param == "sqlite" else str(request.getfixturevalue("postgres"))


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = Store(url)
    await store.open()
    yield store
    await store.close()


def a_job(name: str = "digits", number: int = 1) -> Job:
    return Job(
        id=f"{name}-{number:04d}",
        number=number,
        name=name,
        submitter="ada",
        organisation="lab",
        manifest=b"{}",
        signature=b"\x00\xff",
        archive=ARCHIVE,
    )


def key(commit: int, index: int, site: str) -> UpdateKey:
    return UpdateKey(TaskRef(commit, index), site)


async def test_jobs_come_back_as_they_were_in_the_order_of_submission(store: Store, url: str) -> None:
    second, first = a_job("b", 2), a_job("a", 1)
    await store.add_job(second, [Member("b-0002", "site-1")])
    await store.add_job(first, [])
    await store.change_job("a-0001", status="failed", reason="because", commits=3, ended=12.5, fixed=True)
    await store.close()
    again = Store(url)
    await again.open()
    changed, untouched = await again.jobs()
    assert untouched == second
    assert (changed.status, changed.reason, changed.commits, changed.ended, changed.fixed) == ("failed", "because", 3, 12.5, True)
    assert (changed.id, changed.manifest, changed.signature, changed.archive) == ("a-0001", b"{}", b"\x00\xff", ARCHIVE)
    await again.close()


async def test_a_member_is_put_in_the_place_of_what_was_known(store: Store) -> None:
    await store.add_job(a_job(), [Member("digits-0001", "b"), Member("digits-0001", "a")])
    await store.put_members(Member("digits-0001", "b", "refused", "code.digests", None), Member("digits-0001", "c", "accepted", "", 4))
    assert await store.members("digits-0001") == [
        Member("digits-0001", "a"),
        Member("digits-0001", "b", "refused", "code.digests"),
        Member("digits-0001", "c", "accepted", "", 4),
    ]
    assert await store.members("another") == []


async def test_an_update_is_kept_once_and_the_first_one_counts(store: Store) -> None:
    blob = Blob(bytes(range(32)), 1 << 40)
    await store.add_update("j", key(1, 0, "a"), Payload(inline=b"first"))
    await store.add_update("j", key(1, 0, "a"), Payload(inline=b"second"))
    await store.add_update("j", key(1, 1, "a"), Payload(blob=blob))
    assert await store.update("j", key(1, 0, "a")) == Payload(inline=b"first")
    assert await store.update("j", key(1, 1, "a")) == Payload(blob=blob)
    assert await store.update_keys("j") == {key(1, 0, "a"), key(1, 1, "a")}
    assert await store.update_keys("another") == set()
    with pytest.raises(KeyError):
        await store.update("j", key(2, 0, "a"))


async def test_updates_that_come_together_are_all_kept(store: Store) -> None:
    keys = [key(0, 0, f"site-{number}") for number in range(200)]
    await asyncio.gather(*(store.add_update("j", each, Payload(inline=each.site.encode())) for each in keys))
    assert await store.update_keys("j") == set(keys)
    assert await store.update("j", keys[150]) == Payload(inline=b"site-150")


async def test_dropping_leaves_tasks_that_are_still_out(store: Store) -> None:
    await store.add_job(a_job("j"), [])
    blob = Blob(bytes(32), 1)
    for commit, index in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
        await store.add_update("j-0001", key(commit, index, "a"), Payload(blob=blob) if (commit, index) == (0, 1) else Payload(inline=b"x"))
    out = [key(0, 1, "a").task, key(1, 0, "a").task]
    assert await store.drop_updates("j-0001", before_commit=2, but=out) == []
    assert await store.update_keys("j-0001") == {key(0, 1, "a"), key(1, 0, "a"), key(2, 0, "a")}
    assert await store.drop_updates("j-0001", before_commit=2, but=[]) == [blob]


async def test_dropping_tells_the_blobs_and_leaves_later_commits(store: Store) -> None:
    blobs = [Blob(bytes([number] * 32), number) for number in range(3)]
    await store.add_job(a_job("j"), [])
    for commit, blob in enumerate(blobs):
        await store.add_update("j-0001", key(commit, 0, "a"), Payload(blob=blob))
    await store.add_update("j-0001", key(0, 0, "b"), Payload(inline=b"x"))
    assert await store.blobs() == {ARCHIVE, *blobs}
    assert set(await store.drop_updates("j-0001", before_commit=2, commits=2)) == set(blobs[:2])
    assert await store.update_keys("j-0001") == {key(2, 0, "a")}
    assert (await store.jobs())[0].commits == 2
    assert await store.drop_updates("j-0001") == [blobs[2]]
    assert await store.blobs() == {ARCHIVE}


async def test_a_removed_job_takes_everything_with_it(store: Store) -> None:
    await store.add_job(a_job(), [Member("digits-0001", "a")])
    await store.add_update("digits-0001", key(0, 0, "a"), Payload(inline=b"x"))
    await store.remove_job("digits-0001")
    assert (await store.jobs(), await store.members(), await store.update_keys("digits-0001")) == ([], [], set())


async def test_a_token_is_used_once(store: Store) -> None:
    serial = (1 << 159) + 1  # as long as certificates' are
    await store.use_token(serial)
    with pytest.raises(IdentityError, match="used before"):
        await store.use_token(serial)
    await store.use_token(serial + 1)


async def test_sites_and_revoked_names_last(store: Store) -> None:
    site = SiteRecord("a", "lab", True, 1.5, "0.1", {"cores": 2.0}, 99.0)
    await store.put_site(SiteRecord("a", "lab"))
    await store.put_site(site)
    await store.revoke("eve")
    await store.revoke("eve")
    assert await store.sites() == [site]
    assert await store.revoked() == {"eve"}


@pytest.mark.parametrize(("version", "which"), [(2, "newer"), (0, "older")])
async def test_a_database_of_another_schema_is_refused(store: Store, url: str, version: int, which: str) -> None:
    async with store._write() as connection:
        await connection.execute(sa.text(f"UPDATE schema SET version = {version}"))
    again = Store(url)
    with pytest.raises(ConfigError, match=f"of schema {version}, {which} than"):
        await again.open()


@pytest.mark.parametrize("bad", ["mysql://x/y", "no url", "sqlite:////not/there/x.sqlite", "postgresql://ada:secret@127.0.0.1:1/x"])
async def test_a_database_that_cannot_be_opened_is_named_without_its_password(bad: str) -> None:
    with pytest.raises(ConfigError, match="database") as caught:
        await Store(bad).open()
    assert "secret" not in str(caught.value)


async def test_a_full_disk_is_said_and_nothing_of_the_call_is_kept(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'x.sqlite'}")
    await store.open()
    async with store._engine.connect() as connection:  # type: ignore[union-attr]
        pages = (await connection.execute(sa.text("PRAGMA page_count"))).scalar_one()
    sa.event.listen(store._engine.sync_engine, "begin", lambda c: c.exec_driver_sql(f"PRAGMA max_page_count={pages + 5}"))  # type: ignore[union-attr]
    with pytest.raises(StorageFull, match="no room"):
        await store.add_update("j", key(0, 0, "a"), Payload(inline=bytes(100_000)))
    await store.add_update("j", key(0, 0, "b"), Payload(inline=b"small"))
    assert await store.update_keys("j") == {key(0, 0, "b")}
    await store.close()


WRITER = """
import asyncio, sys
from hanse.messages.wire import Payload, TaskRef
from hanse.server.store import Store, UpdateKey

async def main():
    store = Store(sys.argv[1])
    await store.open()
    for number in range(10**9):
        await store.add_update("j", UpdateKey(TaskRef(0, number), "a"), Payload(inline=b"x" * 1000))
        print(number, flush=True)

asyncio.run(main())
"""


def test_what_was_kept_survives_kill_9_of_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "server.sqlite"
    with subprocess.Popen([sys.executable, "-c", WRITER, f"sqlite:///{path}"], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 100:
                writer.send_signal(signal.SIGKILL)
                break
        acknowledged = max([100, *map(int, writer.stdout.read().split())])
    with sqlite3.connect(path) as connection:
        kept = {index for (index,) in connection.execute('SELECT "index" FROM updates')}
    assert set(range(acknowledged + 1)) <= kept
