"""A simulation's worker process: runs any of its sites, one task after another, and folds a group's updates where they are."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from hanse.aggregation.aggregator import Aggregator
from hanse.app import App
from hanse.client.script import Script
from hanse.client.session import SiteInfo
from hanse.cohort import fold_group
from hanse.errors import LinkBroken
from hanse.filters import Filters
from hanse.jobs.loading import read_job
from hanse.jobs.parts import part_of
from hanse.jobs.recipe import Recipe
from hanse.messages.codec import decode, decode_task, encode, encode_update
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Update
from hanse.simulation.roster import NamedSites, NumberedSites
from hanse.site.process import settle_in
from hanse.site.runner import SiteRunner
from hanse.site.script import Ending
from hanse.transport.courier import Roster
from hanse.transport.memory import INLINE_BYTES, MemoryLink, Received, SharedBody, map_shared


class Hello(msgspec.Struct, tag=True):
    """The first message to a worker that was not forked: the job's folder, and the rest of `Staff` that is not in it."""

    job: str
    job_id: str
    names: int | list[str]
    site_config: dict[str, dict[str, Any]]
    threads: int
    logs: str

    def staff(self) -> Staff:
        """What the message stands for; the job's code is imported."""
        roster = NumberedSites(self.names) if isinstance(self.names, int) else NamedSites(self.names)
        return Staff.of(
            read_job(self.job), roster, job_id=self.job_id, site_config=self.site_config, threads=self.threads, job=self.job, logs=self.logs
        )


class Begin(msgspec.Struct, tag=True):
    """Comes with a task as its shared body: runs that name `ask` are of this task.

    `fold` describes the aggregator that its groups are folded with; without it each update is sent by itself.
    """

    ask: int
    fold: dict[str, Any] | None = None


class Run(msgspec.Struct, tag=True):
    """Run the task of `ask` at these sites, in this order."""

    ask: int
    group: int
    key: tuple[str, int, int]
    sites: list[str]
    states: dict[str, bytes]


class End(msgspec.Struct, tag=True):
    """No more runs of this ask will come."""

    ask: int


class Close(msgspec.Struct, tag=True):
    """Let the scripts end, then end."""


class Done(msgspec.Struct, tag=True):
    """One run is done. With `fold`, the updates come without parameters and the body is the partial sum; else the body is the update."""

    ask: int
    group: int
    states: dict[str, bytes]
    updates: tuple[Update, ...] = ()


class Closed(msgspec.Struct, tag=True):
    """The scripts have ended; `endings` says what they still had to say."""

    endings: tuple[Ending, ...]


ToWorker = Hello | Begin | Run | End | Close
FromWorker = Done | Closed
_encode = msgspec.msgpack.Encoder(enc_hook=lambda value: value.item()).encode
_decode = msgspec.msgpack.Decoder(ToWorker).decode
decode_answer = msgspec.msgpack.Decoder(FromWorker).decode
encode_order = _encode


@dataclass(frozen=True, kw_only=True)
class Staff:
    """What every worker of a simulation knows from the start."""

    code: App | Script
    roster: Roster
    job_id: str
    seed: int
    filters: Filters
    framework: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    site_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    threads: int = 1
    job: str = ""
    """The job's folder, for workers that are not forked."""
    logs: str = ""
    """The folder for what sites print, one file a site."""

    @classmethod
    def of(
        cls, recipe: Recipe, roster: Roster, *, job_id: str, site_config: Mapping[str, Mapping[str, Any]], threads: int, job: str, logs: str
    ) -> Staff:
        """The staff for a recipe's job."""
        return cls(
            code=recipe.sites_run(),
            roster=roster,
            job_id=job_id,
            seed=recipe.seed,
            filters=recipe.filters,
            framework=recipe.first_model()[1],
            config=recipe.config,
            site_config=site_config,
            threads=threads,
            job=job,
            logs=logs,
        )

    def hello(self) -> Hello:
        """This, as a message to a process that can read the job's folder."""
        names = len(self.roster) if isinstance(self.roster, NumberedSites) else list(self.roster)
        return Hello(
            self.job, self.job_id, names, {site: dict(config) for site, config in self.site_config.items()}, self.threads, self.logs
        )

    def info(self, site: str) -> SiteInfo:
        config = {**self.config, **self.site_config.get(site, {})}
        return SiteInfo(site, self.roster.index(site), len(self.roster), self.job_id, self.seed, config)


