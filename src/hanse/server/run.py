"""What came of a job: a view of its run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hanse.errors import ConfigError
from hanse.messages.codec import read
from hanse.messages.flmodel import FLModel
from hanse.server.console import Console
from hanse.server.events import read_events
from hanse.server.report import write_report


class Run:
    """A job's run folder. What it says is read from there each time, so a run can be looked at while it goes on, or years later."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / "run.json").is_file():
            raise ConfigError(f"{self.folder} is no run folder: it has no run.json")

    @property
    def facts(self) -> Mapping[str, Any]:
        """All of `run.json`: seed, versions, digests, times, the best round."""
        return dict(json.loads((self.folder / "run.json").read_text()))

    def get_status(self) -> str:
        """running, completed, failed or stopped."""
        return str(self.facts["status"])

    def get_result(self) -> FLModel:
        """The last committed model, its arrays mapped from disk. Raises ConfigError if the job ended before its first commit."""
        return self._model("model.safetensors")

    def get_best(self) -> FLModel:
        """The best model by the recipe's metric. Raises ConfigError if there is none."""
        return self._model("best.safetensors")

    @property
    def metrics(self) -> Sequence[Mapping[str, float]]:
        """The global metrics of each round, in order."""
        return [event["metrics"] for event in self.events("round")]

    def events(self, kind: str) -> Sequence[Mapping[str, Any]]:
        """All that was noted under one kind of event, such as `update`, `failure` or `record`."""
        return [event for event in read_events(self.folder / "metrics.jsonl") if event["event"] == kind]

    def report(self) -> Path:
        """Write `report.html` anew and return its path. Raises NotInstalled without the extra `report`."""
        return write_report(self.folder)

    def show(self, console: str = "auto") -> None:
        """Print what came of the job, as it was printed when it ran. `console`: "auto", "plain", "rich", "json" or "quiet"."""
        screen, facts = Console(console), self.facts
        closing = {"folder": str(self.folder), "model": facts["model"] and str(self.folder / facts["model"]), "best": facts["best"]}
        closing |= {"resume": f"hanse resume {self.folder}", "report": str(self.folder / "report.html")}
        for event in read_events(self.folder / "metrics.jsonl"):
            screen.show({**event, **closing} if event["event"] == "end" else event)
        if facts["status"] == "running":
            text = f"The job has not ended. If its process is gone, go on with: hanse resume {self.folder}"
            screen.show({"event": "message", "level": "info", "text": text})

    def _model(self, name: str) -> FLModel:
        path = self.folder / name
        if not path.is_file():
            raise ConfigError(f"{path} is not there: the job is {self.get_status()} and has made no such model")
        return read(path)[0]
