"""One task at one site: the model in through the site's filters, training code, the answer out through the site's filters."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hanse.app import MAX_STATE_ARRAY_BYTES, MAX_STATE_BYTES, App, Site, Stack
from hanse.client.framework import from_arrays, load_adapter, map_leaves, number, seed_all, to_arrays, twins
from hanse.client.script import Script
from hanse.client.session import SiteInfo
from hanse.errors import ConfigError
from hanse.filters import Filters, apply
from hanse.messages.flmodel import FLModel, bearing
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Columns, Record, Update
from hanse.seeds import generator, seed_for
from hanse.site.failure import failure_of
from hanse.site.output import Output, Sink
from hanse.site.personal import LOCAL, keep, recall
from hanse.site.script import Ending, ScriptHost

_PRIVATE_FROM_BYTES = 32 << 20  # below, a mapping for each site costs more than a copy for all


Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Stacked:
    """What several sites made of a task at once: their updates, and the parameters of these as arrays of shape (sites, …)."""

    updates: Columns
    params: Mapping[str, Array]

    def each(self) -> Iterator[Update]:
        """The updates with their parameters."""
        for row, update in enumerate(self.updates):
            yield replace(update, model=replace(update.model, params={name: array[row] for name, array in self.params.items()}))


class SiteRunner:
    """Runs a job's training code for any number of sites of this process, one at a time, always in the same thread.

    code: functions, or a script. framework: whose tensors the code gets (None: NumPy arrays). sink: takes each line that the code prints.

    What sites share: the arrays of a task. NumPy code gets read-only views of them; a framework's tensors can be written, so each site gets
    its own, as twins of the task's tensors that are copied when written, or as `run` says. What they do not share: random numbers. Every
    global generator is seeded for site and task before the code runs, so the same task done again, here or in another process, gives the
    same bits.
    """

    def __init__(
        self, code: App | Script, *, filters: Filters | None = None, framework: str | None = None, sink: Sink | None = None
    ) -> None:
        self._filters = Filters() if filters is None else filters
        self._framework = framework
        self._output = Output(sink)
        self._tensors: tuple[Any, Any] | None = None
        self._shared: tuple[FLModel, FLModel] | None = None
        if framework:
            load_adapter(framework)  # and with it the framework, so that it is seeded for the first site too
        self._code = code if isinstance(code, App) else ScriptHost(code, self._output)

    def run(
        self, info: SiteInfo, task: Task, task_id: TaskId, state: dict[str, Any], *, private: Callable[[], FLModel] | None = None
    ) -> Update:
        """Do the task as the site that `info` describes. An exception in training code makes an update with a failure.

        state: the site's; changed in place if the task succeeds.
        private: gives the task's model over writable memory that this site has to itself, such as a copy-on-write mapping, so that its
            arrays become tensors without a copy. Used for models of 32 MiB or more, where there are no `site_in` filters.
        The update's arrays may share memory with those of the code, which may use one model for every site: they are good until the next
        `run`.
        """
        began_s = time.perf_counter()
        before, records = dict(state), list[Record]()
        streams = (info.name, task.name, task_id.commit, task_id.index)
        try:
            shared = self._shared_of(task.model)
            reference = _shared(self._filtered("site_in", shared, shared, info, streams)) if self._filters.site_in else shared
            config = {**info.config, **task.config}
            own = recall(reference, config, state)
            given = self._given(task.model, reference, private) if own is reference else self._given(_shared(own), _shared(own), None)
            seed = seed_for(info.seed, "train", *streams)
            if isinstance(self._code, App):
                answer = self._call(self._code, info, Task(task.name, given, task.config), seed, streams, state, records)
            else:
                after = copy.deepcopy(state) if state else {}
                answer = self._code.perform(info, replace(task, model=given), seed=seed, records=records, state=after)
                _renew(state, after)
            leaving, kept = keep(_checked(answer), own, config)
            model = self._filtered("site_out", leaving, reference, info, streams)
            if kept:
                _check_state(mine := {**state, LOCAL: {**state.get(LOCAL, {}), **kept}})
                state.update(mine)
        except (Exception, SystemExit) as error:
            _replace(state, before)  # what was kept last may have come before a filter that raised
            failure, traceback = failure_of(error)
            seconds = time.perf_counter() - began_s
            return Update(info.name, task_id, failure=failure, seconds=seconds, records=(*records, traceback))
        return Update(info.name, task_id, model, seconds=time.perf_counter() - began_s, records=tuple(records))

    def together(
        self, infos: Sequence[SiteInfo], task: Task, key: tuple[str, int, int], states: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Stacked]:
        """Do the task at many sites at once, those of them that can be; the others are left to `run`, such as one that fails.

        key: what the sites' task ids begin with. Global generators are seeded once for all. What a stack shares its memory with is good
        until the next one is asked for.
        """
        if not isinstance(self._code, App) or not trains_together(self._code, self._filters, task, {}):
            return
        handler = self._code.together(task.name)
        alone = [info for info in infos if not states.get(info.name) and LOCAL not in info.config]
        if handler is None or len(alone) < 2:
            return
        sites = [self._site(info, task, (info.name, task.name, *key[1:]), {}, []) for info in alone]
        began_s = time.perf_counter()
        seed_all(seed_for(alone[0].seed, "train", alone[0].name, task.name, *key[1:]))
        try:
            model = replace(task.model, params=self._tensors_of(task.model))
            with self._output.of(alone[0].name):
                for stack in handler.together(model, self._in_turn(sites)):
                    seconds = (time.perf_counter() - began_s) / len(stack.rows)
                    yield _stacked([sites[row] for row in stack.rows], stack, key, seconds)
                    began_s = time.perf_counter()
        except Exception:  # what was not done is done one by one, where it fails again if it must, and says for which site
            return

    def _in_turn(self, sites: Sequence[Site]) -> Iterator[Site]:
        for site in sites:
            self._output.turn_to(site.name)
            yield site

    def close(self) -> list[Ending]:
        """The job is over: scripts run to their end. Returns what sites still had to say."""
        endings = self._code.close() if isinstance(self._code, ScriptHost) else []
        self._output.close()
        return endings

    def _given(self, model: FLModel, reference: FLModel, private: Callable[[], FLModel] | None) -> FLModel:
        """The model as the code gets it, which may change every container in it: `reference`, what the filters made of the task's model."""
        if self._framework is None or self._filters.site_in:
            params = from_arrays(reference.params, self._framework)
        elif private is None or _size_bytes(model) < _PRIVATE_FROM_BYTES:
            params = twins(self._tensors_of(model), self._framework)
        else:
            params = from_arrays(private().params, self._framework)
        return bearing(reference, params, metrics=dict(reference.metrics), meta=dict(reference.meta))

    def _shared_of(self, model: FLModel) -> FLModel:
        """A task's model in arrays that are not to be written, made once for all sites that are given it one after another."""
        if self._shared is None or self._shared[0] is not model:
            self._shared = model, _shared(model)
        return self._shared[1]

    def _tensors_of(self, model: FLModel) -> Any:
        """A model's params as tensors, made once for all sites that are given the same params one after another."""
        if self._tensors is None or self._tensors[0] is not model.params:
            self._tensors = model.params, from_arrays(_shared(model).params, self._framework)
        return self._tensors[1]

    def _call(
        self, app: App, info: SiteInfo, task: Task, seed: int, streams: tuple[object, ...], state: dict[str, Any], records: list[Record]
    ) -> FLModel:
        site = self._site(info, task, streams, copy.deepcopy(state) if state else {}, records)
        seed_all(seed)
        with self._output.of(info.name):
            answer = app.run(task.name, task.model, site)
        _renew(state, site.state)
        return answer

    def _site(self, info: SiteInfo, task: Task, streams: tuple[object, ...], state: dict[str, Any], records: list[Record]) -> Site:
        config = {**info.config, **task.config}
        return Site(info.name, info.rank, info.count, info.job_id, config, state, info.seed, ("site", *streams), records)

    def _filtered(self, edge: str, model: FLModel, reference: FLModel, info: SiteInfo, streams: tuple[object, ...]) -> FLModel:
        if not (filters := getattr(self._filters, edge)):
            return model
        return apply(filters, model, reference=reference, rng=lambda: generator(info.seed, edge, *streams))


