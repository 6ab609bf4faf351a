"""Updates that have no mean: each is kept as it is, and all are made one at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

from hanse.aggregation.mean import WeightedMean
from hanse.errors import ConfigError, UpdateRejected
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.update import Update

Check = Callable[[Any, Any], None]
"""Raises ConfigError if the first params cannot be joined with the second: the task's, or another site's, or None if there are none."""
Join = Callable[[Any, Mapping[str, Any]], Any]
"""The task's params (None: none yet) and those of each site, by name in sorted order, as one."""


class Collect:
    """Keeps the params of every update, which `check` has let through, and has `join` make them one. Implements `Aggregator`.

    Memory grows with the number of sites: this is for updates that add up, such as trees, not for what has a mean. Without a task's params
    the first site in the order of merging is the measure for the others. Metrics are averaged as `WeightedMean` does.
    """

    def __init__(self, check: Check, join: Join) -> None:
        self._check = check
        self._join = join
        self._reference: Any = None
        self._held: dict[str, Update] = {}
        self._sites: set[str] = set()
        self._parts: dict[str, Any] = {}
        self._metrics = WeightedMean()
        self._result: FLModel | None = None

    def fresh(self, reference: FLModel | None = None) -> Self:
        new = type(self)(self._check, self._join)
        new._reference = None if reference is None else reference.params
        return new

    def add(self, update: Update) -> None:
        if update.failure is not None:
            raise UpdateRejected(f"site {update.site!r}: the site could not do its task: {update.failure}")
        if update.site in self._sites:
            raise UpdateRejected(
                f"site {update.site!r}: an update of this site is counted already.", hint="Add one update a site and round."
            )
        if update.model.params is not None:
            if update.model.params_type is not ParamsType.FULL:
                raise UpdateRejected(f"site {update.site!r}: its params are a DIFF.", hint="Send FULL: what is joined is no difference.")
            if self._reference is not None:
                self._let_through(update.site, update.model.params, self._reference)
        self._held[update.site] = update
        self._sites.add(update.site)

    def fold(self) -> dict[str, UpdateRejected]:
        rejected = {}
        for site, update in sorted(self._held.items()):
            try:
                params = update.model.params
                if params is not None and self._reference is None:
                    self._let_through(site, params, next(iter(self._parts.values()), None))
                self._metrics.add(replace(update, model=replace(update.model, params=None)))
            except UpdateRejected as error:
                rejected[site] = error
            else:
                if params is not None:
                    self._parts[site] = copy.deepcopy(params)
        self._held = {}
        in_another_unit = self._metrics.fold()
        for site in in_another_unit:
            self._parts.pop(site, None)
        return rejected | in_another_unit

    def partial(self) -> FLModel:
        """The params of each site by its name, and what `WeightedMean` says of the metrics."""
        return replace(self._metrics.partial(), params=dict(self._parts) or None)

    def merge(self, partial: FLModel) -> None:
        parts = partial.params or {}
        if self._reference is None:
            for site, params in parts.items():
                self._let_through(site, params, next(iter(self._parts.values()), None))
        self._metrics.merge(replace(partial, params=None))
        self._parts |= copy.deepcopy(parts)

    def result(self) -> FLModel:
        if self._result is not None:
            return self._result
        for rejected in self.fold().values():
            raise rejected
        params = self._join(self._reference, dict(sorted(self._parts.items()))) if self._parts else None
        self._result = FLModel(params=params, metrics=self._metrics.result().metrics)
        return self._result

    def _let_through(self, site: str, params: Any, measure: Any) -> None:
        try:
            self._check(params, measure)
        except ConfigError as error:
            raise UpdateRejected(f"site {site!r}: {error.message}", hint=error.hint) from error
