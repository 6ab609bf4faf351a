"""`SimEnv`: server and sites simulated on this machine, or the sites on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hanse.client.framework import may_fork
from hanse.cohort import Cohort
from hanse.environments.settings import check_console, check_counts, check_site_config, check_sites, roster_of
from hanse.errors import ConfigError
from hanse.jobs.loading import read_job
from hanse.jobs.recipe import Recipe
from hanse.messages.flmodel import FLModel
from hanse.server.console import Console
from hanse.server.run import Run
from hanse.server.run_folder import RunFolder, first_facts, open_run, sites_as_data
from hanse.server.runner import run_to_end
from hanse.server.track import Target
from hanse.server.tracker import Tracker
from hanse.simulation.clock import Devices, VirtualClock
from hanse.simulation.engine import Crew, SimulatedSites
from hanse.simulation.processes import Processes
from hanse.simulation.worker import Staff
from hanse.transport.courier import Roster

JOB = "job"
ENGINES = ("processes", "ray")


@dataclass(frozen=True, kw_only=True)
class SimEnv:
    """Server and sites simulated: the real workflow, filters and training code, in a few forked processes of this machine, or on Ray.

    num_clients: how many sites, named site-1, site-2 and so on. sites: their names, instead.
    site_config: JSON values for single sites, by name, on top of the recipe's `config`.
    workers: how many processes; None: one for each core, of this machine or the Ray cluster. The result has the same bits for any number.
    threads: how many each worker computes with; above 1, workers are fresh interpreters instead of forked ones, and start more slowly.
        It can change the last bits of a result, so it does not follow the machine.
    runs: the folder that run folders are made in. resume: a run folder to go on with, after a stop or a crash.
    devices: how fast the sites' devices are, for a simulated clock; None: time is real.
    engine: "processes" of this machine, or "ray": each worker is an actor on a Ray cluster. address: of that, "host:port" of its head, or
        "auto" on one of its nodes; None: one on this machine, started for the job.
    track: where the run's values go while it runs: "tensorboard", "mlflow" or "wandb", or "NAME=WHERE".
    console: "auto", "plain", "rich", "json" or "quiet".
    """

    num_clients: int | None = None
    sites: Sequence[str] = ()
    site_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    workers: int | None = None
    threads: int = 1
    runs: str | Path = "runs"
    resume: str | Path | None = None
    devices: Devices | None = None
    engine: str = "processes"
    address: str | None = None
    track: str | None = None
    console: str = "auto"

    def __post_init__(self) -> None:
        check_sites(self, self.num_clients, self.sites)
        check_counts(self, "workers", "threads")
        self._check_engine()
        if self.engine == "processes" and not hasattr(os, "fork"):
            raise ConfigError("SimEnv forks its workers, which this system cannot: use Linux, macOS, or WSL on Windows")
        check_console(self, self.console)
        if self.track is not None:
            Target.of(self.track)
        check_site_config(self.site_config, self.roster())
        given: Any = self.devices
        if isinstance(given, Mapping):  # out of a run folder
            object.__setattr__(self, "devices", Devices.of(given))
        elif not isinstance(given, Devices | None):
            raise ConfigError(f"SimEnv has devices={given!r}: it must be hanse.Devices(...)")
        if self.devices is not None:
            self.devices.check_sites(self.roster())

    def roster(self) -> Roster:
        """The sites' names, ranked."""
        return roster_of(self.num_clients, self.sites)

    def execute(self, recipe: Recipe) -> Run:
        """Run the job to its end. Raises JobFailed or JobStopped, which name the run folder, if it does not get there."""
        roster = self.roster()
        recipe.check_sites(len(roster))
        cores = os.cpu_count() or 1
        if self.engine == "processes":
            return self._execute(recipe, roster, self.workers or cores, Processes)
        from hanse.simulation.ray_engine import RayWorkers, connected  # which raises NotInstalled

        with connected(self.address, cpus=(self.workers or max(cores // self.threads, 1)) * self.threads) as cpus:
            room = cpus // self.threads
            if (self.workers or 1) > room:
                raise ConfigError(f"SimEnv has workers={self.workers or 1}, of {self.threads} threads each: the cluster has {cpus} CPUs")
            return self._execute(recipe, roster, self.workers or room, RayWorkers)

    def _execute(self, recipe: Recipe, roster: Roster, workers: int, crew: Callable[[Staff], Crew]) -> Run:
        workers = min(workers, len(roster))
        console = Console(self.console)
        folder = self._open_folder(recipe, roster, workers, console)
        tracker = None if self.track is None else Tracker(self.track, folder.path)
        with folder.held():
            try:
                self._run(recipe, roster, workers, crew, folder, tracker)
            finally:
                for level, text in [] if tracker is None else tracker.finish():
                    console.show({"event": "message", "level": level, "text": text})
        return Run(folder.path)

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"SimEnv has engine={self.engine!r}: it must be one of {', '.join(ENGINES)}")
        if self.address is not None and (self.engine != "ray" or not isinstance(self.address, str)):
            raise ConfigError(f"SimEnv has address={self.address!r}: it is 'host:port' of a Ray cluster's head, with engine='ray'")

    def _run(
        self, recipe: Recipe, roster: Roster, workers: int, crew: Callable[[Staff], Crew], folder: RunFolder, tracker: Tracker | None
    ) -> None:
        folder.write_facts(status="running", reason="")
        model, states = recipe.first_model()[0], dict[str, bytes]()
        clock = None if self.devices is None else VirtualClock(self.devices)
        if self.resume is not None and (restored := folder.resume()) is not None:
            model, states = restored[0], dict(restored[1])
            if clock is not None:
                clock.now_s = Run(folder.path).events("round")[-1].get("virtual_s", 0.0)
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
            def say(level: str, text: str) -> None:
                folder.event("message", level=level, text=text)

            def warn(text: str) -> None:
                say("warning", text)

            if tracker is not None:
                tracker.start(say)
            async with SimulatedSites(staff, workers=workers, crew=crew(staff), states=states, warn=warn) as sites:
                folder.states = lambda: sites.states
                scripted = recipe.script is not None
                cohort = Cohort(
                    sites, folder, job_id=recipe.name, seed=recipe.seed, filters=recipe.filters, clock=clock, by_roster=scripted
                )
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
                if self.threads > 1 or self.engine != "processes":
                    raise
                if not may_fork():
                    hint = "This process holds a framework's threads, such as JAX's, so that workers must start from the job's folder."
                    raise ConfigError(error.message, hint=f"{error.hint} {hint}".strip()) from error
                console.show(
                    {"event": "message", "level": "warning", "text": f"{error}. It runs, but cannot be resumed from its folder alone."}
                )
        described = {name: value for name, value in asdict(self).items() if name not in ("resume", "runs", "console", "workers")}
        for unset in ("devices", "track"):
            if described[unset] is None:
                del described[unset]
        if self.engine == "processes":
            del described["engine"], described["address"]
        facts = first_facts(recipe, roster, job, described) if self.resume is None else _facts_of_same_job(path, recipe, roster)
        return RunFolder(path, facts | {"workers": workers}, listen=console.show, progress=console.progress)


def _facts_of_same_job(path: Path, recipe: Recipe, roster: Roster) -> dict[str, Any]:
    """The facts of a run to go on with. Raises ConfigError if it cannot be, or if it is not of this job and these sites."""
    facts = open_run(path)
    here = {"name": recipe.name, "recipe": recipe.kind, "seed": recipe.seed, "sites": sites_as_data(roster)}
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
