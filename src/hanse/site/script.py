"""Scripts written for the Client API, many sites in one process: each site's script is a greenlet that gives way where it would wait.

A site's script starts with the site's first task and has a module namespace of its own; modules that it imports are shared by the sites of
the process. It stops in `send`, where its answer is taken, and goes on from there when the site's next task comes, or when the job is
over: so an answer's arrays need no copy, and are good until then. A script that has come to its end is started anew for the next task.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet  # type: ignore[import-untyped]

from hanse.client.framework import GROUP, loaded, seed_all
from hanse.client.script import Script, imported_modules
from hanse.client.session import SiteInfo, TaskAtHand, enter
from hanse.errors import Failure, SiteFailed
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task
from hanse.messages.update import Record
from hanse.seeds import seed_for
from hanse.site.failure import failure_of
from hanse.site.output import Output

_WAITS = object()  # what a script hands over when it asks for a task
_MAX_WAITS_AFTER_THE_END = 100


@dataclass(frozen=True, slots=True)
class Ending:
    """What a site's script still had to say when the job was over: values logged after its last answer, and an error if it raised one."""

    site: str
    failure: Failure | None = None
    records: tuple[Record, ...] = ()


class ScriptHost:
    """Runs one script for each of many sites. All calls must come from one thread."""

    def __init__(self, script: Script, output: Output) -> None:
        self._script = script
        self._output = output
        self._plays: dict[str, _Play] = {}
        folder = str(script.path.parent)
        self._folder = None if folder in sys.path else folder
        if self._folder:
            sys.path.insert(0, self._folder)
        self._ready = False

    def perform(self, info: SiteInfo, task: Task, *, seed: int, records: list[Record], state: dict[str, Any] | None = None) -> FLModel:
        """The answer of the site's script to `task`, its tensors as the script left them. What it logs is added to `records`.

        state: what the site keeps; what the script makes of it takes its place.
        seed: for all global generators, set when the script gets the task.
        Raises whatever the script raises, and SiteFailed if it ends or asks for another task without an answer.
        """
        name, script = info.name, self._script.path.name
        if name in self._plays and not self._plays[name].waits:
            self._finish_last(name, info, seed_for(seed, "before"), records)
        if name not in self._plays:
            self._start(info, records)
        seed_all(seed)
        session, state = self._plays[name].session, {} if state is None else state
        _replace(session.state, state)
        outcome = self._resume(name, info, records, task)
        if isinstance(outcome, FLModel):
            _replace(state, session.state)
            return outcome
        if outcome is _WAITS:
            problem = f"{script} asked for the next task without an answer to {task.name!r}."
        else:
            problem = f"{script} ended without an answer to {task.name!r}."
        raise SiteFailed(problem, hint="Call send() once for each task, of any name: see is_train(), is_evaluate(), is_submit_model().")

    def close(self) -> list[Ending]:
        """The job is over: let each script run to its end, with no task left. Those with something left to say, by site."""
        endings = []
        for name in sorted(self._plays):
            play, records, failure = self._plays[name], list[Record](), None
            play.session.over = True
            seed_all(seed_for(play.session.info.seed, "end", name))
            try:
                self._resume(name, play.session.info, records)
                if play.session.waits_after_the_end > _MAX_WAITS_AFTER_THE_END:
                    failure = Failure("SiteFailed", f"{self._script.path.name} goes on asking for tasks after the job's end; stopped.")
            except (Exception, SystemExit) as error:
                failure, record = failure_of(error)
                records.append(record)
            if failure or records:
                endings.append(Ending(name, failure, tuple(records)))
        self._plays.clear()
        if self._folder in sys.path:
            sys.path.remove(self._folder)
        return endings

    def _start(self, info: SiteInfo, records: list[Record]) -> None:
        if not self._ready:  # or the first site's first lines would not find its framework seeded, and the others' would
            roots = {name.partition(".")[0] for name in imported_modules(self._script.path)}
            for framework in roots & entry_points(group=GROUP).names:
                import_module(framework)
            self._ready = True
        self._plays[info.name] = _Play(self._script, info)
        seed_all(seed_for(info.seed, "start", info.name))
        if self._resume(info.name, info, records) is not _WAITS:
            raise SiteFailed(f"{self._script.path.name} ended without asking for a task.", hint="Call init(), then receive().")

    def _finish_last(self, name: str, info: SiteInfo, seed: int, records: list[Record]) -> None:
        """Run what the script does after its last answer, up to where it waits or ends."""
        seed_all(seed)
        try:
            self._resume(name, info, records)
        except (Exception, SystemExit) as error:
            what = f"{self._script.path.name} raised {type(error).__name__}: {error}"
            raise SiteFailed(f"after its answer to the task before, {what}", hint="It starts anew.") from error

    def _resume(self, name: str, info: SiteInfo, records: list[Record], task: Task | None = None) -> object:
        """Let the script go on until it gives way: its answer, _WAITS, or None when it has ended, in which case it is let go."""
        play = self._plays[name]
        play.session.begin(info, records, task)
        try:
            with self._output.of(name):
                outcome = play.resume()
        except BaseException:
            del self._plays[name]
            raise
        if play.dead:
            del self._plays[name]
            return None
        play.waits = outcome is _WAITS
        return outcome


