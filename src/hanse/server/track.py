"""Hands a run's values to where they are looked at, such as TensorBoard: those that are there, or all until the run ends.

`python -m hanse.server.track` is the process that does so while a job runs, for a `Tracker`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from hanse.errors import ConfigError, HanseError, NotInstalled
from hanse.sandbox import open_beneath
from hanse.server.events import events_in
from hanse.server.run import Run
from hanse.server.run_folder import EVENTS, RUN
from hanse.server.values import Value, values_of

RECEIVERS = "hanse.receivers"
LOOK_S = 1.0
"""So often a run that goes on is looked at."""
END_WITHIN_S = 30.0
"""So long a receiver may take for what is left when the job has ended."""

_AT_ONCE = 1_000  # values
_ENDS = ("completed", "failed", "stopped")
_LONGEST_WAIT_S = 60.0
_PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}

Say = Callable[[str, str], object]
"""Told of a level, "info" or "warning", and a text."""


class Receiver(Protocol):
    """Takes one run's values. place: where they go, for people. key: what it is opened with to go on, as after a restart."""

    place: str
    key: str

    def write(self, values: Sequence[Value]) -> None:
        """Take them. Raises ConfigError, with what the receiver says, if it does not."""

    def close(self, facts: Mapping[str, Any]) -> None:
        """Nothing more comes. facts: what `run.json` says, perhaps of a run that goes on. Raises ConfigError."""


class OpenReceiver(Protocol):
    """What an entry point of the group `hanse.receivers` names."""

    def __call__(self, run: Path, facts: Mapping[str, Any], at: str | None, *, folder: Path, key: str | None) -> Receiver:
        """The receiver for the run in the folder `run`.

        facts: what `run.json` says. at: where to; None: the receiver's own choice. folder: for what it writes on this machine.
        key: of the receiver that took an earlier part of the run; None if there was none. Raises ConfigError if it cannot be opened.
        """


@dataclass(frozen=True)
class Target:
    """Where values go. to: the receiver's name. at: where to, as it takes it.

    Raises ConfigError for an unknown receiver, NotInstalled for one whose package is not there.
    """

    to: str
    at: str | None = None

    def __post_init__(self) -> None:
        installed = entry_points(group=RECEIVERS).names
        if self.to not in installed:
            raise ConfigError(f"there is no receiver {self.to!r}: it must be one of {', '.join(sorted(installed))}")
        if (package := _PACKAGES.get(self.to)) is not None and find_spec(package) is None:
            raise NotInstalled(f"the package {package!r} is not installed.", hint=f"Install it with: pip install 'hanse[{self.to}]'")

    @classmethod
    def of(cls, text: str) -> Target:
        """The target of "RECEIVER" or "RECEIVER=AT", such as "mlflow=http://mlflow.example:5000"."""
        if not isinstance(text, str):
            raise ConfigError(f"track is {text!r}: it must be a receiver's name, such as 'tensorboard', or NAME=WHERE")
        to, equals, at = text.partition("=")
        if equals and not at:
            raise ConfigError(f"track is {text!r}: say where to after the =, or leave it out")
        return cls(to, at or None)


def track(run: Path, target: Target, *, sites: bool | None = None, follow: bool = False, say: Say = lambda level, text: None) -> str:
    """Hand on what was not yet handed on of a run's values, and return where they are.

    sites: each site's values too; None: those of up to 100 sites. follow: go on until the run ends, or until Ctrl-C. What a receiver does
    not take meanwhile is tried again, and `say` is told why.
    Raises ConfigError if `run` is no run folder, the receiver does not take the values, or another process tracks the run already.
    """
    Run(run)
    with _tracking(run, target, run, sites, wait=False) as tracking:
        if follow:
            with contextlib.suppress(KeyboardInterrupt):
                _follow(tracking, threading.Event(), lambda: Run(run).get_status() in _ENDS, say)
        tracking.hand_on(last=True)
        return tracking.place


def main() -> None:
    """Follow the run that the first line of standard input names, until that is closed: the job has ended then, or the server has."""
    order = json.loads(sys.stdin.readline())
    run, target = Path(order["run"]), Target(order["to"], order["at"])
    told = os.fdopen(os.dup(1), "w")  # what a receiver prints, and the processes that it starts, must not use it
    os.dup2(2, 1)

    def say(level: str, text: str) -> None:
        with contextlib.suppress(OSError):
            print(json.dumps([level, text]), file=told, flush=True)

    def listen() -> None:
        sys.stdin.read()
        over.set()
        time.sleep(END_WITHIN_S)
        say("warning", f"{target.to} did not take what was left within {END_WITHIN_S:g} s")
        os._exit(1)

    over = threading.Event()
    threading.Thread(target=listen, daemon=True).start()
    try:
        with _tracking(run, target, Path(order["folder"]), None, wait=True) as tracking:
            _follow(tracking, over, over.is_set, say)
            if (run / RUN).is_file():
                tracking.hand_on(last=True)
    except Exception as error:
        if not isinstance(error, HanseError):
            traceback.print_exc()
        say("warning", f"the run's values are not written to {target.to}: {error}")
        sys.exit(0 if over.is_set() else 1)