def trains_together(code: App | Script, filters: Filters, task: Task, config: Mapping[str, Any]) -> bool:
    """Whether sites with this config do the task many at once: the code can, it is quicker, no filter stands between, and all parameters
    leave the site."""
    free = not filters.site_in and not filters.site_out and LOCAL not in config and LOCAL not in task.config
    return free and isinstance(code, App) and code.together(task.name) is not None


def _stacked(sites: Sequence[Site], stack: Stack, key: tuple[str, int, int], seconds: float) -> Stacked:
    names = [site.name for site in sites]
    metrics = {name: [float(value) for value in values] for name, values in stack.metrics.items()}
    meta = {name: [int(value) for value in values] for name, values in stack.meta.items()}
    return Stacked(Columns(names, key, [seconds] * len(names), metrics, meta), to_arrays(dict(stack.params)))


def _shared(model: FLModel) -> FLModel:
    """The same arrays, not to be written."""

    def read_only(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and leaf.flags.writeable:
            leaf = leaf.view()
            leaf.flags.writeable = False
        return leaf

    return replace(model, params=map_leaves(read_only, model.params))


def _size_bytes(model: FLModel) -> int:
    sizes: list[int] = []
    map_leaves(lambda leaf: sizes.append(leaf.nbytes) if isinstance(leaf, np.ndarray) else None, model.params)
    return sum(sizes)


def _checked(answer: FLModel) -> FLModel:
    """The answer in arrays and plain numbers. Raises ConfigError for metrics that are no numbers."""
    params = to_arrays(answer.params)
    metrics = {}
    for name, value in answer.metrics.items():
        plain = number(value)
        if plain is None or not isinstance(name, str):
            raise ConfigError(f"metric {name!r} is a {type(value).__name__}, {value!r:.60}: metrics map names to numbers")
        metrics[name] = float(plain)
    meta = {name: value if (plain := number(value)) is None else plain for name, value in answer.meta.items()}
    return bearing(answer, params, metrics=metrics, meta=meta)


def _renew(state: dict[str, Any], after: Mapping[str, Any]) -> None:
    """Have `state` hold what the code made of it, in arrays of its own. Raises ConfigError, and changes nothing, if that cannot be kept."""
    kept = {}
    for name, value in after.items():
        try:
            kept[name] = copy.deepcopy(to_arrays(value))
        except ConfigError as error:
            raise ConfigError(f"site.state[{name!r}]: {error}") from error
    _check_state(kept)
    _replace(state, kept)


def _replace(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    old.clear()
    old.update(new)


def _check_state(state: Mapping[str, Any]) -> None:
    """Raises ConfigError if a site's state is too large, or holds what is neither JSON nor an array."""
    array_bytes = 0

    def plain(leaf: Any) -> Any:
        nonlocal array_bytes
        if isinstance(leaf, np.ndarray):
            array_bytes += leaf.nbytes
            return None
        return leaf

    size_bytes = 0
    for name, value in state.items():
        try:
            size_bytes += len(json.dumps({name: map_leaves(plain, value)}))
        except TypeError as error:
            raise ConfigError(f"site.state[{name!r}]: a state holds JSON values and arrays only: {error}") from error
    for what, held, most in (("arrays", array_bytes, MAX_STATE_ARRAY_BYTES), ("JSON", size_bytes, MAX_STATE_BYTES)):
        if held > most:
            limit = f"at most {most:,} are kept"
            raise ConfigError(f"site.state has grown to {held:,} bytes of {what}; {limit}. Keep large things in files of the site.")
