"""What a site sends back, and what many of them make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hanse.errors import Failure
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId


@dataclass(frozen=True, slots=True)
class Record:
    """One value that training code logged: a scalar, a text, a parameter.

    kind: scalar, text, param, tag, log (a line of the site's log).
    value: a JSON value. step: the trainer's own counter, None if it gave none.
    """

    key: str
    value: Any
    step: int | None = None
    kind: str = "scalar"


@dataclass(frozen=True, slots=True)
class Update:
    """What a site sends back for one task. `failure` is set where the site could not do it; the model is empty then.

    seconds: wall time of the work at the site.
    size_bytes: of its arrays, as they left the site; only where a simulated clock asks for it. It does not travel in a frame.
    """

    site: str
    task_id: TaskId
    model: FLModel = field(default_factory=FLModel)
    failure: Failure | None = None
    seconds: float = 0.0
    records: tuple[Record, ...] = ()
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Reduced:
    """Many updates made one.

    model: the combined parameters, FULL or DIFF as the updates were; params None if no update brought any.
    metrics: the updates' metrics, averaged with the same weights as the parameters.
    updates: the good updates in canonical order, without their parameters.
    failures: site to why it gave no good update.
    """

    model: FLModel
    metrics: Mapping[str, float]
    updates: tuple[Update, ...] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)
