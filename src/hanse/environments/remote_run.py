"""The run folder, on this machine, of a job that runs in a federation."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hanse.environments.federation import JOB, Placement, events_of, fetch, read_facts, submit
from hanse.errors import JobFailed, JobStopped, NotInstalled
from hanse.identity.kit import Kit
from hanse.jobs.recipe import Recipe
from hanse.server.console import Console
from hanse.server.report import write_report
from hanse.server.run import Run
from hanse.server.run_folder import RunFolder, first_facts
from hanse.transport.grpc import Client

STOPPED_WITHIN_S = 30.0
"""A job that is stopped has so long to say how far it came."""


class RemoteRun:
    """One job from its submission to the files of a run folder: the same as a simulation leaves.

    The folder is made at once, and `job` in it is what is submitted. Raises ConfigError if the job cannot be written there.
    """

    def __init__(self, recipe: Recipe, runs: str | Path, environment: Mapping[str, Any], sites: Sequence[str], console: str) -> None:
        self.console = Console(console)
        self.path = RunFolder.new_path(Path(runs), recipe.name)
        self.job = ""
        self._name = recipe.name
        self._environment = dict(environment)
        try:
            recipe.export(self.path / JOB)
            facts = first_facts(recipe, sites, self.path / JOB, environment)
        except BaseException:
            self.discard()
            raise
        self._folder = RunFolder(self.path, facts, listen=self.console.show, progress=self.console.progress)

    def discard(self) -> None:
        """Delete the run folder: nothing was begun."""
        shutil.rmtree(self.path, ignore_errors=True)

    def say(self, text: str, level: str = "info") -> None:
        self.console.show({"event": "message", "level": level, "text": text})

    async def submit(self, client: Client, kit: Kit, placement: Placement) -> None:
        """Raises Refused if the server or too many sites do not take the job."""
        submitted = await submit(client, kit, self.path / JOB, placement)
        self.job = submitted.job
        for site, reason in submitted.refusals.items():
            self.say(f"{site} does not take the job: {reason}", "warning")
        self._folder.write_facts(status="queued", reason="", federation={"name": kit.federation, "server": kit.server, "job": self.job})

    async def follow(self, client: Client) -> None:
        """Show the job's events until it has ended. The last one waits for `close`, when everything is here.

        What sites print goes to their logs at the server, and comes with the result.
        """
        async for event in events_of(client, self.job, lost=lambda text: self.say(text, "warning")):
            if event.get("event") == "start":
                self._folder.write_facts(status="running")
            if event.get("event") not in ("end", "output"):
                self.console.show(event)

    async def close(self, client: Client, *, go_on: str = "") -> Run:
        """Fetch what came of the job, and tell how it ended. go_on: a command, in case it did not get to its end.

        Raises JobFailed, or JobStopped, which name the run folder.
        """
        state: Mapping[str, Any] = await client.call("job", job=self.job)
        await fetch(client, self.job, self.path, leave_out=[JOB])
        facts = read_facts(self.path) | {"environment": self._environment}
        status, reason = str(state["status"]), str(state.get("reason") or "")
        self._folder.write_facts(**facts | {"status": status, "reason": reason})
        self.console.show(self._ending(status, reason, go_on))
        if status == "completed":
            return Run(self.path)
        hint = f"Go on with: {go_on}" if go_on else ""
        if status == "stopped":
            raise JobStopped(f"job {self._name!r} was {reason or status}.", folder=str(self.path), hint=hint)
        raise JobFailed(f"job {self._name!r} failed: {reason}", folder=str(self.path), hint=hint)

    def failed(self, reason: str) -> JobFailed:
        """The error to raise if the server is gone; the run folder and the console say so too."""
        self._end_here("failed", reason)
        return JobFailed(f"job {self._name!r} failed: {reason}", folder=str(self.path))

    def stopped(self) -> JobStopped:
        """The error to raise if the job was stopped, and what it had reached was not waited for."""
        reason = "stopped before it said how far it came"
        self._end_here("stopped", reason)
        return JobStopped(f"job {self._name!r} was {reason}.", folder=str(self.path))

    def _end_here(self, status: str, reason: str) -> None:
        self._folder.write_facts(status=status, reason=reason)
        self.console.show(self._ending(status, reason, ""))

    def _ending(self, status: str, reason: str, go_on: str) -> dict[str, Any]:
        facts = self._folder.facts
        end = {"event": "end", "time": facts.get("ended"), "status": status, "reason": reason, "folder": str(self.path)}
        model = self.path / "model.safetensors"
        end |= {"model": str(model) if model.is_file() else None, "best": facts.get("best"), "resume": go_on}
        try:
            end["report"] = str(write_report(self.path))
        except NotInstalled as error:
            end["report"] = str(error)
        return end


def kit_option(kit: Kit) -> str:
    """The kit as an argument of `hanse job`, to be typed as it stands."""
    return f"--kit {shlex.quote(str(kit.folder))}"