def _follow(tracking: _Tracking, over: threading.Event, ended: Callable[[], bool], say: Say) -> None:
    """Hand on what comes until the run has `ended`. over: set to look at once."""
    told, wait_s = "", LOOK_S
    while not ended():
        try:
            if (tracking.run / RUN).is_file():
                tracking.hand_on()
                if told != tracking.place:
                    told = tracking.place
                    say("info", f"values go to {told}")
            wait_s = LOOK_S
        except (HanseError, OSError) as error:
            if wait_s == LOOK_S:
                say("warning", f"{error} It is tried again.")
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        over.wait(wait_s)


@contextmanager
def _tracking(run: Path, target: Target, folder: Path, sites: bool | None, *, wait: bool) -> Iterator[_Tracking]:
    """Track the run while no other process does for this receiver. wait: until that has ended; else ConfigError is raised if one does."""
    run, folder = run.absolute(), folder.absolute()
    with (folder / f".track-{target.to}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ConfigError(f"another process writes the values of {run} to {target.to} already: let it end, or stop it") from error
        tracking = _Tracking(run, target, folder, sites)
        try:
            yield tracking
        finally:
            tracking.close()


class _Tracking:
    """One run and its receiver. What was handed on is noted in a file, for the next time.

    Only what is committed is handed on: if the run is resumed, what came after the commit comes again. Of a run that has ended it is all.
    """

    def __init__(self, run: Path, target: Target, folder: Path, sites: bool | None) -> None:
        self.run = run
        self._target, self._folder, self._sites = target, folder, sites
        self._receiver: Receiver | None = None
        self._file = folder / f".track-{target.to}.json"
        noted = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self._noted: dict[str, Any] = noted if noted.get("at") == target.at else {}
        self._time: float | None = None

    @property
    def place(self) -> str:
        """Where values go; empty as long as there were none."""
        return str(self._noted.get("place", ""))

    def hand_on(self, *, last: bool = False) -> None:
        """What is new. last: nothing more comes, for now. Raises ConfigError."""
        facts = Run(self.run).facts
        ended = facts["ended"] if last and facts["status"] in _ENDS else None
        if ended is not None and self._noted.get("ended") == ended:
            return
        if self._receiver is None:
            self._receiver = self._open(facts)
        committed = facts.get("events", 0)
        if ended is not None or self._noted["bytes"] < committed:
            self._write(self._receiver, facts, None if ended is not None else committed)
        if last:
            self.close()
        if ended is not None:
            self._note(bytes=committed, ended=ended)  # should the run be resumed, what comes after the commit comes again

    def close(self) -> None:
        """Let go of the receiver, if there is one."""
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close(Run(self.run).facts)

    def _open(self, facts: Mapping[str, Any]) -> Receiver:
        open_receiver: OpenReceiver = entry_points(group=RECEIVERS)[self._target.to].load()
        receiver = open_receiver(self.run, facts, self._target.at, folder=self._folder, key=self._noted.get("key"))
        self._note(at=self._target.at, key=receiver.key, place=receiver.place, bytes=self._noted.get("bytes", 0))
        return receiver

    def _write(self, receiver: Receiver, facts: Mapping[str, Any], limit: int | None) -> None:
        """Hand on what lies in the file up to the limit, a few values at a time."""
        sites = isinstance(facts["sites"], list) if self._sites is None else self._sites
        time = facts["started"] if self._time is None else self._time
        values: list[Value] = []
        with open(open_beneath(self.run, EVENTS), "rb") as lines:
            at = lines.seek(self._noted["bytes"])
            more = True
            while more:
                line = lines.readline()
                at += len(line)
                more = bool(line) and (limit is None or at < limit)
                for event in events_in(line):
                    time = event.get("time", time)
                    values += values_of(event, time=time, sites=sites)
                if len(values) >= _AT_ONCE or not more:
                    receiver.write(values)
                    values.clear()
                    self._note(bytes=at)
        self._time = time

    def _note(self, **changes: Any) -> None:
        self._noted |= changes
        temporary = self._file.with_suffix(".part")
        temporary.write_text(json.dumps(self._noted) + "\n")
        temporary.replace(self._file)


if __name__ == "__main__":
    main()
