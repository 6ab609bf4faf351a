"""The process that runs one job's workflow: `python -m hanse.server.job_process DESCRIPTOR`, a socket on which the server says Start.

It has the job's own code in it, so it is a process by itself, in a sandbox if the server's kit does not say otherwise: what goes wrong
here ends here, and the server's keys and other jobs are not visible. It opens no connections, and dies with the server. What it prints goes
to a file of the job's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from hanse.cohort import Cohort
from hanse.errors import HanseError, JobFailed, LinkBroken
from hanse.jobs.loading import read_job
from hanse.jobs.recipe import Recipe
from hanse.messages.flmodel import FLModel
from hanse.process import die_with_parent, tune_memory
from hanse.server.job_link import NO_ROOM, Committed, Finished, Noted, Start, decode_to_job, encode, is_full
from hanse.server.remote_sites import RemoteSites
from hanse.server.run_folder import RUN, RunFolder, first_facts, scalar
from hanse.server.runner import run_to_end
from hanse.transport.blobs import FolderBlobs
from hanse.transport.courier import Roster
from hanse.transport.memory import MemoryLink

JOB = "job"
"""The job's folder, in its run folder."""

_MMAP_FROM_BYTES = 32 << 20


def main() -> None:
    """Run the job that the server names to its end, and say how it ended."""
    _settle_in()
    link = MemoryLink(socket.socket(fileno=int(sys.argv[1])))
    start = decode_to_job(link.receive().message)
    assert isinstance(start, Start)
    try:
        finished = run(link, start)
    except Exception as error:
        _end_if_full(error)
        raise
    try:
        link.send(encode(finished))
    except LinkBroken:
        sys.exit("the server is gone")


def run(link: MemoryLink, start: Start) -> Finished:
    """Run the job from its last commit on; the run folder is complete when this returns."""
    path, roster = Path(start.folder), tuple(start.sites)
    if (path / RUN).is_file() and json.loads((path / RUN).read_text())["status"] == "completed":
        return Finished(status="completed")  # and killed before it could say so
    try:
        recipe = read_job(path / JOB)
        recipe.check_sites(len(roster))
        model = recipe.first_model()[0]
        updates, tasks = Path(start.updates), FolderBlobs(Path(start.tasks))
        sites = RemoteSites(link, roster, updates, tasks, filters=recipe.filters, seed=recipe.seed, gone=_end_at_once)
        folder = _open_folder(path, recipe, roster, sites)
    except (Exception, SystemExit) as error:  # the job's own code is imported here
        traceback.print_exc()
        return Finished(status="failed", reason=str(error) if isinstance(error, HanseError) else f"{type(error).__name__}: {error}")
    with folder.held():
        folder.write_facts(status="running", reason="")
        if (restored := folder.resume()) is not None:
            model = restored[0]
        first = [model]
        del model, restored  # the workflow alone holds it, and lets it go once there is a newer one

        async def job() -> FLModel:
            task = asyncio.current_task()
            assert task is not None
            with sites.listening(stop=task.cancel):
                scripted = recipe.script is not None
                cohort = Cohort(sites, folder, job_id=recipe.name, seed=recipe.seed, filters=recipe.filters, by_roster=scripted)
                try:
                    return await recipe.workflow()(cohort, first.pop())
                except Exception as error:
                    _end_if_full(error)
                    raise

        folder.event("start", job=recipe.name, sites=len(roster), rounds=recipe.total_rounds(), seed=recipe.seed, resumed=folder.commits)
        try:
            run_to_end(job, folder, signals=False)
        except JobFailed:
            traceback.print_exc()
        return Finished(status=folder.facts["status"], reason=folder.facts["reason"])


def _open_folder(path: Path, recipe: Recipe, roster: Roster, sites: RemoteSites) -> RunFolder:
    """The run folder, with what is known of the run from before if it goes on. Events and commits are told to the server."""

    def listen(event: Mapping[str, Any]) -> None:
        known = {name: event[name] for name in ("event", "time", "status", "reason")} if event["event"] == "end" else event
        sites.tell(Noted(event=json.dumps(known, default=scalar).encode()))

    def committed(events_bytes: int) -> None:
        sites.tell(Committed(commits=folder.commits, rounds=folder.facts["rounds"]["done"], events_bytes=events_bytes))

    if (path / RUN).is_file():
        facts = json.loads((path / RUN).read_text())
    else:
        facts = first_facts(recipe, roster, path / JOB, {"kind": "federation", "sites": list(roster)})
    folder = RunFolder(path, facts, listen=listen, progress=lambda *_: None)
    folder.committed = committed
    return folder


def _settle_in() -> None:
    """Die with the server, leave its signals to it, and give freed memory back: models are large and the job runs for long."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, signal.SIG_IGN)
    die_with_parent()
    tune_memory(map_from_bytes=_MMAP_FROM_BYTES)


def _end_if_full(error: Exception) -> None:
    """A full disk is no failure of the job: what was committed lasts, and the server will start it again."""
    if is_full(error):
        with contextlib.suppress(OSError):
            print(f"there is no room: {error}", file=sys.stderr, flush=True)
        os._exit(NO_ROOM)


def _end_at_once() -> NoReturn:
    """The server is gone: what was committed lasts, and it will start this job again."""
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
