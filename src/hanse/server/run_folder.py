"""A job's run folder: what happened, what was committed, and what is left at the end. It is a `Journal`, so a cohort writes to it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from hanse.cohort import Best
from hanse.errors import ConfigError, NotInstalled
from hanse.jobs.bundle import digest, digests, job_file, versions
from hanse.jobs.recipe import Recipe
from hanse.messages.codec import decode, read, write
from hanse.messages.flmodel import FLModel
from hanse.server.report import write_report
from hanse.transport.blobs import map_file, take_over
from hanse.transport.courier import Roster

RUN, EVENTS, COMMIT, MODEL, BEST = "run.json", "metrics.jsonl", "commit.safetensors", "model.safetensors", "best.safetensors"
STATISTICS = "statistics.json"
EARLIER, SPARE = "commit-before.safetensors", ".commit-spare.safetensors"
MAPPED_FROM_BYTES = 32 << 20
"""A committed model of this size goes on as a mapping of its file, so that it is not in memory twice while the next one is summed."""

States = Mapping[str, bytes]


class RunFolder:
    """Writes one run. Events are written out with each commit, so the folder always tells of committed rounds, and of an end.

    A commit is one file, `commit.safetensors`, written whole before the one before it (`commit-before.safetensors` meanwhile) is given up:
    the model with the server optimizer's moments, how many commits there were, the best so far, the sites' states, and how long
    `metrics.jsonl` was. It survives `kill -9` of the process, though not a loss of power. A large file that is given up is the next one's
    room (`.commit-spare.safetensors`), unless it is still mapped: new pages take four times as long.
    """

    def __init__(
        self, path: Path, facts: Mapping[str, Any], *, listen: Callable[[dict[str, Any]], None], progress: Callable[[int, int, int], None]
    ) -> None:
        self.path = path
        self.facts = dict(facts)
        self.commits = 0
        self.best: Best | None = None
        self.states: Callable[[], States] = dict
        """Gives the sites' states, as frames, at the time of a commit."""
        self.committed: Callable[[int], None] = lambda events_bytes: None
        """Told of each commit once it lasts, and how long `metrics.jsonl` is then."""
        self._listen = listen
        self._progress = progress
        self._pending: list[str] = []
        self._statistics: dict[str, Any] | None = None
        self._round = 0

    @staticmethod
    def new_path(root: Path, name: str) -> Path:
        """A folder for the next run of this job, made now: `root/name-001`, and so on."""
        root.mkdir(parents=True, exist_ok=True)
        number = 1 + max(
            (int(tail) for path in root.glob(f"{name}-*") if (tail := path.name.removeprefix(f"{name}-")).isdecimal()), default=0
        )
        while True:
            path = root / f"{name}-{number:03d}"
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1

    # what a cohort writes

    def event(self, kind: str, /, **facts: Any) -> None:
        event = {"event": kind, **facts}
        if "round" in facts:
            self._round = facts["round"]
        if kind in ("start", "round", "end"):
            event["time"] = time.time()
        self._pending.append(_encode(event) + "\n")
        if kind == "statistics":
            self._statistics = {name: fact for name, fact in facts.items() if name != "round"}
        self._listen(event)

    def progress(self, done: int, asked: int) -> None:
        self._progress(self._round, done, asked)

    def commit(self, model: FLModel) -> FLModel:
        written = self._write_events()
        states = self.states()
        fields = {
            "commits": self.commits + 1,
            "best": None if self.best is None else asdict(self.best),
            "events": written,
        }
        tree = {"model": model.params, "states": dict(states)}
        with self._one_before(), self._new_file() as file:
            write(file, replace(model, params=tree), fields)
        self.commits += 1
        self.write_facts(**self._reached(model), events=written)
        self.committed(written)
        if (self.path / COMMIT).stat().st_size < MAPPED_FROM_BYTES:
            return model
        kept = decode(map_file(self.path / COMMIT))[0]
        return replace(kept, params=kept.params["model"])

    @contextmanager
    def _one_before(self) -> Iterator[None]:
        """Keep the last commit under another name until there is a new one: a file that takes an earlier one's name has to be on the disk
        first, as some file systems see it, and a large one takes long to get there."""
        last, earlier = self.path / COMMIT, self.path / EARLIER
        if last.is_file():
            last.rename(earlier)
        try:
            yield
        except BaseException:
            if earlier.is_file():
                earlier.rename(last)
            raise
        if earlier.is_file() and earlier.stat().st_size >= MAPPED_FROM_BYTES:
            earlier.rename(self.path / SPARE)
        else:
            earlier.unlink(missing_ok=True)

    @contextmanager
    def _new_file(self) -> Iterator[BinaryIO]:
        """The next commit's file, open to be written: whole under its name at the end, or gone."""
        part = self.path / f".{COMMIT}.part"
        part.unlink(missing_ok=True)
        if not take_over(self.path / SPARE, part):
            (self.path / SPARE).unlink(missing_ok=True)
            part.touch()
        try:
            with part.open("r+b") as file:
                yield file
                file.truncate()
            part.rename(self.path / COMMIT)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reached(self, model: FLModel) -> dict[str, Any]:
        """What `run.json` says of the last commit."""
        rounds = {"done": (model.current_round or 0) + 1, "total": model.total_rounds}
        return {"rounds": rounds, "metrics": dict(model.metrics), "best": None if self.best is None else asdict(self.best)}

    def keep_best(self, model: FLModel, best: Best) -> None:
        if model.params is not None:
            write(self.path / BEST, replace(model, optimizer_params={}, meta=dict(model.meta)))
        self.best = best

    # what the runner does

    def resume(self) -> tuple[FLModel, States] | None:
        """Go back to the last commit: its model and the sites' states. Events of later, unfinished rounds are dropped. None if there was
        no commit.
        """
        if not (self.path / COMMIT).is_file() and (self.path / EARLIER).is_file():  # it was killed while it wrote the next one
            (self.path / EARLIER).rename(self.path / COMMIT)
        for left in (EARLIER, SPARE):
            (self.path / left).unlink(missing_ok=True)
        if not (self.path / COMMIT).is_file():
            (self.path / EVENTS).unlink(missing_ok=True)
            self.facts |= {"events": 0}
            return None
        model, fields = read(self.path / COMMIT)
        self.commits = fields["commits"]
        self.best = None if fields["best"] is None else Best(**fields["best"])
        os.truncate(self.path / EVENTS, fields["events"])
        self.facts |= {**self._reached(model), "events": fields["events"]}  # it may have been killed before it wrote them
        tree = model.params
        return replace(model, params=tree["model"]), tree["states"]

    def write_facts(self, **facts: Any) -> None:
        """Change `run.json`, in one step."""
        self.facts |= facts
        temporary = self.path / f".{RUN}"
        temporary.write_text(json.dumps(self.facts, indent=2, default=scalar) + "\n")
        temporary.replace(self.path / RUN)

    def finish(self, status: str, reason: str = "") -> None:
        """Write what is left to write: the last committed model, all events, the status, the report; then tell the listener."""
        if (self.path / COMMIT).is_file():
            model = read(self.path / COMMIT)[0]
            write(self.path / MODEL, replace(model, params=model.params["model"], optimizer_params={}))
            self.facts["model"] = MODEL
        (self.path / SPARE).unlink(missing_ok=True)
        end = {"event": "end", "time": time.time(), "status": status, "reason": reason}
        self._pending.append(json.dumps(end) + "\n")
        self._write_events()
        self.write_facts(status=status, reason=reason, ended=end["time"])
        if status == "completed":
            (self.path / COMMIT).unlink(missing_ok=True)  # not before it is known that nothing is left to do
        self._listen(end | self._closing(status))

    def _closing(self, status: str) -> dict[str, Any]:
        """Where things are, for the last lines."""
        here = os.path.relpath(self.path)
        place = Path(here if len(here) < len(str(self.path)) else self.path)
        model = self.facts.get("model")
        closing = {"folder": str(place), "model": model and str(place / model), "best": self.facts.get("best")}
        if status != "completed":
            closing["resume"] = f"hanse resume {place}"
        try:
            write_report(self.path)
            closing["report"] = str(place / "report.html")
        except NotInstalled as error:
            closing["report"] = str(error)
        except Exception as error:  # whatever is wrong with the report, the job has ended as it has
            closing["report"] = f"none, for it could not be written: {type(error).__name__}: {error}"
        return closing

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from running in this folder meanwhile. Raises ConfigError if one does."""
        path = self.path / ".lock"
        with path.open("w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: not of those it forks
            except OSError as error:
                raise ConfigError(f"another process is running in {self.path}: let it end, or stop it") from error
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _write_events(self) -> int:
        """Append the pending events, and write statistics to a file of their own too; returns the length of the events' file."""
        if self._statistics is not None:
            text = json.dumps(self._statistics, indent=1, default=scalar)
            (self.path / STATISTICS).write_text(text + "\n")
            self._statistics = None
        with (self.path / EVENTS).open("a") as file:
            file.writelines(self._pending)
            self._pending.clear()
            file.flush()
            return file.tell()


