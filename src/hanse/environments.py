"""Where a recipe runs: `SimEnv`, on this machine."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hanse.cohort import Cohort
from hanse.errors import ConfigError
from hanse.jobs.bundle import digest, digests, job_file, versions
from hanse.jobs.loading import read_job
from hanse.jobs.recipe import Recipe, json_values
from hanse.messages.flmodel import FLModel
from hanse.server.console import MODES, Console
from hanse.server.run import Run
from hanse.server.run_folder import RunFolder, open_run
from hanse.server.runner import run_to_end
from hanse.simulation.engine import SimulatedSites
from hanse.simulation.roster import NamedSites, NumberedSites
from hanse.simulation.worker import Staff
from hanse.transport.courier import Roster

JOB = "job"
SITE_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,100}")


@dataclass(frozen=True, kw_only=True)
class SimEnv:
    """Server and sites simulated on this machine: the real workflow, filters and training code, in a few forked processes.

    num_clients: how many sites, named site-1, site-2 and so on. sites: their names, instead.
    site_config: JSON values for single sites, by name, on top of the recipe's `config`.
    workers: how many processes; None: one for each core. The result has the same bits for any number.
    threads: how many each worker computes with; above 1, workers are fresh interpreters instead of forked ones, and start more slowly.
        It can change the last bits of a result, so it does not follow the machine.
    runs: the folder that run folders are made in. resume: a run folder to go on with, after a stop or a crash.
    console: "auto", "plain", "rich", "json" or "quiet".
    """

    num_clients: int | None = None
    sites: Sequence[str] = ()
    site_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    workers: int | None = None
    threads: int = 1
    runs: str | Path = "runs"
    resume: str | Path | None = None
    console: str = "auto"

    def __post_init__(self) -> None:
        if (self.num_clients is None) == (not self.sites):
            raise ConfigError("SimEnv needs either num_clients, a number of sites, or sites, their names")
        named = not isinstance(self.sites, str) and all(isinstance(name, str) and SITE_NAME.fullmatch(name) for name in self.sites)
        if not named or len(set(self.sites)) < len(self.sites):
            raise ConfigError(f"sites is {self.sites!r}: give a list of different names, each of 1 to 100 printable characters, without /")
        for name in ("num_clients", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"SimEnv has {name}={value!r}: it must be a whole number from 1")
        if not hasattr(os, "fork"):
            raise ConfigError("SimEnv forks its workers, which this system cannot: use Linux, macOS, or WSL on Windows")
        if self.console not in MODES:
            raise ConfigError(f"SimEnv has console={self.console!r}: it must be one of {', '.join(MODES)}")
        if not isinstance(self.site_config, Mapping):
            raise ConfigError(f"site_config is {self.site_config!r}: it must map sites to their JSON values")
        roster = self.roster()
        for site, config in self.site_config.items():
            json_values(f"site_config of {site!r}", config)
            try:
                roster.index(site)
            except ValueError as error:
                raise ConfigError(f"site_config names a site that is not there: {error}") from error

    def roster(self) -> Roster:
        """The sites' names, ranked."""
        return NumberedSites(self.num_clients) if self.num_clients else NamedSites(self.sites)

    def execute(self, recipe: Recipe) -> Run:
        """Run the job to its end. Raises JobFailed or JobStopped, which name the run folder, if it does not get there."""
        roster = self.roster()
        recipe.check_sites(len(roster))
        workers = min(self.workers or os.cpu_count() or 1, len(roster))
        console = Console(self.console)
        folder = self._open_folder(recipe, roster, workers, console)
        with folder.held():
            self._run(recipe, roster, workers, folder)
        return Run(folder.path)

    def _run(self, recipe: Recipe, roster: Roster, workers: int, folder: RunFolder) -> None:
        folder.write_facts(status="running", reason="")
        model, states = recipe.first_model()[0], dict[str, bytes]()
        if self.resume is not None and (restored := folder.resume()) is not None:
            model, states = restored[0], dict(restored[1])
        staff = Staff.of(
            recipe,
            roster,
            job_id=recipe.name,
            site_config=self.site_config,
            threads=self.threads,
            job=str(folder.path / JOB),
            logs=str(folder.path / "logs"),
        )

        async def simulate() -> FLModel:
            def warn(text: str) -> None:
                folder.event("message", level="warning", text=text)

            async with SimulatedSites(staff, workers=workers, states=states, warn=warn) as sites:
                folder.states = lambda: sites.states
                cohort = Cohort(sites, folder, job_id=recipe.name, seed=recipe.seed, filters=recipe.filters)
                return await recipe.workflow()(cohort, model)

        folder.event(
            "start",
            job=recipe.name,
            sites=len(roster),
            workers=workers,
            rounds=recipe.total_rounds(),
            seed=recipe.seed,
            resumed=folder.commits,
        )
        run_to_end(simulate, folder)

    def _open_folder(self, recipe: Recipe, roster: Roster, workers: int, console: Console) -> RunFolder:
        path = Path(self.resume) if self.resume is not None else RunFolder.new_path(Path(self.runs), recipe.name)
        job = path / JOB
        if self.resume is None:
            try:
                recipe.export(job)
            except ConfigError as error:
                if self.threads > 1:
                    raise
                console.show(
                    {"event": "message", "level": "warning", "text": f"{error}. It runs, but cannot be resumed from its folder alone."}
                )
        facts = self._facts(recipe, roster, job) if self.resume is None else _facts_of_same_job(path, recipe, roster)
        return RunFolder(path, facts | {"workers": workers}, listen=console.show, progress=console.progress)

    def _facts(self, recipe: Recipe, roster: Roster, job: Path) -> dict[str, Any]:
        written = digests(job) if job.is_dir() else {}
        described = {name: value for name, value in asdict(self).items() if name not in ("resume", "runs", "console", "workers")}
        return {
            "hanse": versions()["hanse"],
            "job": {
                "name": recipe.name,
                "recipe": recipe.kind,
                "arguments": recipe.arguments_as_data() if written else {},
                "digest": digest(job_file(job)) if written else None,
            },
            "environment": described,
            "started": time.time(),
            "seed": recipe.seed,
            "sites": _sites_as_data(roster),
            "rounds": {"done": 0, "total": recipe.total_rounds()},
            "best": None,
            "metrics": {},
            "model": None,
            "versions": versions(),
            "digests": written,
        }