def main() -> None:
    """A worker process that was not forked: `python -m hanse.simulation.worker DESCRIPTOR`, a socket on which the engine says Hello."""
    link = MemoryLink(socket.socket(fileno=int(sys.argv[1])))
    hello = _decode(link.receive().message)
    assert isinstance(hello, Hello)
    work(link, hello.staff, hello.threads)


def work(link: MemoryLink, staff: Callable[[], Staff], threads: int) -> NoReturn:
    """Be a worker until the engine says Close or is gone; then the process ends, at once and without unwinding what it was forked from."""
    status = 1
    try:
        settle_in(threads)
        serve(link, staff())
        status = 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(link: MemoryLink, staff: Staff) -> None:
    """Do what the engine says until it says Close, or is gone."""
    runner = SiteRunner(staff.code, filters=staff.filters, framework=staff.framework, sink=_log_to(Path(staff.logs)))
    tasks: dict[int, _MappedTask] = {}
    while True:
        try:
            received = link.receive()
        except LinkBroken:
            return
        match _decode(received.message):
            case Begin(ask, fold):
                tasks[ask] = _MappedTask(received, None if fold is None else part_of("aggregators", fold))
            case Run(ask) as run:
                _run(link, staff, runner, tasks[ask], run, _states(run, received))
            case End(ask):
                tasks.pop(ask).close()
            case Close():
                link.send(_encode(Closed(tuple(runner.close()))))
                return


class _MappedTask:
    """An ask's task, in memory that all workers share, and what its groups are folded with, if they are."""

    def __init__(self, received: Received, aggregator: Aggregator | None) -> None:
        assert received.shared is not None
        self._shared = received.shared
        self.task = decode_task(map_shared(self._shared))
        self.aggregator = aggregator

    def private_model(self) -> FLModel:
        """The task's model in a copy-on-write mapping of its own, for tensors that training code may change."""
        return decode(map_shared(self._shared), writable=True)[0]

    def close(self) -> None:
        os.close(self._shared[0])


def _log_to(folder: Path) -> Callable[[str, str], None]:
    """What a site prints goes to a file of its own."""

    def write(site: str, line: str) -> None:
        folder.mkdir(exist_ok=True)
        with (folder / f"{site}.log").open("a") as file:
            file.write(line + "\n")

    return write


def _states(run: Run, received: Received) -> dict[str, dict[str, Any]]:
    if received.body is not None:
        received.body.release()
    return {site: dict(decode(state)[0].params) for site, state in run.states.items()}


def _run(link: MemoryLink, staff: Staff, runner: SiteRunner, mapped: _MappedTask, run: Run, states: dict[str, dict[str, Any]]) -> None:
    def updates() -> Iterator[Update]:
        for site in run.sites:
            state = states.setdefault(site, {})
            yield runner.run(staff.info(site), mapped.task, TaskId(*run.key, site), state, private=mapped.private_model)

    def after() -> dict[str, bytes]:
        return {site: b"".join(encode(FLModel(params=state))) for site, state in states.items() if state}

    if mapped.aggregator is None:
        (update,) = updates()
        message, body = _encode(Done(run.ask, run.group, after())), encode_update(update)
        if len(message) + sum(memoryview(part).nbytes for part in body) <= INLINE_BYTES:
            link.send(message, body)
        else:
            shared = SharedBody(body)
            link.send_shared(message, shared)
            shared.close()
        return
    partial, light = fold_group(updates(), mapped.aggregator, mapped.task, staff.filters.server_in, staff.seed)
    link.send(_encode(Done(run.ask, run.group, after(), light)), [] if partial is None else encode(partial))


if __name__ == "__main__":
    main()
