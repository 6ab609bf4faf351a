"""`ProdEnv`: the job runs in a real federation, to which a startup kit opens the door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hanse.environments.federation import Placement, connected, kit_in
from hanse.environments.loop import run_async
from hanse.environments.remote_run import RemoteRun, kit_option
from hanse.environments.settings import check_console, check_counts, check_names, check_site_config
from hanse.errors import ConfigError
from hanse.jobs.recipe import Recipe
from hanse.messages.wire import Resources
from hanse.server.run import Run
from hanse.simulation.roster import NamedSites


@dataclass(frozen=True, kw_only=True)
class ProdEnv:
    """A real federation: the job is signed, submitted and followed, and what came of it is fetched into a run folder.

    startup_kit: the folder of an admin's or researcher's kit.
    sites: the names of those that shall run the job; none: all that are there and take it.
    site_config: JSON values for single sites, by name, on top of the recipe's `config`.
    min_sites: with how many sites the job may begin; None: with all of `sites`, or with at least one.
    resources: what the job takes at each site, any of `cores`, `memory_bytes` and `gpus`.
    runs: the folder that run folders are made in.
    detach: return as soon as the job is submitted; the run folder then says no more than which job it is.
    console: "auto", "plain", "rich", "json" or "quiet".
    """

    startup_kit: str | Path = field(kw_only=False)
    sites: Sequence[str] = ()
    site_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    min_sites: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    runs: str | Path = "runs"
    detach: bool = False
    console: str = "auto"

    def __post_init__(self) -> None:
        check_names(self.sites)
        check_counts(self, "min_sites")
        if self.sites and self.min_sites is not None and self.min_sites > len(self.sites):
            raise ConfigError(f"ProdEnv has min_sites={self.min_sites}, and sites names {len(self.sites)}")
        check_site_config(self.site_config, NamedSites(self.sites) if self.sites else None)
        resources_of(self.resources)
        check_console(self, self.console)
        kit_in(self.startup_kit)

    def execute(self, recipe: Recipe) -> Run:
        """Run the job to its end. Ctrl-C ends the looking on, not the job, and says how to look on again.

        Raises Refused if the federation does not take the job, JobFailed or JobStopped, which name the run folder, if it does not do what
        it was asked.
        """
        if self.sites:
            recipe.check_sites(len(self.sites))
        settings: dict[str, Any] = {"startup_kit": str(self.startup_kit), "sites": list(self.sites), "site_config": self.site_config}
        settings |= {"min_sites": self.min_sites, "resources": dict(self.resources)}
        run = RemoteRun(recipe, self.runs, settings, self.sites, self.console)
        return run_async(self._carry_out(run))

    async def _carry_out(self, run: RemoteRun) -> Run:
        kit = kit_in(self.startup_kit)
        async with connected(kit) as client:
            try:
                await run.submit(client, kit, self._placement())
            except BaseException:
                run.discard()
                raise
            command = f"hanse job {{}} {run.job} {kit_option(kit)}"
            run.say(f"job {run.job} is submitted to {kit.server}")
            if self.detach:
                run.say(f"Look at it with: {command.format('logs -f')}")
                return Run(run.path)
            try:
                await run.follow(client)
            except BaseException:
                run.say(f"Job {run.job} goes on by itself. Look at it with: {command.format('logs -f')}", "warning")
                raise
            return await run.close(client, go_on=command.format("resume"))

    def _placement(self) -> Placement:
        return Placement(
            sites=tuple(self.sites), site_config=self.site_config, min_sites=self.min_sites, resources=resources_of(self.resources)
        )


def resources_of(values: Mapping[str, float]) -> Resources:
    """What a job takes at each site. Raises ConfigError for what is no resource."""
    try:
        return msgspec.convert(dict(values), Resources)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ConfigError(f"resources is {values!r}: {error}; there are cores, memory_bytes and gpus") from error