def _sites_as_data(roster: Roster) -> list[str] | dict[str, int]:
    return list(roster) if len(roster) <= 100 else {"count": len(roster)}


def _facts_of_same_job(path: Path, recipe: Recipe, roster: Roster) -> dict[str, Any]:
    """The facts of a run to go on with. Raises ConfigError if it cannot be, or if it is not of this job and these sites."""
    facts = open_run(path)
    here = {"name": recipe.name, "recipe": recipe.kind, "seed": recipe.seed, "sites": _sites_as_data(roster)}
    there = {**facts["job"], **facts}
    for what, value in here.items():
        if there[what] != value:
            raise ConfigError(f"{path} is a run of another job: its {what} is {there[what]!s:.80}, and here it is {value!s:.80}")
    return facts


def resume(folder: str | Path, *, console: str = "auto", workers: int | None = None) -> Run:
    """Go on with a run that was stopped, crashed or failed, from its last commit. Raises ConfigError if that cannot be done."""
    path = Path(folder)
    facts = open_run(path)
    if not (path / JOB).is_dir():
        raise ConfigError(f"{path} holds no job folder: resume it from the program that made it, with SimEnv(resume={str(path)!r})")
    known = {field.name for field in fields(SimEnv)}
    described = {name: value for name, value in facts["environment"].items() if name in known}
    return read_job(path / JOB).execute(SimEnv(**described, workers=workers, resume=path, console=console))
