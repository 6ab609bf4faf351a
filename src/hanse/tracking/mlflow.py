"""MLflow: one run of its own for a run folder, in an experiment of the job's name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from hanse.errors import ConfigError
from hanse.server.values import Value, params

_BATCH = 1_000  # metrics that MLflow takes at once
_PARAM_CHARACTERS, _TAG_CHARACTERS = 500, 5_000
_ENDS = {"completed": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MLflow:
    """Writes to MLflow. A metric of a site is called "SITE/TASK/METRIC"; what is no letter, digit or one of `_-./ ` becomes `_`.

    at: the tracking server's URI; None: MLflow's own settings, such as MLFLOW_TRACKING_URI. `key` is MLflow's id of the run.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any], at: str | None, *, folder: Path, key: str | None) -> None:
        with _said():
            self._client = MlflowClient(at)
            self.key = self._new(run, facts) if key is None else key
            found = self._client.get_run(self.key)
            if key is not None:
                self._client.update_run(self.key, status="RUNNING")
            self.place = f"run {self.key} of MLflow's experiment {facts['job']['name']!r}"
            self._params = set(found.data.params)
            self._write_params(params(facts))

    def write(self, values: Sequence[Value]) -> None:
        named = [(re.sub(r"[^\w\-./ ]", "_", value.name), value) for value in values]
        metrics = [Metric(name, value.value, round(value.time * 1000), value.step) for name, value in named if value.kind == "scalar"]
        with _said():
            for first in range(0, len(metrics), _BATCH):
                self._client.log_batch(self.key, metrics=metrics[first : first + _BATCH])
            self._write_params({name: value.value for name, value in reversed(named) if value.kind == "param"})
            for name, text in {name: value.value for name, value in named if value.kind in ("text", "tag")}.items():
                self._client.set_tag(self.key, name, text[:_TAG_CHARACTERS])

    def close(self, facts: Mapping[str, Any]) -> None:
        with _said():
            self._client.set_tag(self.key, "hanse.status", facts["status"])
            if facts["status"] in _ENDS:
                self._client.set_terminated(self.key, _ENDS[facts["status"]], end_time=round(facts["ended"] * 1000))

    def _new(self, run: Path, facts: Mapping[str, Any]) -> str:
        name = facts["job"]["name"]
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        tags = {"hanse.folder": str(run), "hanse.status": facts["status"]}
        created = self._client.create_run(experiment, start_time=round(facts["started"] * 1000), run_name=run.name, tags=tags)
        return str(created.info.run_id)

    def _write_params(self, values: Mapping[str, str]) -> None:
        """A parameter cannot change: the first one counts."""
        for name in values.keys() - self._params:
            self._client.log_param(self.key, name, values[name][:_PARAM_CHARACTERS])
            self._params.add(name)


@contextmanager
def _said() -> Iterator[None]:
    """Raises ConfigError, with what MLflow says, if it does not take something."""
    try:
        yield
    except MlflowException as error:
        raise ConfigError(f"MLflow does not take the run: {error}") from error
