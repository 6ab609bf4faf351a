"""What goes down to a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hanse.messages.flmodel import FLModel

TRAIN = "train"
EVALUATE = "evaluate"
SUBMIT_MODEL = "submit_model"
DESCRIBE = "describe"
HISTOGRAM = "histogram"
PROPOSE_CENTROIDS = "propose_centroids"
ASSIGN = "assign"
DERIVATIVES = "derivatives"


class TaskId(NamedTuple):
    """Which task this is: the same after a restart, so that work is asked for and counted once.

    job: the job's id. commit: how many commits came before. index: how many asks since that commit. site: who is asked.
    """

    job: str
    commit: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which no task id needs
    site: str

    def __str__(self) -> str:
        return f"{self.job}/{self.commit}/{self.index}/{self.site}"


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work for a site: `name` says which, `model` what to start from, `config` how (JSON values)."""

    name: str
    model: FLModel
    config: Mapping[str, Any] = field(default_factory=dict)
