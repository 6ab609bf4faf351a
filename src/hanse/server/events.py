"""The events of a `metrics.jsonl`, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

Event: TypeAlias = Mapping[str, Any]


def read_events(journal: Path) -> Iterator[Event]:
    """The events of a `metrics.jsonl`, streamed, one for each update. None if there is no such file; a line cut short by a crash is
    passed over."""
    if not journal.exists():
        return
    with journal.open("rb") as lines:
        for line in lines:
            yield from events_in(line)


def events_in(line: bytes) -> Iterator[Event]:
    """What one line of a `metrics.jsonl` says; nothing if it is cut short."""
    try:
        event = _decode(line)
    except msgspec.DecodeError:
        try:
            event = json.loads(line)  # takes NaN and Infinity too, which strict JSON does not know
        except ValueError:
            return
    if isinstance(event, dict):
        yield from one_by_one(event)


_decode = msgspec.json.Decoder().decode


def one_by_one(event: Event) -> Iterator[Event]:
    """The event, or in place of `updates`, which has those of many sites in columns, an `update` for each."""
    if event.get("event") != "updates":
        yield event
        return
    columns = ("sites", "seconds", "metrics", "weight")
    shared = {key: value for key, value in event.items() if key not in columns} | {"event": "update"}
    weights = event["weight"] or [None] * len(event["sites"])
    for at, (site, seconds, weight) in enumerate(zip(event["sites"], event["seconds"], weights, strict=True)):
        metrics = {name: values[at] for name, values in event["metrics"].items()}
        yield {**shared, "site": site, "seconds": seconds, "metrics": metrics, "weight": weight}
