"""One task at one site: the model in through the site's filters, training code, the answer out through the site's filters."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hanse.app import MAX_STATE_BYTES, App, Site
from hanse.client.framework import from_arrays, load_adapter, map_leaves, number, seed_all, to_arrays, twins
from hanse.client.script import Script
from hanse.client.session import SiteInfo
from hanse.errors import ConfigError
from hanse.filters import Filters, apply
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Update
from hanse.seeds import generator, seed_for
from hanse.site.failure import failure_of
from hanse.site.output import Output, Sink
from hanse.site.script import Ending, ScriptHost

_PRIVATE_FROM_BYTES = 32 << 20  # below, a mapping for each site costs more than a copy for all


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
        if framework:
            load_adapter(framework)  # and with it the framework, so that it is seeded for the first site too
        self._code = code if isinstance(code, App) else ScriptHost(code, self._output)

    def run(
        self, info: SiteInfo, task: Task, task_id: TaskId, state: dict[str, Any], *, private: Callable[[], FLModel] | None = None
    ) -> Update:
        """Do the task as the site that `info` describes. An exception in training code makes an update with a failure.

        state: the site's, of function apps; changed in place if the task succeeds.
        private: gives the task's model over writable memory that this site has to itself, such as a copy-on-write mapping, so that its
            arrays become tensors without a copy. Used for models of 32 MiB or more, where there are no `site_in` filters.
        The update's arrays may share memory with those of the code, which may use one model for every site: they are good until the next
        `run`.
        """
        began_s = time.perf_counter()
        records: list[Record] = []
        streams = (info.name, task.name, task_id.commit, task_id.index)
        try:
            shared = _shared(task.model)
            reference = _shared(self._filtered("site_in", shared, shared, info, streams))
            given = self._given(task.model, reference, private)
            seed = seed_for(info.seed, "train", *streams)
            if isinstance(self._code, App):
                answer = self._call(self._code, info, replace(task, model=given), seed, streams, state, records)
            else:
                answer = self._code.perform(info, replace(task, model=given), seed=seed, records=records)
            model = self._filtered("site_out", _checked(answer), reference, info, streams)
        except (Exception, SystemExit) as error:
            failure, traceback = failure_of(error)
            seconds = time.perf_counter() - began_s
            return Update(info.name, task_id, failure=failure, seconds=seconds, records=(*records, traceback))
        return Update(info.name, task_id, model, seconds=time.perf_counter() - began_s, records=tuple(records))

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
        return replace(reference, params=params, meta=dict(reference.meta), metrics=dict(reference.metrics), optimizer_params={})

    def _tensors_of(self, model: FLModel) -> Any:
        """A model's params as tensors, made once for all sites that are given the same params one after another."""
        if self._tensors is None or self._tensors[0] is not model.params:
            self._tensors = model.params, from_arrays(_shared(model).params, self._framework)
        return self._tensors[1]

    def _call(
        self, app: App, info: SiteInfo, task: Task, seed: int, streams: tuple[object, ...], state: dict[str, Any], records: list[Record]
    ) -> FLModel:
        config = {**info.config, **task.config}
        own = copy.deepcopy(state) if state else {}
        site = Site(info.name, info.rank, info.count, info.job_id, config, own, info.seed, ("site", *streams), records)
        seed_all(seed)
        with self._output.of(info.name):
            answer = app.run(task.name, task.model, site)
        after = copy.deepcopy(to_arrays(site.state)) if site.state else {}
        _check_state(after)
        state.clear()
        state.update(after)
        return answer

    def _filtered(self, edge: str, model: FLModel, reference: FLModel, info: SiteInfo, streams: tuple[object, ...]) -> FLModel:
        filters = getattr(self._filters, edge)
        return apply(filters, model, reference=reference, rng=lambda: generator(info.seed, edge, *streams))


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
    return replace(answer, params=params, metrics=metrics, meta=meta, optimizer_params={})


def _check_state(state: Mapping[str, Any]) -> None:
    """Raises ConfigError if a site's state is too large, or holds what is neither JSON nor an array."""
    array_bytes = 0

    def plain(leaf: Any) -> Any:
        nonlocal array_bytes
        if isinstance(leaf, np.ndarray):
            array_bytes += leaf.nbytes
            return None
        return leaf

    try:
        size_bytes = len(json.dumps(map_leaves(plain, state))) + array_bytes if state else 0
    except TypeError as error:
        raise ConfigError(f"site.state holds JSON values and arrays only: {error}") from error
    if size_bytes > MAX_STATE_BYTES:
        limit = f"at most {MAX_STATE_BYTES:,} are kept"
        raise ConfigError(f"site.state has grown to {size_bytes:,} bytes; {limit}. Keep large things in files of the site.")
