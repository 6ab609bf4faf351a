"""The events of a `metrics.jsonl`, read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hanse.server.events import events_in, read_events


def test_columns_are_read_as_updates(tmp_path: Path) -> None:
    columns = {"sites": ["a", "b"], "seconds": [0.5, 0.25], "metrics": {"loss": [1.0, 2.0]}, "weight": [3, 4]}
    lines = [{"event": "updates", "round": 2, "task": "train", **columns}, {"event": "round", "round": 2}]
    journal = tmp_path / "metrics.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_events(journal)) == [
        {"event": "update", "round": 2, "task": "train", "site": "a", "seconds": 0.5, "metrics": {"loss": 1.0}, "weight": 3},
        {"event": "update", "round": 2, "task": "train", "site": "b", "seconds": 0.25, "metrics": {"loss": 2.0}, "weight": 4},
        {"event": "round", "round": 2},
    ]


def test_columns_may_lack_weights() -> None:
    columns = {"event": "updates", "sites": ["a"], "seconds": [1.0], "metrics": {}, "weight": None}
    expected = {"event": "update", "site": "a", "seconds": 1.0, "metrics": {}, "weight": None}
    assert list(events_in(json.dumps(columns).encode())) == [expected]


def test_a_line_cut_short_says_nothing() -> None:
    assert not list(events_in(b'{"event": "upd'))
    assert not list(events_in(b"17"))


def test_numbers_that_strict_json_does_not_know() -> None:
    (event,) = events_in(b'{"event": "round", "metrics": {"loss": NaN}}')
    assert math.isnan(event["metrics"]["loss"])


def test_a_journal_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert not list(read_events(tmp_path / "metrics.jsonl"))
