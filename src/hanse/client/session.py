"""What stands behind the Client API: who this site is, and where its tasks come from."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.update import Record


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """Who a site is in a job: rank counts from 0 in the order of names, count is the number of sites, config holds JSON values."""

    name: str
    rank: int = 0
    count: int = 1
    job_id: str = "local"
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


class Session(Protocol):
    """One site's side of a job, as its training code sees it."""

    info: SiteInfo
    task_name: str
    """The task last received; empty before the first."""
    state: dict[str, Any]
    """What the site keeps between tasks: filled when a task is received, kept as it is when the answer is sent."""

    def is_running(self) -> bool:
        """Wait for the next task. False once the job is over."""

    def receive(self, within_s: float | None = None) -> FLModel | None:
        """The next task's model; None once the job is over, or if none came within `within_s` seconds."""

    def send(self, model: FLModel) -> None:
        """Answer the task last received. Raises ConfigError if there is none to answer."""

    def record(self, record: Record) -> None:
        """Send one logged value to the server."""


class TaskAtHand:
    """A session's task, from its coming to its answer. Whoever hears of tasks puts the model in `_model`, in `is_running`."""

    _model: FLModel | None = None  # come, not yet received
    _received = False  # and not yet answered

    def is_running(self) -> bool:
        """See `Session`."""
        raise NotImplementedError

    def receive(self, within_s: float | None = None) -> FLModel | None:
        """See `Session`."""
        if self._model is None and not self.is_running():
            return None
        model, self._model, self._received = self._model, None, True
        return model

    def _answered(self) -> None:
        """The task last received has its answer. Raises ConfigError if there is none to answer."""
        if not self._received:
            raise ConfigError("send was called with no task at hand: call receive() first")
        self._received = False


_entered: ContextVar[Session] = ContextVar("hanse_session")


def enter(session: Session) -> None:
    """Make `session` the one behind the Client API for code that runs in this context: this thread, task or greenlet."""
    _entered.set(session)


def entered() -> Session | None:
    """The session behind the Client API in this context; None for a script that was started alone."""
    return _entered.get(None)
