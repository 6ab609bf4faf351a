"""TensorBoard's event files, written by tensorboardX."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import summary  # type: ignore[import-untyped]
from tensorboardX.event_file_writer import EventsWriter  # type: ignore[import-untyped]
from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]

from hanse.errors import ConfigError
from hanse.server.values import Value, params

GLOBAL = "global"


class TensorBoard:
    """Writes a folder that `tensorboard --logdir` shows: one subfolder for the federation, `global`, and one for each site.

    at: a folder, in which the run gets one of its own name; None: `tensorboard` in the run folder.
    Raises ConfigError if something is there already, or what the run's first part was written to is not there any more.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any], at: str | None, *, folder: Path, key: str | None) -> None:
        self._folder = folder / "tensorboard" if at is None else Path(at).absolute() / run.name
        self.place = self.key = str(self._folder)
        there = self._folder.exists() and any(self._folder.iterdir())
        if there and key is None:
            raise ConfigError(f"{self.place} is not empty: two runs would be shown as one. Name another folder, or remove it.")
        if key is not None and not there:
            raise ConfigError(
                f"{self.place} is gone, and what was written to it.", hint=f"To write all again, delete {folder}/.track-tensorboard.json."
            )
        self._files: dict[str, EventsWriter] = {}
        if key is None:
            settings = "\n".join(f"    {key}: {value}" for key, value in params(facts).items())
            self.write([Value("", "job", settings, 0, "text", facts["started"])])

    def write(self, values: Sequence[Value]) -> None:
        for value in values:
            said = summary.scalar(value.key, value.value) if value.kind == "scalar" else summary.text(value.key, value.value)
            self._file(value.site).write_event(Event(wall_time=value.time, step=value.step, summary=said))
        for file in self._files.values():
            file.flush()

    def close(self, facts: Mapping[str, Any]) -> None:
        for file in self._files.values():
            file.close()

    def _file(self, site: str) -> EventsWriter:
        """Written to at once. A `SummaryWriter` has a queue and a thread for each site, and its `flush` does not wait for them."""
        if site not in self._files:
            if "/" in site or "\0" in site or site in (".", ".."):  # the events may be of a job's own making
                raise ConfigError(f"{site!r:.100} is no site's name: its values are not written.")
            folder = self._folder / "sites" / site if site else self._folder / GLOBAL
            folder.mkdir(parents=True, exist_ok=True)
            self._files[site] = EventsWriter(str(folder / "events"), f".{time.time_ns()}")  # two of one second would be one file
        return self._files[site]
