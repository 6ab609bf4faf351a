"""What the server must not forget: jobs and who takes part in them, accepted updates, sites, used tokens, revoked names.

SQLite (a file, one server) or PostgreSQL, by SQLAlchemy's URL. What a method has returned from survives `kill -9`; SQLite, in WAL mode with
`synchronous=NORMAL`, may lose the last transactions in a power cut, but is never damaged by it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from hanse.errors import ConfigError, IdentityError, StorageFull
from hanse.messages.wire import Blob, Payload, TaskRef

SCHEMA = 1
"""Goes up by one with each change of the tables below. A server refuses a database of a newer one."""

_tables = sa.MetaData()
_schema = sa.Table("schema", _tables, sa.Column("version", sa.Integer, primary_key=True))
_jobs = sa.Table(
    "jobs",
    _tables,
    sa.Column("id", sa.String(200), primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False, unique=True),  # of all jobs, in the order of submission
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("submitter", sa.String(100), nullable=False),
    sa.Column("organisation", sa.String(100), nullable=False),
    sa.Column("manifest", sa.LargeBinary, nullable=False),
    sa.Column("signature", sa.LargeBinary, nullable=False),
    sa.Column("archive", sa.LargeBinary, nullable=False),
    sa.Column("commits", sa.BigInteger, nullable=False),
    sa.Column("rounds", sa.BigInteger, nullable=False),
    sa.Column("fixed", sa.Boolean, nullable=False),
    sa.Column("submitted", sa.Double, nullable=False),
    sa.Column("started", sa.Double),
    sa.Column("ended", sa.Double),
)
_members = sa.Table(
    "members",
    _tables,
    sa.Column("job", sa.String(200), primary_key=True),
    sa.Column("site", sa.String(100), primary_key=True),
    sa.Column("rank", sa.Integer),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)
_updates = sa.Table(
    "updates",
    _tables,
    sa.Column("job", sa.String(200), primary_key=True),
    sa.Column("commit", sa.BigInteger, primary_key=True),
    sa.Column("index", sa.BigInteger, primary_key=True),
    sa.Column("site", sa.String(100), primary_key=True),
    sa.Column("inline", sa.LargeBinary),
    sa.Column("blob", sa.LargeBinary),
)
_sites = sa.Table(
    "sites",
    _tables,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("organisation", sa.String(100), nullable=False),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("seen", sa.Double),
    sa.Column("version", sa.String(200), nullable=False),
    sa.Column("resources", sa.JSON, nullable=False),
    sa.Column("expires", sa.Double),
)
_tokens = sa.Table("tokens", _tables, sa.Column("serial", sa.String(80), primary_key=True), sa.Column("used", sa.Double, nullable=False))
_revoked = sa.Table("revoked", _tables, sa.Column("name", sa.String(100), primary_key=True), sa.Column("since", sa.Double, nullable=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A row of `jobs`. status: queued, running, completed, failed or stopped. fixed: its sites and their ranks stand for good.

    archive: what sites get. commits, rounds: how many there were. Times are seconds since 1970.
    """

    id: str
    number: int
    name: str
    status: str = "queued"
    reason: str = ""
    submitter: str
    organisation: str
    manifest: bytes
    signature: bytes
    archive: Blob
    commits: int = 0
    rounds: int = 0
    fixed: bool = False
    submitted: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None

    @property
    def active(self) -> bool:
        return self.status in ("queued", "running")


@dataclass(frozen=True, slots=True)
class Member:
    """A site's part in a job. state: offered, accepted, refused or left; reason says why it refused or left."""

    job: str
    site: str
    state: str = "offered"
    reason: str = ""
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """What the server knows of a site. seen, expires: seconds since 1970; resources: a `wire.Resources` as JSON values."""

    name: str
    organisation: str
    disabled: bool = False
    seen: float | None = None
    version: str = ""
    resources: Mapping[str, Any] = field(default_factory=dict)
    expires: float | None = None


@dataclass(frozen=True, slots=True, order=True)
class UpdateKey:
    """Which update of a job."""

    task: TaskRef
    site: str


