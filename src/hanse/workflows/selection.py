"""Which sites train in a round: any alike, those with more examples more often, or those where the model does worst."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from hanse.cohort import Cohort
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.task import EVALUATE, Task

EXAMPLES = "examples"
"""The task that asks a site how many examples it has: it answers `FLModel(meta={"examples": …})`."""
MOST_ASKED = 10_000
"""Of more sites, not every one is asked how many examples it has."""

_told: WeakKeyDictionary[Cohort, np.ndarray[Any, np.dtype[np.float64]]] = WeakKeyDictionary()
"""How many examples the sites of a running job have told, by rank; NaN for those that have not."""


class Selection(Protocol):
    """Chooses the sites of each round. What it goes by is given, or asked of the sites, so that a restarted job chooses the same."""

    def needs(self, count: int | None) -> tuple[str, ...]:
        """The tasks that sites must be able to do so that `count` of them (None: all) can be chosen. Raises ConfigError if it cannot be."""

    async def select(
        self, cohort: Cohort, model: FLModel, count: int | None, *, within_s: float | None = None, grace_s: float | None = None
    ) -> tuple[str, ...]:
        """`count` sites (None: all) to train `model`, ranked by name. All randomness is the cohort's.

        within_s, grace_s: seconds for what it asks of the sites, and for stragglers once enough have answered.
        Raises ConfigError if there are fewer sites than that, TooFewUpdates if too few of those asked can be chosen.
        """


@dataclass(frozen=True)
class Uniform:
    """All sites alike, without replacement: what `cohort.sample` draws, and the default."""

    def needs(self, count: int | None) -> tuple[str, ...]:
        return ()

    async def select(
        self, cohort: Cohort, model: FLModel, count: int | None, *, within_s: float | None = None, grace_s: float | None = None
    ) -> tuple[str, ...]:
        return cohort.sample(count)


@dataclass(frozen=True)
class ByExamples:
    """Sites with more examples more often: one after the other without replacement, each time with probability p_k ∝ examples.

    So a site's chance to be among several is near p_k times their number, and lower for very large sites. Of sites drawn like this the
    plain mean is the one to take (Li et al., ICLR 2020, Scheme II, which draws with replacement): `WeightedMean("equal")`.

    examples: of each site by name, numbers from 0; all sites must be there, and one with 0 is never drawn. None: every site is asked in
        the first round, by the task "examples", which it answers with `FLModel(meta={"examples": …})`. What it tells holds until the job
        ends or is restarted. A site that fails is not drawn, and asked again in the next round. Of more than 10,000 sites none is asked:
        `examples` must be given.
    """

    examples: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        _check_examples(self.examples)

    def needs(self, count: int | None) -> tuple[str, ...]:
        if count is None:
            raise ConfigError("selection is ByExamples, and all sites train in each round: give sites_per_round, or no selection")
        return (EXAMPLES,) if self.examples is None else ()

    async def select(
        self, cohort: Cohort, model: FLModel, count: int | None, *, within_s: float | None = None, grace_s: float | None = None
    ) -> tuple[str, ...]:
        return await _drawn_by_examples(cohort, self.examples, count, within_s, grace_s)


@dataclass(frozen=True)
class PowerOfChoice:
    """The sites where the model does worst: power-of-choice (Cho, Wang & Joshi, AISTATS 2022, π_pow-d).

    It converges sooner than a uniform choice, and is biased towards these sites.

    d candidates are drawn, each scores the model on its own data (the task "evaluate"), and the m with the highest loss train; of equal
    losses the first by name. Losses are asked anew in each round, of the model as it is. A candidate that fails, or whose loss is not a
    number, is passed over; an infinite loss is the highest.

    candidates: d; not below the number of sites a round, m. metric: under which name the loss is among the metrics.
    by_examples: draw candidates with probability ∝ examples, as in the paper; False: all alike. examples: as in ByExamples.
    """

    candidates: int
    metric: str = "loss"
    by_examples: bool = True
    examples: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if type(self.candidates) is not int or self.candidates < 1:
            raise ConfigError(f"candidates is {self.candidates!r}: it must be a whole number above 0")
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f'metric is {self.metric!r}: it must be the name of a metric, such as "loss"')
        if not isinstance(self.by_examples, bool):
            raise ConfigError(f"by_examples is {self.by_examples!r}: it must be True or False")
        _check_examples(self.examples)

    def needs(self, count: int | None) -> tuple[str, ...]:
        if count is None or count > self.candidates:
            asked = "all sites" if count is None else f"{count} sites"
            raise ConfigError(
                f"{asked} a round cannot be the worst of {self.candidates} candidates: give sites_per_round, and not above that"
            )
        return (EVALUATE, EXAMPLES) if self.by_examples and self.examples is None else (EVALUATE,)

    async def select(
        self, cohort: Cohort, model: FLModel, count: int | None, *, within_s: float | None = None, grace_s: float | None = None
    ) -> tuple[str, ...]:
        self.needs(count)
        assert count is not None
        if self.by_examples:
            asked = await _drawn_by_examples(cohort, self.examples, self.candidates, within_s, grace_s)
        else:
            asked = cohort.sample(self.candidates)
        losses: dict[str, float] = {}
        async for update in cohort.ask(Task(EVALUATE, model), of=asked, min_updates=count, within_s=within_s, grace_s=grace_s):
            if update.failure is None:
                losses[update.site] = update.model.metrics.get(self.metric, math.nan)
        known = [site for site in sorted(losses) if not math.isnan(losses[site])]
        if len(known) < count:
            raise ConfigError(
                f"{len(known)} of {len(losses)} candidates gave a number as their {self.metric!r}, and {count} are to train.",
                hint=f"Return {self.metric!r} from @app.evaluate, or say which metric is the loss: PowerOfChoice(…, metric=…).",
            )
        return tuple(sorted(sorted(known, key=lambda site: -losses[site])[:count]))


async def _drawn_by_examples(
    cohort: Cohort, given: Mapping[str, float] | None, count: int | None, within_s: float | None, grace_s: float | None
) -> tuple[str, ...]:
    """`count` sites, drawn one after the other with probability ∝ examples: those with the smallest E_k / n_k, where E_k are exponential
    (Efraimidis & Spirakis, Information Processing Letters 2006)."""
    if count is None or not 0 < count < len(cohort.sites):
        return cohort.sample(count)
    n = _given(cohort.sites, given) if given is not None else await _asked(cohort, count, within_s, grace_s)
    able = np.flatnonzero(n > 0)
    if len(able) < count:
        raise ConfigError(
            f"{count} sites are to be drawn by their examples, and {len(able)} of {len(n)} said that they have any.",
            hint='A site answers the task "examples" with FLModel(meta={"examples": a number}).',
        )
    keys = cohort.rng.exponential(size=len(n))[able] / n[able]
    ranks = able[np.argpartition(keys, count - 1)[:count]]
    return tuple(cohort.sites[rank] for rank in np.sort(ranks).tolist())


def _given(sites: Sequence[str], examples: Mapping[str, float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    if missing := [site for site in sites if site not in examples]:
        raise ConfigError(f"examples names {len(examples)} sites, and {len(missing)} are missing, the first is {missing[0]!r}")
    return np.array([examples[site] for site in sites], float)


async def _asked(cohort: Cohort, count: int, within_s: float | None, grace_s: float | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each site's examples, by rank; 0 for one that failed, or that told no number. Those that have told are not asked again."""
    if len(cohort.sites) > MOST_ASKED:
        raise ConfigError(
            f"each of {len(cohort.sites):,} sites would be asked how many examples it has, and at most {MOST_ASKED:,} are.",
            hint="Give the numbers, as ByExamples(examples={site: number, …}), or draw without them: Uniform(), or "
            "PowerOfChoice(…, by_examples=False).",
        )
    n = _told.setdefault(cohort, np.full(len(cohort.sites), np.nan))
    if unknown := [cohort.sites[rank] for rank in np.flatnonzero(np.isnan(n)).tolist()]:
        needed = max(0, count - (len(n) - len(unknown)))
        async for update in cohort.ask(Task(EXAMPLES, FLModel()), of=unknown, min_updates=needed, within_s=within_s, grace_s=grace_s):
            if update.failure is None:
                told = update.model.meta.get("examples")
                n[cohort.sites.index(update.site)] = told if _is_count(told) else 0
    else:
        cohort.skip()  # a restarted job asks here
    return np.where(np.isnan(n), 0, n)


def _check_examples(examples: Mapping[str, float] | None) -> None:
    if examples is None:
        return
    if not isinstance(examples, Mapping) or not examples:
        raise ConfigError(f"examples is {examples!r}: it must map each site to a number from 0, or be None")
    for site, number in examples.items():
        if not _is_count(number):
            raise ConfigError(f"examples of site {site!r} is {number!r}: it must be a number from 0")


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
