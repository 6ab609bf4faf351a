"""The jobs of a project: a run of fine-tuning, and the delivery of what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import msgspec

from hanse.cohort import Cohort
from hanse.errors import ConfigError
from hanse.finetuning.contract import Project
from hanse.finetuning.exchange import finetune, planned_steps
from hanse.jobs.recipe import Recipe, Workflow, json_values
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """One run of vendor and client; the sites of both must be in the environment.

    model: the deployed version's parameters. project: the contract, as JSON values. client: the client's site. threshold: the deployed
    version's. app: `hanse.finetuning.party.app`, which a job folder carries as a file.
    """

    kind: ClassVar[str] = "finetune"

    project: Mapping[str, Any] = field(default_factory=dict)
    client: str = ""
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        json_values("project", self.project)
        try:
            contract = msgspec.convert(self.project, Project)
        except msgspec.ValidationError as error:
            raise ConfigError(f"project: {error}") from error
        contract.client(self.client)
        self.must_handle("prepare", "install", "evaluate", "train", "gradient", "gate")

    def workflow(self) -> Workflow:
        return partial(finetune, project=self.project, client=self.client, threshold=self.threshold)

    def total_rounds(self) -> int:
        return planned_steps(msgspec.convert(self.project, Project))


@dataclass(frozen=True, kw_only=True)
class DeliveryRecipe(Recipe):
    """Brings a version to a client's inbox, and the client's decision on it back, if there is one.

    model: {"version": the file that `Versions.export` writes, as uint8}. project: the contract, as JSON values. version: its digest.
    """

    kind: ClassVar[str] = "finetune-delivery"

    project: Mapping[str, Any] = field(default_factory=dict)
    client: str = ""
    version: str = ""

    def workflow(self) -> Workflow:
        return partial(delivery, project=self.project, client=self.client, version=self.version)


async def delivery(cohort: Cohort, model: FLModel, *, project: Mapping[str, Any], client: str, version: str) -> FLModel:
    """Ask the client's site for the task "deliver". Returns its decision as {"decision": uint8}, or no params."""
    contract = msgspec.convert(project, Project)
    async for _ in cohort.rounds(model, 1):
        site = contract.client(client).site
        task = Task("deliver", model, {"contract": contract.digest, "base": version, "client": site})
        async for update in cohort.ask(task, of=[site]):
            model = FLModel(update.model.params)
        model = await cohort.commit(model)
    return model
