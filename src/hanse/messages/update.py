"""What a site sends back, and what many of them make."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, Self, overload

from hanse.errors import Failure
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId


@dataclass(frozen=True, slots=True)
class Record:
    """One value that training code logged: a scalar, a text, a parameter.

    kind: scalar, text, param, tag, log (a line of the site's log).
    value: a JSON value. step: the trainer's own counter, None if it gave none.
    """

    key: str
    value: Any
    step: int | None = None
    kind: str = "scalar"


@dataclass(frozen=True, slots=True)
class Update:
    """What a site sends back for one task. `failure` is set where the site could not do it; the model is empty then.

    seconds: wall time of the work at the site.
    size_bytes: of its arrays, as they left the site; only where a simulated clock asks for it. It does not travel in a frame.
    """

    site: str
    task_id: TaskId
    model: FLModel = field(default_factory=FLModel)
    failure: Failure | None = None
    seconds: float = 0.0
    records: tuple[Record, ...] = ()
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Columns:
    """Good updates of one task without their parameters, column by column: thousands of sites take hardly more time than one.

    key: what their task ids begin with: job, commit, index. seconds: of each. metrics, meta: names to one number for each.
    """

    sites: Sequence[str]
    key: tuple[str, int, int]
    seconds: Sequence[float]
    metrics: Mapping[str, Sequence[float]]
    meta: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, updates: Sequence[Update]) -> Self | None:
        """Updates of one task as columns; None if one has failed, brought records, or tells other things than the first."""
        first = updates[0]
        metrics, meta = first.model.metrics.keys(), first.model.meta.keys()
        for update in updates:
            if update.failure or update.records or update.model.metrics.keys() != metrics or update.model.meta.keys() != meta:
                return None
        return cls(
            [update.site for update in updates],
            first.task_id[:3],
            [update.seconds for update in updates],
            {name: [update.model.metrics[name] for update in updates] for name in metrics},
            {name: [update.model.meta[name] for update in updates] for name in meta},
        )

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Update]:
        return map(self.row, range(len(self.sites)))

    def row(self, at: int) -> Update:
        """One of them."""
        metrics = {name: values[at] for name, values in self.metrics.items()}
        model = FLModel(metrics=metrics, meta={name: values[at] for name, values in self.meta.items()})
        return Update(self.sites[at], TaskId(*self.key, self.sites[at]), model, seconds=self.seconds[at])


class Updates(Sequence[Update]):
    """Updates in parts, each a tuple of them or `Columns`, which are made updates only where somebody looks."""

    def __init__(self, parts: Iterable[tuple[Update, ...] | Columns] = ()) -> None:
        self.parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Update]:
        return chain.from_iterable(self.parts)

    @overload
    def __getitem__(self, at: int) -> Update: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Update, ...]: ...
    def __getitem__(self, at: int | slice) -> Update | tuple[Update, ...]:
        if isinstance(at, slice):
            return tuple(self[each] for each in range(*at.indices(len(self))))
        place = range(len(self))[at]
        number = bisect_right(self._ends, place)
        part = self.parts[number]
        within = place - self._ends[number] + len(part)
        return part.row(within) if isinstance(part, Columns) else part[within]


@dataclass(frozen=True, slots=True)
class Reduced:
    """Many updates made one.

    model: the combined parameters, FULL or DIFF as the updates were; params None if no update brought any.
    metrics: the updates' metrics, averaged with the same weights as the parameters.
    updates: the good updates in canonical order, without their parameters.
    failures: site to why it gave no good update.
    """

    model: FLModel
    metrics: Mapping[str, float]
    updates: Sequence[Update] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)
