"""Which queued jobs start now, and on which sites: a pure decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hanse.messages.wire import Resources


@dataclass(frozen=True, slots=True)
class Queued:
    """A job that waits. sites: those that have accepted it. needed: how few of them it can start with. resources: what it takes of each.

    fixed: it has run before, so it starts with all of `sites` or not at all; those that are away may come later, if `needed` are there.
    """

    job: str
    sites: tuple[str, ...]
    needed: int
    resources: Resources
    fixed: bool = False


def starts(
    queue: Sequence[Queued], *, free: Mapping[str, Resources], running: int = 0, max_running: int | None = None
) -> dict[str, tuple[str, ...]]:
    """The jobs of `queue`, first come, first served, that start now, each with its sites by name.

    free: what each connected site that takes jobs has left. running, max_running: how many jobs run already, and how many may.

    A job takes every site that has accepted it and has room. One that could start if its sites had room keeps them for itself: were later
    jobs to use them, it might wait for ever. One that lacks sites holds nobody up.
    """
    left = dict(free)
    started: dict[str, tuple[str, ...]] = {}
    for waiting in queue:
        if max_running is not None and running + len(started) >= max_running:
            break
        here = [site for site in waiting.sites if site in left]
        with_room = [site for site in here if waiting.resources.fits(left[site])]
        if len(with_room) >= waiting.needed and not (waiting.fixed and len(with_room) < len(here)):
            started[waiting.job] = tuple(sorted(waiting.sites if waiting.fixed else with_room))
            for site in with_room:
                left[site] = _minus(left[site], waiting.resources)
        elif len([site for site in waiting.sites if site in free]) >= waiting.needed:
            for site in here:
                del left[site]
    return started


def room(total: Resources, taken: Sequence[Resources]) -> Resources:
    """What is left of `total`; never below zero, though a site may come back with less than it had."""
    for one in taken:
        total = _minus(total, one)
    return total


def _minus(total: Resources, taken: Resources) -> Resources:
    return Resources(
        cores=max(0.0, total.cores - taken.cores),
        memory_bytes=max(0, total.memory_bytes - taken.memory_bytes),
        gpus=max(0, total.gpus - taken.gpus),
    )
