"""The recipe for federated statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from hanse.errors import ConfigError
from hanse.jobs.recipe import Recipe, Workflow, counts, json_values, positive
from hanse.messages.task import DESCRIBE, HISTOGRAM
from hanse.workflows.describe import describe


@dataclass(frozen=True, kw_only=True)
class StatisticsRecipe(Recipe):
    """Statistics of the sites' tables; nothing is trained. What may leave a site is said where its app is made, by
    `hanse.table_app`, and in the site's policy.

    columns: which; None: every column of numbers that a site has.
    bins: how many a histogram has; None: no histograms, and no quantiles.
    ranges: the ends of the histograms, by column, such as {"age": [0, 120]}; of other columns the sites are asked for a rounded range.
    quantiles: which to read off the histograms.
    groups: site to path, such as {"berlin": "eu/de"}; each level is described as a group of its own.
    min_updates: how many sites must answer (None: all). within_s: seconds for each of the two tasks.
    """

    kind: ClassVar[str] = "statistics"

    columns: Sequence[str] | None = None
    bins: int | None = 20
    ranges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    quantiles: Sequence[float] = (0.25, 0.5, 0.75)
    groups: Mapping[str, str] = field(default_factory=dict)
    min_updates: int | None = None
    within_s: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must_handle(DESCRIBE, *([HISTOGRAM] if self.bins else []))
        counts(self, bins=self.bins, min_updates=self.min_updates)
        positive(self, within_s=self.within_s)
        if self.columns is not None:
            column_names(self, columns=self.columns)
        json_values("ranges", self.ranges)
        for column, ends in self.ranges.items():
            if not (isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_finite, ends)) and ends[0] < ends[1]):
                raise ConfigError(f"recipe {self.name!r} has ranges[{column!r}]={ends!r}: give a lower and a higher end, such as [0, 120]")
        if not isinstance(self.quantiles, list | tuple) or not all(_finite(q) and 0 <= q <= 1 for q in self.quantiles):
            raise ConfigError(f"recipe {self.name!r} has quantiles={self.quantiles!r}: give a list of numbers from 0 to 1")
        json_values("groups", self.groups)
        for site, path in self.groups.items():
            if not isinstance(path, str) or not path.strip("/"):
                raise ConfigError(f"recipe {self.name!r} has groups[{site!r}]={path!r}: give a path such as 'eu/de'")

    def workflow(self) -> Workflow:
        settings: dict[str, Any] = {
            name: getattr(self, name) for name in ("columns", "bins", "ranges", "quantiles", "groups", "min_updates", "within_s")
        }
        return partial(describe, **settings)


def column_names(recipe: Recipe, **values: Any) -> None:
    """Raises ConfigError for the first value that is no list of one or more different names."""
    for name, value in values.items():
        right = isinstance(value, list | tuple) and value and all(isinstance(each, str) and each for each in value)
        if not right or len(set(value)) < len(value):
            raise ConfigError(f"recipe {recipe.name!r} has {name}={value!r}: give a list of different column names, such as ['age']")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
