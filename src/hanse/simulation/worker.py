"""A simulation's worker process: runs any of its sites, one task after another, and folds a group's updates where they are."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from hanse.jobs.parts import part_of
from hanse.jobs.recipe import Recipe
from hanse.messages.codec import Buffer, decode, decode_task, encode, encode_update
from hanse.messages.flmodel import FLModel
from hanse.messages.params import size_bytes
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Columns, Update
from hanse.simulation.roster import NamedSites, NumberedSites
from hanse.simulation.together import fold_together
from hanse.site.output import Sink
from hanse.site.process import settle_in
from hanse.site.runner import SiteRunner, trains_together
from hanse.site.script import Ending
from hanse.site.trainer import filters_of, load_code
from hanse.transport.courier import Roster
from hanse.transport.memory import INLINE_BYTES, MemoryLink, SharedBody, map_shared


class Hello(msgspec.Struct, tag=True):
    """The first message to a worker that was not forked: the job's folder, and the rest of `Staff` that is not in it."""

    job: str
    job_id: str
    names: int | list[str]
    site_config: dict[str, dict[str, Any]]
    threads: int
    logs: str

    def staff(self, folder: Path | None = None) -> Staff:
        """What the message stands for; the job's code is imported. folder: where the job lies here, if not where the engine has it."""
        folder = Path(self.job) if folder is None else folder
        job, code = load_code(folder)
        return Staff(
            code=code,
            roster=NumberedSites(self.names) if isinstance(self.names, int) else NamedSites(self.names),
            job_id=self.job_id,
            seed=job.seed,
            filters=filters_of(job),
            framework=job.framework,
            config=job.config,
            site_config=self.site_config,
            threads=self.threads,
            job=str(folder),
            logs=self.logs,
        )


class Begin(msgspec.Struct, tag=True):
    """Comes with a task as its shared body: runs that name `ask` are of this task.

    `fold` describes the aggregator that its groups are folded with; without it each update is sent by itself.
    `sized`: folded updates tell how large they were.
    """

    ask: int
    fold: dict[str, Any] | None = None
    sized: bool = False


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
    updates: tuple[Update, ...] | Columns = ()


class Closed(msgspec.Struct, tag=True):
    """The scripts have ended; `endings` says what they still had to say."""

    endings: tuple[Ending, ...]


ToWorker = Hello | Begin | Run | End | Close
FromWorker = Done | Closed
_encode = msgspec.msgpack.Encoder(enc_hook=lambda value: value.item()).encode
_decode = msgspec.msgpack.Decoder(ToWorker).decode
decode_answer = msgspec.msgpack.Decoder(FromWorker).decode
encode_order = _encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode


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

    def trains_together(self, task: Task) -> bool:
        """Whether sites do the task many at once."""
        return trains_together(self.code, self.filters, task, self.config)

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
    worker = Worker(staff, log_to(Path(staff.logs)))
    while True:
        try:
            received = link.receive()
        except LinkBroken:
            return
        task = None if received.shared is None else _mapped(received.shared)
        answer = worker.take(received.message, task)
        if received.body is not None:
            received.body.release()
        if answer is not None:
            _send(link, answer)
            if answer.last:
                return


@dataclass(frozen=True, slots=True)
class Frame:
    """A task as it came, in memory that others may share. `private` gives it in memory of its own, to be written by training code."""

    shared: Buffer
    private: Callable[[], Buffer]
    close: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back: a message, and a body in parts. Without `folded` that is one site's update, which somebody may keep."""

    message: bytes
    body: Sequence[Buffer] = ()
    folded: bool = True
    last: bool = False


class Worker:
    """What a worker does with the messages it gets, whichever way they come. sink: takes each line that a site prints."""

    def __init__(self, staff: Staff, sink: Sink) -> None:
        self._staff = staff
        self._runner = SiteRunner(staff.code, filters=staff.filters, framework=staff.framework, sink=sink)
        self._tasks: dict[int, _TaskAtHand] = {}

    def take(self, message: bytes, task: Frame | None = None) -> Answer | None:
        """Do what the message says; `task` comes with Begin."""
        match _decode(message):
            case Begin(ask, fold, sized):
                assert task is not None
                aggregator = None if fold is None else part_of("aggregators", fold)
                self._tasks[ask] = _TaskAtHand(task, decode_task(task.shared), aggregator, sized)
            case Run(ask) as run:
                return self._run(self._tasks[ask], run)
            case End(ask):
                self._tasks.pop(ask).frame.close()
            case Close():
                return Answer(_encode(Closed(tuple(self._runner.close()))), last=True)
        return None

    def _run(self, at_hand: _TaskAtHand, run: Run) -> Answer:
        staff, task = self._staff, at_hand.task
        states: dict[str, dict[str, Any]] = {site: dict(decode(state)[0].params) for site, state in run.states.items()}

        def updates(done: Container[str] = ()) -> Iterator[Update]:
            for site in run.sites:
                if site in done:
                    continue
                state = states.setdefault(site, {})
                update = self._runner.run(staff.info(site), task, TaskId(*run.key, site), state, private=at_hand.private_model)
                yield replace(update, size_bytes=size_bytes(update.model.params)) if at_hand.sized else update

        def after() -> dict[str, bytes]:
            return {site: b"".join(encode(FLModel(params=state))) for site, state in states.items() if state}

        if at_hand.aggregator is None:
            (update,) = updates()
            return Answer(_encode(Done(run.ask, run.group, after())), encode_update(update), folded=False)
        door = staff.filters.server_in
        if len(run.sites) > 1 and not at_hand.sized and staff.trains_together(task):
            stacks = self._runner.together([staff.info(site) for site in run.sites], task, run.key, states)
            partial, light = fold_together(run.sites, stacks, updates, at_hand.aggregator, task, door, staff.seed)
        else:
            partial, light = fold_group(updates(), at_hand.aggregator, task, door, staff.seed)
            if len(light) > 1 and not at_hand.sized:
                light = Columns.of(light) or light
        return Answer(_encode(Done(run.ask, run.group, after(), light)), [] if partial is None else encode(partial))


@dataclass(frozen=True, slots=True)
class _TaskAtHand:
    """An ask's task, and what its groups are folded with, if they are."""

    frame: Frame
    task: Task
    aggregator: Aggregator | None
    sized: bool

    def private_model(self) -> FLModel:
        """The task's model in memory of its own, for tensors that training code may change."""
        return decode(self.frame.private(), writable=True)[0]


def _mapped(shared: tuple[int, int]) -> Frame:
    """A task in memory that all workers share, mapped privately: what is written is copied."""
    return Frame(map_shared(shared), lambda: map_shared(shared), lambda: os.close(shared[0]))


def _send(link: MemoryLink, answer: Answer) -> None:
    if answer.folded or len(answer.message) + sum(memoryview(part).nbytes for part in answer.body) <= INLINE_BYTES:
        link.send(answer.message, answer.body)
        return
    shared = SharedBody(answer.body)
    link.send_shared(answer.message, shared)
    shared.close()


def log_to(folder: Path) -> Sink:
    """What a site prints goes to a file of its own."""

    def write(site: str, line: str) -> None:
        folder.mkdir(exist_ok=True)
        with (folder / f"{site}.log").open("a") as file:
            file.write(line + "\n")

    return write


if __name__ == "__main__":
    main()