def first_facts(recipe: Recipe, roster: Roster, job: Path, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What `run.json` says at the start of a run. job: its folder, if it could be written. environment: where it runs, as JSON values."""
    written = digests(job) if job.is_dir() else {}
    return {
        "hanse": versions()["hanse"],
        "job": {
            "name": recipe.name,
            "recipe": recipe.kind,
            "arguments": recipe.arguments_as_data() if written else {},
            "digest": digest(job_file(job)) if written else None,
        },
        "environment": dict(environment),
        "started": time.time(),
        "seed": recipe.seed,
        "sites": sites_as_data(roster),
        "rounds": {"done": 0, "total": recipe.total_rounds()},
        "best": None,
        "metrics": {},
        "model": None,
        "versions": versions(),
        "digests": written,
    }


def sites_as_data(roster: Roster) -> list[str] | dict[str, int]:
    """The sites as `run.json` has them: their names, or how many there are."""
    return list(roster) if len(roster) <= 100 else {"count": len(roster)}


def open_run(path: Path) -> dict[str, Any]:
    """The facts of a run that can be gone on with. Raises ConfigError if it cannot."""
    if not (path / RUN).is_file():
        raise ConfigError(f"{path} is no run folder: it has no {RUN}")
    facts = dict(json.loads((path / RUN).read_text()))
    if facts["status"] == "completed":
        raise ConfigError(f"{path} is complete: there is nothing to go on with")
    return facts


def scalar(value: Any) -> Any:
    """NumPy's numbers as Python's; anything else by its text."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)


_encode = json.JSONEncoder(default=scalar).encode  # `json.dumps` makes one each time
