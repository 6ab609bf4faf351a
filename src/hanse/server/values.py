"""A run's events as single values, the same for every receiver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hanse.server.events import Event


@dataclass(frozen=True, slots=True)
class Value:
    """One thing that was noted. site: where; "" for the whole federation. step: the round, or what training code counts itself.

    kind: "scalar" (`value` is a float), "text", "param" or "tag". time: Unix time; of a site's value, when the round before it ended.
    """

    site: str
    key: str
    value: Any
    step: int
    kind: str = "scalar"
    time: float = 0.0

    @property
    def name(self) -> str:
        """Key and site as one name."""
        return f"{self.site}/{self.key}" if self.site else self.key


def values_of(event: Event, *, time: float = 0.0, sites: bool = True) -> Iterator[Value]:
    """Global metrics of a round; with `sites`, a site's, under its task's name, and what its training code tracked."""
    match event["event"]:
        case "round":
            for key, value in event["metrics"].items():
                yield Value("", key, float(value), event["round"], time=time)
        case "update" if sites:
            for key, value in event["metrics"].items():
                yield Value(event["site"], f"{event['task']}/{key}", float(value), event["round"], time=time)
        case "record" if sites:
            value, kind = event["value"], event["kind"]
            if kind not in ("param", "tag"):
                kind = "text" if isinstance(value, str) else "scalar"
            step = event["round"] if event["step"] is None else event["step"]
            yield Value(event["site"], event["key"], float(value) if kind == "scalar" else str(value), step, kind, time)


def params(facts: Mapping[str, Any]) -> dict[str, str]:
    """The job's settings, as texts. facts: of `run.json`."""
    job = facts["job"]
    return {"recipe": str(job["recipe"]), "seed": str(facts["seed"]), **{key: str(value) for key, value in job["arguments"].items()}}
