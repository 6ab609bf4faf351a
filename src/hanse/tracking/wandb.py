"""Weights & Biases: one run of its own for a run folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb

from hanse.errors import ConfigError
from hanse.server.values import Value, params

STEP = "step"


class WandB:
    """Writes to Weights & Biases, where metrics are drawn over "step": the round, or what training code counts itself.

    at: the project, "project" or "entity/project"; None: the job's name. With WANDB_MODE=offline in the environment it is written below
    the run folder, for `wandb sync`. `key` is the id of Weights & Biases' run; offline, each time it goes on makes a folder.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any], at: str | None, *, folder: Path, key: str | None) -> None:
        entity, _, project = (at or facts["job"]["name"]).rpartition("/")
        with _said():
            self._run = wandb.init(
                project=project,
                entity=entity or None,
                id=key,
                resume=None if key is None else "allow",
                name=run.name,
                dir=folder,
                config=params(facts),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True),
            )
            self._run.define_metric("*", step_metric=STEP)
        self.key = self._run.id
        self.place = str(Path(self._run.dir).parent) if self._run.settings.mode == "offline" else str(self._run.url)

    def write(self, values: Sequence[Value]) -> None:
        steps: defaultdict[int, dict[str, Any]] = defaultdict(dict)
        config = {value.name: value.value for value in values if value.kind in ("param", "tag")}
        for value in values:
            if value.kind not in ("param", "tag"):
                steps[value.step][value.name] = value.value
        with _said():
            if config:
                self._run.config.update(config, allow_val_change=True)  # type: ignore[no-untyped-call]
            for step in sorted(steps):
                self._run.log({**steps[step], STEP: step})

    def close(self, facts: Mapping[str, Any]) -> None:
        with _said():
            self._run.finish(exit_code=int(facts["status"] in ("failed", "stopped")))


@contextmanager
def _said() -> Iterator[None]:
    """Raises ConfigError, with what Weights & Biases says, if it does not take something."""
    try:
        yield
    except wandb.Error as error:
        raise ConfigError(f"Weights & Biases does not take the run: {error}") from error