class Store:
    """The database. `open` before anything else.

    Raises StorageFull, from whatever writes, if there is no room; nothing of that call is kept then.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine: AsyncEngine | None = None
        self._writing = asyncio.Lock()  # SQLite has one writer, and waits best here
        self._arrived: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, and make the tables if there are none. Raises ConfigError for a bad URL, no connection, or a newer schema."""
        try:
            url = sa.make_url(self.url)
            if url.get_backend_name() not in ("sqlite", "postgresql"):
                raise ConfigError(f"the database is {self.url!r}.", hint="Give sqlite:///PATH or postgresql://USER@HOST/NAME.")
            is_sqlite = url.get_backend_name() == "sqlite"
            if is_sqlite and url.database and not Path(url.database).parent.is_dir():
                raise ConfigError(f"the database's folder {Path(url.database).parent} is not there: make it, or name another one.")
            self._engine = create_async_engine(url.set(drivername="sqlite+aiosqlite" if is_sqlite else "postgresql+asyncpg"))
            if is_sqlite:
                sa.event.listen(self._engine.sync_engine, "connect", _set_up_sqlite)
            async with self._engine.begin() as connection:
                await connection.run_sync(_make_tables)
        except (sa.exc.SQLAlchemyError, OSError, ImportError) as error:
            await self.close()
            place = self.url if "@" not in self.url else f"…@{self.url.rpartition('@')[2]}"
            raise ConfigError(f"the database {place} cannot be opened: {error}") from error
        except ConfigError:
            await self.close()
            raise

    async def close(self) -> None:
        """Finish what is being written, and let go of the database."""
        if self._writer is not None:
            await self._writer
        if self._engine is not None:
            await self._engine.dispose()
            self._engine = None

    # jobs

    async def add_job(self, job: Job, members: Sequence[Member]) -> None:
        """Keep a new job with its members."""
        async with self._write() as connection:
            await connection.execute(sa.insert(_jobs).values(_row(job)))
            if members:
                await connection.execute(sa.insert(_members), [asdict(member) for member in members])

    async def jobs(self) -> list[Job]:
        """All jobs in the order of submission."""
        return [_job(dict(row)) for row in await self._read(sa.select(_jobs).order_by(_jobs.c.number))]

    async def change_job(self, job: str, **changes: Any) -> None:
        """Change some fields of a job: status, reason, commits, rounds, fixed, started, ended."""
        async with self._write() as connection:
            await connection.execute(sa.update(_jobs).where(_jobs.c.id == job).values(changes))

    async def remove_job(self, job: str) -> None:
        """Forget a job and all that belongs to it."""
        async with self._write() as connection:
            for table, column in ((_updates, _updates.c.job), (_members, _members.c.job), (_jobs, _jobs.c.id)):
                await connection.execute(sa.delete(table).where(column == job))

    async def members(self, job: str | None = None) -> list[Member]:
        """Who takes part, by name; of all jobs, or of one."""
        query = sa.select(_members).order_by(_members.c.job, _members.c.site)
        return [Member(**row) for row in await self._read(query if job is None else query.where(_members.c.job == job))]

    async def put_members(self, *members: Member) -> None:
        """Add these, or put them in the place of what was known."""
        await self._put(_members, [asdict(member) for member in members])

    # updates

    async def add_update(self, job: str, key: UpdateKey, payload: Payload) -> None:
        """Keep an accepted update. One that is there already stays as it is. Those that come together share one transaction."""
        row = {
            "job": job,
            "commit": key.task.commit,
            "index": key.task.index,
            "site": key.site,
            "inline": payload.inline,
            "blob": None if payload.blob is None else _packed(payload.blob),
        }
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrived.append((row, kept))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_arrived())
        await kept

    async def _write_arrived(self) -> None:
        while self._arrived:
            batch, self._arrived = self._arrived, []
            error: BaseException | None = None
            try:
                async with self._write() as connection:
                    await connection.execute(self._insert(_updates).on_conflict_do_nothing(), [row for row, _ in batch])
            except Exception as raised:  # whoever waits for it is told
                error = raised
            for _, kept in batch:
                if not kept.done():
                    kept.set_result(None) if error is None else kept.set_exception(error)

    async def update_keys(self, job: str) -> set[UpdateKey]:
        """Which updates of a job are kept."""
        columns = (_updates.c.commit, _updates.c.index, _updates.c.site)
        rows = await self._read(sa.select(*columns).where(_updates.c.job == job))
        return {UpdateKey(TaskRef(row["commit"], row["index"]), row["site"]) for row in rows}

    async def update(self, job: str, key: UpdateKey) -> Payload:
        """A kept update. Raises KeyError if it is not there."""
        rows = await self._read(sa.select(_updates.c.inline, _updates.c.blob).where(_is_update(job, key)))
        if not rows:
            raise KeyError(key)
        return Payload(rows[0]["inline"], None if rows[0]["blob"] is None else _unpacked(rows[0]["blob"]))

    async def drop_updates(self, job: str, *, before_commit: int | None = None, but: Sequence[TaskRef] = (), **changes: Any) -> list[Blob]:
        """Forget a job's updates, or those of tasks before that many commits. Returns the blobs that held some of them.

        but: tasks whose updates stay. changes: of the job, in the same transaction.
        """
        which = _updates.c.job == job
        if before_commit is not None:
            which &= _updates.c.commit < before_commit
        if but:
            which &= sa.tuple_(_updates.c.commit, _updates.c.index).not_in([(task.commit, task.index) for task in but])
        async with self._write() as connection:
            if changes:
                await connection.execute(sa.update(_jobs).where(_jobs.c.id == job).values(changes))
            found = await connection.execute(sa.select(_updates.c.blob).where(which & _updates.c.blob.is_not(None)))
            blobs = [_unpacked(row[0]) for row in found]
            await connection.execute(sa.delete(_updates).where(which))
        return blobs

    async def blobs(self) -> set[Blob]:
        """All blobs that a job or an update is in."""
        jobs = await self._read(sa.select(_jobs.c.archive))
        updates = await self._read(sa.select(_updates.c.blob).where(_updates.c.blob.is_not(None)))
        return {_unpacked(packed) for row in (*jobs, *updates) for packed in row.values()}

    # sites and identities

    async def sites(self) -> list[SiteRecord]:
        """All sites that ever connected or were named, by name."""
        return [SiteRecord(**row) for row in await self._read(sa.select(_sites).order_by(_sites.c.name))]

    async def put_site(self, site: SiteRecord) -> None:
        """Add it, or put it in the place of what was known."""
        await self._put(_sites, [asdict(site)])

    async def use_token(self, serial: int) -> None:
        """Note that the join token with this certificate was used. Raises IdentityError if it was before."""
        async with self._write() as connection:
            row = {"serial": str(serial), "used": time.time()}
            added = await connection.execute(self._insert(_tokens).values(row).on_conflict_do_nothing())
        if not added.rowcount:
            raise IdentityError(
                "this join token was used before.", hint="Ask the project admin for a new one: a token is good for one site."
            )

    async def revoke(self, name: str) -> None:
        """Note that the certificates of this name are not accepted any more."""
        async with self._write() as connection:
            await connection.execute(self._insert(_revoked).values(name=name, since=time.time()).on_conflict_do_nothing())

    async def revoked(self) -> set[str]:
        """The revoked names."""
        return {row["name"] for row in await self._read(sa.select(_revoked.c.name))}

    # the database

    def _insert(self, table: sa.Table) -> Any:
        assert self._engine is not None
        return sqlite.insert(table) if self._engine.dialect.name == "sqlite" else postgresql.insert(table)

    async def _put(self, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
        insert, keys = self._insert(table), {column.name for column in table.primary_key}
        upsert = insert.on_conflict_do_update(
            index_elements=sorted(keys), set_={column.name: insert.excluded[column.name] for column in table.c if column.name not in keys}
        )
        if rows:
            async with self._write() as connection:
                await connection.execute(upsert, rows)

    async def _read(self, query: Any) -> list[sa.RowMapping]:
        assert self._engine is not None
        async with self._engine.connect() as connection:
            return list((await connection.execute(query)).mappings())

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[AsyncConnection]:
        assert self._engine is not None
        try:
            async with self._writing, self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            text = str(error.orig)
            if "is full" in text or "No space left" in text or "disk I/O error" in text:
                raise StorageFull(f"the database has no room: {text}.", hint="Make room on the disk that it lies on.") from error
            raise


def _set_up_sqlite(connection: Any, _record: object) -> None:
    for setting in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "wal_autocheckpoint=4000"):
        connection.execute(f"PRAGMA {setting}")


