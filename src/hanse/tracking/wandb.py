"""Weights & Biases: one run of its own for a run folder."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import wandb

from hanse.errors import ConfigError
from hanse.server.run import Run
from hanse.tracking.values import params, values

STEP = "step"


def write(run: Run, at: str | None = None, *, sites: bool = True) -> str:
    """Write a run to Weights & Biases, where metrics are drawn over "step": the round, or what training code counts itself.

    at: the project, "project" or "entity/project"; None: the job's name. With WANDB_MODE=offline in the environment it is written below
        the run folder, for `wandb sync`. Returns the folder of Weights & Biases' own files.
    Raises ConfigError, with what Weights & Biases says, if it does not take it.
    """
    facts = run.facts
    entity, _, project = (at or facts["job"]["name"]).rpartition("/")
    steps: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    config: dict[str, str] = params(run)
    for value in values(run, sites=sites):
        if value.kind in ("param", "tag"):
            config[value.name] = value.value
        else:
            steps[value.step][value.name] = value.value
    try:
        there = wandb.init(
            project=project,
            entity=entity or None,
            name=run.folder.name,
            dir=run.folder,
            config=config,
            settings=wandb.Settings(silent=True),
        )
        there.define_metric("*", step_metric=STEP)
        for step in sorted(steps):
            there.log({**steps[step], STEP: step})
        there.finish(exit_code=int(facts["status"] in ("failed", "stopped")))
    except wandb.Error as error:
        raise ConfigError(f"Weights & Biases does not take the run: {error}") from error
    return str(there.dir)