class _Play:
    """One site's run of the script."""

    def __init__(self, script: Script, info: SiteInfo) -> None:
        self.session = _SiteSession(info)
        self.waits = False
        self._script = script
        self._argv = [str(script.path), *script.argv_of(info)]
        self._module = ModuleType("__main__")
        self._module.__file__ = str(script.path)
        self._greenlet = greenlet(self._run)
        self._thread_states: dict[str, Any] = {}

    @property
    def dead(self) -> bool:
        return bool(self._greenlet.dead)

    def resume(self) -> object:
        """Let it go on until it gives way, as the main program with its own arguments; raises what it raises."""
        self._greenlet.parent = getcurrent()
        with self._as_main(), self._with_thread_states():
            return self._greenlet.switch()

    def _run(self) -> None:
        enter(self.session)
        try:
            exec(_compiled(self._script.path), self._module.__dict__)  # the job's own code, which a site is there to run
        except SystemExit as end:
            if end.code not in (None, 0):
                raise

    @contextmanager
    def _as_main(self) -> Iterator[None]:
        main, argv = sys.modules["__main__"], sys.argv
        sys.modules["__main__"], sys.argv = self._module, self._argv
        try:
            yield
        finally:
            sys.modules["__main__"], sys.argv = main, argv

    @contextmanager
    def _with_thread_states(self) -> Iterator[None]:
        """A script that waits inside `torch.no_grad()` must not switch gradients off for the others."""
        outside = [(adapter, adapter.thread_state()) for adapter in loaded()]
        for adapter, _ in outside:
            if adapter.name in self._thread_states:
                adapter.set_thread_state(self._thread_states[adapter.name])
        try:
            yield
        finally:
            for adapter, state in outside:
                self._thread_states[adapter.name] = adapter.thread_state()
                adapter.set_thread_state(state)


class _SiteSession(TaskAtHand):
    """See `hanse.client.session.Session`. It lives inside the script's greenlet, and the host is that greenlet's parent."""

    def __init__(self, info: SiteInfo) -> None:
        self.info = info
        self.task_name = ""
        self.state: dict[str, Any] = {}
        self.over = False
        self.waits_after_the_end = 0
        self._records: list[Record] = []

    def begin(self, info: SiteInfo, records: list[Record], task: Task | None) -> None:
        """The host's side: what there is when the script goes on."""
        self.info, self._records = info, records
        if task is not None:
            self.info = replace(info, config={**info.config, **task.config})
            self.task_name, self._model = task.name, task.model

    def is_running(self) -> bool:
        self._model, self._received = None, False
        if self.over:
            self.waits_after_the_end += 1
            if self.waits_after_the_end > _MAX_WAITS_AFTER_THE_END:
                raise GreenletExit
        else:
            getcurrent().parent.switch(_WAITS)
        return self._model is not None

    def send(self, model: FLModel) -> None:
        self._answered()
        getcurrent().parent.switch(model)

    def record(self, record: Record) -> None:
        self._records.append(record)


def _replace(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Make `old` hold what `new` does: the script may have a name for it."""
    old.clear()
    old.update(new)


@lru_cache(maxsize=16)
def _compiled(path: Path) -> CodeType:
    return compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
