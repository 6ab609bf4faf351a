"""The seam between a workflow and the way its tasks travel: a courier carries them to sites and brings updates back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hanse.aggregation.aggregator import Aggregator
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Columns, Update

Roster = Sequence[str]
"""All sites of a job, ranked by name. May be lazy: a million simulated sites are no million strings."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One task for many sites. `key` is the part of a task's id that its sites share: job, commit, index.

    groups: the asked sites by rank, in the fixed groups that are folded one by one; their order is the canonical order.
    hurried: there is a deadline, so no site should wait for another one that may never answer.
    sized: a clock has to know how large each update was, so folded ones tell it as `Update.size_bytes`.
    """

    task: Task
    key: tuple[str, int, int]
    groups: tuple[tuple[str, ...], ...]
    hurried: bool = False
    sized: bool = False

    def task_id(self, site: str) -> TaskId:
        return TaskId(*self.key, site)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site for group in self.groups for site in group)


@dataclass(frozen=True, slots=True)
class Folded:
    """One group's updates made one partial sum.

    partial: what the group's aggregator gave; None if no site of the group brought a good update. Valid until `release` is called.
    updates: one for each site of the group, without parameters; those that failed or were rejected carry a failure. Columns
        if all of them are good.
        A group of a single site may come unfolded: with its parameters, valid until `release` is called, and no partial. Added to the
        total, it gives the same bits as its partial would, and spares the memory for it.
    """

    group: int
    partial: FLModel | None
    updates: tuple[Update, ...] | Columns
    release: Callable[[], None]


class Courier(Protocol):
    """Carries tasks to sites. Closing an iterator early gives up what is still out; nothing of it arrives later."""

    roster: Roster

    def ask(self, ask: Ask) -> AsyncGenerator[Update, None]:
        """One update for each site, as they come; a site that cannot answer gives an update with a failure."""

    def fold(self, ask: Ask, aggregator: Aggregator) -> AsyncGenerator[Folded, None]:
        """One `Folded` for each group, as they come, folded where the updates are."""


class Clock(Protocol):
    """Simulated time: when answers arrive, whatever the machine that simulates them is at. Seconds since the job began."""

    now_s: float

    def earliest_s(self, site: str, task: Task, *, task_bytes: int, began_s: float) -> float:
        """When the answer to a task that went out at `began_s` can be here at the earliest, as far as that is known before the work."""

    def arrival_s(self, update: Update, task: Task, *, task_bytes: int, began_s: float) -> float:
        """When this answer is here; not before `earliest_s`."""
