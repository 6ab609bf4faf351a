"""Updates in columns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hanse.errors import Failure
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Columns, Record, Update, Updates

COLUMNS = Columns(["a", "b"], ("job", 1, 2), [0.5, 0.25], {"loss": [1.0, 2.0]}, {"examples": [3, 4]})
ROWS = [
    Update("a", TaskId("job", 1, 2, "a"), FLModel(metrics={"loss": 1.0}, meta={"examples": 3}), seconds=0.5),
    Update("b", TaskId("job", 1, 2, "b"), FLModel(metrics={"loss": 2.0}, meta={"examples": 4}), seconds=0.25),
]
FAILED = Update("c", TaskId("job", 1, 2, "c"), failure=Failure("SiteFailed", "no data"))


def test_columns_are_updates() -> None:
    assert len(COLUMNS) == 2
    assert list(COLUMNS) == ROWS
    assert COLUMNS.row(1) == ROWS[1]


def test_updates_become_columns_if_they_tell_the_same() -> None:
    assert Columns.of(ROWS) == COLUMNS
    other = Update("d", TaskId("job", 1, 2, "d"), FLModel(metrics={"accuracy": 1.0}, meta={"examples": 3}))
    weightless = Update("d", TaskId("job", 1, 2, "d"), FLModel(metrics={"loss": 1.0}))
    noted = replace(ROWS[0], records=(Record("loss", 1.0),))
    assert [Columns.of([ROWS[0], last]) for last in (FAILED, other, weightless, noted)] == [None] * 4


def test_parts_are_one_sequence() -> None:
    updates = Updates([(FAILED,), COLUMNS, (), (FAILED, FAILED)])
    plain = [FAILED, *ROWS, FAILED, FAILED]
    assert len(updates) == 5
    assert list(updates) == plain
    assert [updates[at] for at in range(-5, 5)] == plain * 2
    assert updates[1:4] == tuple(plain[1:4])
    assert updates[::-2] == tuple(plain[::-2])
    with pytest.raises(IndexError):
        updates[5]


def test_none_are_none() -> None:
    assert not Updates()
    assert not list(Updates([()]))