def _make_tables(connection: sa.Connection) -> None:
    if not sa.inspect(connection).has_table(_schema.name):
        _tables.create_all(connection)
        connection.execute(sa.insert(_schema).values(version=SCHEMA))
        return
    version = connection.execute(sa.select(_schema.c.version)).scalar_one()
    if version != SCHEMA:
        which = "newer" if version > SCHEMA else "older"
        raise ConfigError(
            f"the database is of schema {version}, {which} than this server's {SCHEMA}.",
            hint="Start the version of Hanse that wrote it, or restore a backup: see the operations page.",
        )


def _row(job: Job) -> dict[str, Any]:
    row = {f.name: getattr(job, f.name) for f in fields(job)}
    return row | {"archive": _packed(job.archive)}


def _job(row: Mapping[str, Any]) -> Job:
    return Job(**{**row, "archive": _unpacked(row["archive"])})


def _is_update(job: str, key: UpdateKey) -> sa.ColumnElement[bool]:
    c = _updates.c
    return (c.job == job) & (c.commit == key.task.commit) & (c.index == key.task.index) & (c.site == key.site)


def _packed(blob: Blob) -> bytes:
    return blob.digest + blob.size.to_bytes(8, "little")


def _unpacked(data: bytes) -> Blob:
    return Blob(bytes(data[:32]), int.from_bytes(data[32:], "little"))
