"""A run's events as single values, the same for every receiver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hanse.server.run import Run


@dataclass(frozen=True, slots=True)
class Value:
    """One thing that was noted. site: where; "" for the whole federation. step: the round, or what training code counts itself.

    kind: "scalar" (`value` is a float), "text", "param" or "tag".
    """

    site: str
    key: str
    value: Any
    step: int
    kind: str = "scalar"

    @property
    def name(self) -> str:
        """Key and site as one name."""
        return f"{self.site}/{self.key}" if self.site else self.key


def values(run: Run, *, sites: bool = True) -> Iterator[Value]:
    """Global metrics of each round; with `sites`, each site's, under its task's name, and what its training code tracked."""
    for event in run.events("round"):
        yield from (Value("", key, float(value), event["round"]) for key, value in event["metrics"].items())
    if not sites:
        return
    for event in run.events("update"):
        yield from (Value(event["site"], f"{event['task']}/{key}", float(value), event["round"]) for key, value in event["metrics"].items())
    for event in run.events("record"):
        value, kind = event["value"], event["kind"]
        if kind not in ("param", "tag"):
            kind = "text" if isinstance(value, str) else "scalar"
        step = event["round"] if event["step"] is None else event["step"]
        yield Value(event["site"], event["key"], float(value) if kind == "scalar" else str(value), step, kind)


def params(run: Run) -> dict[str, str]:
    """The job's settings, as texts."""
    job = run.facts["job"]
    return {"recipe": str(job["recipe"]), "seed": str(run.facts["seed"]), **{key: str(value) for key, value in job["arguments"].items()}}
