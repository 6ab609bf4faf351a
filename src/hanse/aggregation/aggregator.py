"""The seam between a round and the way its updates are combined."""

from __future__ import annotations

from typing import Protocol, Self

from hanse.errors import ConfigError, UpdateRejected
from hanse.messages.flmodel import FLModel
from hanse.messages.update import Update


class Aggregator(Protocol):
    """Combines updates, in one canonical order (sites ranked by name), whatever order they are added in.

    The runtime splits a round's sites into fixed groups. Where a group's updates are, it adds them to an aggregator of their own,
    folds it and sends the `partial` on; where the round ends it merges the partials in the groups' order and asks for the `result`.
    So the result has the same bits for any arrival order, any number of workers, simulated or real.

    It may have a number `needs`: a round that asks fewer sites is refused before it begins.
    """

    def fresh(self, reference: FLModel | None = None) -> Self:
        """An empty aggregator with the same settings, which judges updates against `reference`, the task's model.

        The reference gives the names, shapes and dtypes to expect; without one, or if it has no params, any go and must agree.
        """

    def add(self, update: Update) -> None:
        """Take in one update. Its arrays may be kept, not copied, until `fold` or `result`: do not change them before.

        Raises UpdateRejected, naming site and tensor, and changes nothing, if it cannot be combined with any others.
        """

    def fold(self) -> dict[str, UpdateRejected]:
        """Combine what was added so far, in canonical order; after this the updates' memory may be used again.

        Returns the updates left out, by site, with why: what only the numbers or the other updates show, such as a NaN.
        """

    def partial(self) -> FLModel:
        """All that was folded so far, as one model that can travel: arrays in `params`, JSON values in `meta`."""

    def merge(self, partial: FLModel) -> None:
        """Take in what another aggregator's `partial` gave. Partials are combined in the order they are merged.

        Keeps nothing of the partial's memory. Raises UpdateRejected, and changes nothing, if it does not go with what is here.
        """

    def result(self) -> FLModel:
        """The combined model, with the updates' metrics combined. `params` is None if no update brought any; nothing can be added after it.

        Raises UpdateRejected if something was added but not folded, and folding it leaves it out.
        """


def check_enough(aggregator: Aggregator | None, asked: int) -> None:
    """Raises ConfigError if a round asks fewer sites than the aggregator needs."""
    if asked < (needs := getattr(aggregator, "needs", 1)):
        raise ConfigError(f"{type(aggregator).__name__} needs at least {needs} updates a round, {asked} sites are asked.")
