"""Simulated time: how long sites of given speed, bandwidth and availability would take for work that runs here as fast as it can."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from hanse.errors import ConfigError
from hanse.messages.params import size_bytes
from hanse.messages.task import TRAIN, Task
from hanse.messages.update import Update
from hanse.seeds import generator
from hanse.transport.courier import Roster

Per = Literal["task", "examples", "steps"]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The sites' devices, for a simulated clock. Raises ConfigError for what is no device.

    A setting that is a number holds for all sites. A mapping of sites to numbers must name every site that is asked.

    seconds: of work for one training task, or for one example or step, as `per` says. Other tasks take no time but their transfers.
    per: "task", "examples" or "steps": what `seconds` are of. The number of examples or steps is that of the update's meta.
    spread: σ of a lognormal factor that each site's `seconds` are multiplied by, drawn once; the median stays. 0: none.
    download_bytes_per_s, upload_bytes_per_s: how fast the arrays of a task come down, and those of an update go up; None: at once.
    bandwidth_spread: σ of such a factor of both bandwidths, one draw a site.
    availability: the fraction of each period that a site is there, in one piece that begins at a moment of its own. What a site is at when
        it goes waits until it is there again.
    period_s: the length of a period: a day.
    seed: of the draws; they do not depend on the job's seed.
    """

    seconds: float | Mapping[str, float] = 1.0
    per: Per = "task"
    spread: float = 0.0
    download_bytes_per_s: float | Mapping[str, float] | None = None
    upload_bytes_per_s: float | Mapping[str, float] | None = None
    bandwidth_spread: float = 0.0
    availability: float | Mapping[str, float] = 1.0
    period_s: float = 86_400.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per not in get_args(Per):
            raise ConfigError(f"Devices has per={self.per!r}: it must be one of {', '.join(get_args(Per))}")
        self._check("seconds", least=0.0)
        for name in ("download_bytes_per_s", "upload_bytes_per_s"):
            if getattr(self, name) is not None:
                self._check(name, least=math.ulp(0.0))
        self._check("availability", least=math.ulp(0.0), most=1.0)
        self._check("period_s", least=math.ulp(0.0), mapping=False)
        for name in ("spread", "bandwidth_spread"):
            self._check(name, least=0.0, mapping=False)
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"Devices has seed={self.seed!r}: it must be a whole number from 0")

    def _check(self, name: str, *, least: float, most: float = math.inf, mapping: bool = True) -> None:
        value = getattr(self, name)
        values = list(value.values()) if mapping and isinstance(value, Mapping) else [value]
        for number in values:
            is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
            if not (is_number and least <= number <= most):
                bounds = "at least 0" if least == 0 else "above 0" if most == math.inf else f"above 0 and at most {most:g}"
                raise ConfigError(f"Devices has {name}={value!r}: it must be {bounds}")

    def check_sites(self, roster: Roster) -> None:
        """Raises ConfigError if a mapping leaves out a site, or names one that is not there."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            if not isinstance(value, Mapping):
                continue
            try:
                for site in value:
                    roster.index(site)
            except ValueError as error:
                raise ConfigError(f"Devices names a site that is not there, in {setting.name}: {error}") from error
            if len(value) < len(roster):
                missing = next(site for site in roster if site not in value)
                raise ConfigError(f"Devices has no {setting.name} for site {missing!r}: name every site, or give one number for all")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Devices:
        """Out of JSON values. Raises ConfigError for a setting that there is not."""
        known = {setting.name for setting in fields(cls)}
        if unknown := settings.keys() - known:
            raise ConfigError(f"Devices has no setting {min(unknown)!r}; it has {', '.join(sorted(known))}")
        return cls(**settings)


@dataclass
class VirtualClock:
    """Simulated time for sites with such `devices`; implements `hanse.transport.courier.Clock`.

    A site's answer is here once it has fetched the task, done the work and sent the update, one after the other, while it was available.
    now_s: since the job's start, and where the clock begins.
    """

    devices: Devices
    now_s: float = 0.0
    _drawn: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def earliest_s(self, site: str, task: Task, *, task_bytes: int, began_s: float) -> float:
        """See `Clock`: exact, but for the upload and for work that is counted in examples or steps."""
        work = 1.0 if self.devices.per == "task" else 0.0
        return self._done_s(site, task, work, task_bytes, 0, began_s)

    def arrival_s(self, update: Update, task: Task, *, task_bytes: int, began_s: float) -> float:
        """See `Clock`. A failed site has worked as long as another one if `per` is "task", and else not at all; it sends nothing.

        Raises ConfigError if a trained update does not tell what `per` counts.
        """
        devices = self.devices
        if devices.per != "task" and task.name == TRAIN and update.failure is None and devices.per not in update.model.meta:
            hint = f'Send FLModel(..., meta={{"{devices.per}": n}}), or count tasks: per="task".'
            raise ConfigError(f"site {update.site!r} told no {devices.per!r}, and Devices has per={devices.per!r}.", hint=hint)
        work = 1.0 if devices.per == "task" else float(update.model.meta.get(devices.per) or 0.0)
        sent_bytes = 0 if update.failure is not None else update.size_bytes or size_bytes(update.model.params)
        return self._done_s(update.site, task, work, task_bytes, sent_bytes, began_s)

    def _done_s(self, site: str, task: Task, work: float, task_bytes: int, sent_bytes: int, began_s: float) -> float:
        devices = self.devices
        slower, faster, phase = self._draws(site)
        busy_s = 0.0
        for count, rate in ((task_bytes, devices.download_bytes_per_s), (sent_bytes, devices.upload_bytes_per_s)):
            if rate is not None:
                busy_s += count / (_of(rate, site) * faster)
        if task.name == TRAIN:
            busy_s += work * _of(devices.seconds, site) * slower
        return _after(began_s, busy_s, share=_of(devices.availability, site), period_s=devices.period_s, phase=phase)

    def _draws(self, site: str) -> tuple[float, float, float]:
        """The site's factors of work and of bandwidth, and when its time begins, as a fraction of a period."""
        if site not in self._drawn:
            rng = generator(self.devices.seed, "device", site)
            slower, faster = math.exp(self.devices.spread * rng.normal()), math.exp(self.devices.bandwidth_spread * rng.normal())
            self._drawn[site] = slower, faster, float(rng.uniform())
        return self._drawn[site]


def _of(value: float | Mapping[str, float], site: str) -> float:
    return value[site] if isinstance(value, Mapping) else value


def _after(began_s: float, busy_s: float, *, share: float, period_s: float, phase: float) -> float:
    """When a site is done that is there for `share` of each period, from `phase` of it on, and is busy for so long from `began_s` on."""
    if share == 1.0:
        return began_s + busy_s
    there_s = share * period_s
    periods, into_s = divmod(began_s - phase * period_s, period_s)  # into_s: since its time began
    if into_s >= there_s:
        periods, into_s = periods + 1, 0.0
    more, rest_s = divmod(into_s + busy_s, there_s)
    if rest_s == 0.0 and more:  # done at the very end of its time
        more, rest_s = more - 1, there_s
    return (periods + more + phase) * period_s + rest_s
