"""Where a project stands and how it came there: a table of the states that may follow each other, and every step in a hash-chained file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from hanse.errors import ConfigError, WireError
from hanse.finetuning.contract import read_project
from hanse.site.ledger import Ledger, read
from hanse.site.ledger import verify as verify_ledger

HISTORY = "history.jsonl"

State = Literal[
    "draft", "data check", "base evaluation", "training", "candidate", "vendor gate", "inconclusive", "client acceptance",
    "approved", "deployed", "monitored", "rejected", "rolled back",
]  # fmt: skip

TRANSITIONS: dict[State, tuple[State, ...]] = {
    "draft": ("data check",),
    "data check": ("data check", "base evaluation", "rejected"),
    "base evaluation": ("base evaluation", "training", "rejected", "data check"),
    "training": ("training", "candidate", "rejected", "data check"),
    "candidate": ("vendor gate", "rejected", "data check"),
    "vendor gate": ("vendor gate", "client acceptance", "inconclusive", "rejected", "data check"),
    "inconclusive": ("vendor gate", "client acceptance", "rejected", "data check"),
    "client acceptance": ("approved", "rejected", "data check"),
    "approved": ("deployed", "rejected", "data check"),
    "deployed": ("monitored", "rolled back", "data check"),
    "monitored": ("rolled back", "data check"),
    "rejected": ("data check",),
    "rolled back": ("deployed", "monitored", "data check"),
}
"""What may follow each state. One that may follow itself is taken up again after a crash, or tried again; with the data check a new run
begins, from anywhere: what was deployed stays deployed."""


class History:
    """history.jsonl of a project folder. Each line has who, when (`time`) and why; `client` tells a vendor's clients apart.

    client: the site of the client that it is about; None: the project's only one. Raises ConfigError if the project has more.
    """

    def __init__(self, folder: Path, client: str | None = None) -> None:
        self.path = folder / HISTORY
        self.client = read_project(folder).client(client).site

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All that was recorded about the client, oldest first. Raises WireError where a line was altered."""
        return [line for line in read(self.path) if line.get("client") == self.client] if self.path.exists() else []

    @property
    def state(self) -> State:
        """The last state that was recorded; "draft" if none was."""
        return _state(self.lines)

    @property
    def deployed(self) -> list[str]:
        """Digests of the versions that were deployed, oldest first, without those that were rolled back; the last is deployed now."""
        versions: list[str] = []
        for line in self.lines:
            if (version := line.get("deployed")) is None:
                continue
            if line.get("back") and version in versions:
                del versions[len(versions) - versions[::-1].index(version) :]
            else:
                versions.append(version)
        return versions

    def move(self, to: State, *, who: str, why: str = "", **facts: Any) -> None:
        """Record the step to another state; a project begins with the step to "draft". It is on the disk when this returns.

        facts: JSON values, such as `version`, a digest.
        Raises ConfigError, naming what is possible, if the state may not follow the present one.
        """
        with Ledger(self.path, wait=True) as ledger:
            lines = self.lines
            if to not in (possible := _possible(lines)):
                raise ConfigError(
                    f"{self.path.parent}: {to!r} cannot follow {_state(lines)!r}; from here it goes to: {', '.join(possible)}.",
                    hint="`hanse finetune status` says what to do next.",
                )
            ledger.append(to, client=self.client, who=who, why=why, **facts)

    def arrive(self, *, who: str, why: str = "", **facts: Any) -> None:
        """Record that a candidate arrived as a signed file: from whatever state, the client's side goes to "client acceptance"."""
        with Ledger(self.path, wait=True) as ledger:
            ledger.append("client acceptance", client=self.client, who=who, why=why, arrived=True, **facts)

    def note(self, kind: str, *, who: str, why: str = "", **facts: Any) -> None:
        """Record what changes no state, such as a signature."""
        if kind in TRANSITIONS:
            raise ConfigError(f"{kind!r} is a state: `move` goes there")
        with Ledger(self.path, wait=True) as ledger:
            ledger.append(kind, client=self.client, who=who, why=why, **facts)

    def verify(self) -> int:
        """How many lines the file has, of all clients. Raises WireError, naming the line, for a broken chain or a step that may not be."""
        count = verify_ledger(self.path)
        before: dict[str, list[dict[str, Any]]] = {}
        for number, line in enumerate(read(self.path), 1):
            lines = before.setdefault(line.get("client", ""), [])
            if line["kind"] in TRANSITIONS:
                if line["kind"] not in _possible(lines) and not line.get("arrived"):
                    raise WireError(f"{self.path}, line {number}: {line['kind']!r} cannot follow {_state(lines)!r}", offset=0)
                lines[:] = [line]
        return count


def _state(lines: list[dict[str, Any]]) -> State:
    return next((line["kind"] for line in reversed(lines) if line["kind"] in TRANSITIONS), "draft")


def _possible(lines: list[dict[str, Any]]) -> tuple[State, ...]:
    begun = any(line["kind"] in TRANSITIONS for line in lines)
    return TRANSITIONS[_state(lines)] if begun else ("draft", *TRANSITIONS["draft"])
