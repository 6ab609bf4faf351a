"""`hanse job`: jobs of a real federation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hanse.cli.admin import (
    Json,
    KitFolder,
    Row,
    ask,
    moment,
    moment_of,
    print_answer,
    print_facts,
    print_json,
    print_table,
    text_of,
    with_server,
)
from hanse.errors import JobFailed, JobStopped

if TYPE_CHECKING:
    from hanse.identity.kit import Kit
    from hanse.transport.grpc import Client

app = typer.Typer(help="Submit jobs to a federation, look at them, fetch what came of them.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(help="The job's id, as `hanse job submit` printed it.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]


@app.command()
def submit(
    folder: Annotated[Path, typer.Argument(help="A job folder: job.yaml (or .toml, .json), code, model.safetensors.")],
    kit: KitFolder,
    sites: Annotated[str, typer.Option(help="Names of the sites that shall run it, with commas between; default: all that take it.")] = "",
    site_config: Annotated[
        Path | None, typer.Option(help="A YAML, TOML or JSON file: what single sites see in their config, by name.")
    ] = None,
    min_sites: Annotated[int | None, typer.Option(help="With how many sites it may begin.", min=1)] = None,
    cores: Annotated[float, typer.Option(help="Processor cores that it takes at each site.", min=0)] = 0,
    memory_bytes: Annotated[int, typer.Option(help="Memory that it takes at each site, in bytes.", min=0)] = 0,
    gpus: Annotated[int, typer.Option(help="GPUs that it takes at each site.", min=0)] = 0,
    follow: Follow = False,
    json: Json = False,
) -> None:
    """Sign a job folder, submit it, and print the job's id. With --follow, show what happens until it has ended."""
    from hanse.environments.federation import Placement
    from hanse.environments.federation import submit as send
    from hanse.environments.settings import check_names, check_site_config
    from hanse.jobs.bundle import read_folder, read_mapping
    from hanse.messages.wire import Resources
    from hanse.simulation.roster import NamedSites

    names = tuple(name.strip() for name in sites.split(",")) if sites else ()
    config = read_mapping(site_config) if site_config else {}
    check_names(names)
    check_site_config(config, NamedSites(names) if names else None)
    read_folder(folder)
    placement = Placement(
        sites=names, site_config=config, min_sites=min_sites, resources=Resources(cores=cores, memory_bytes=memory_bytes, gpus=gpus)
    )

    async def work(client: Client, opened: Kit) -> None:
        submitted = await send(client, opened, folder, placement)
        if json:
            print_json({"job": submitted.job, "refusals": dict(submitted.refusals)})
        else:
            for site, reason in submitted.refusals.items():
                typer.echo(f"{site} does not take the job: {reason}", err=True)
            typer.echo(submitted.job)
        if follow:
            await _show(client, submitted.job, follow=True, json=json)

    with_server(kit, work)


@app.command("list")
def list_jobs(kit: KitFolder, json: Json = False) -> None:
    """List the jobs, the newest last."""
    jobs = ask(kit, "jobs")
    if json:
        print_json(jobs)
        return
    columns = {
        "job": text_of("job"),
        "status": text_of("status"),
        "rounds": _rounds,
        "sites": _sites,
        "submitted": moment_of("submitted"),
        "by": text_of("submitter"),
        "reason": text_of("reason"),
    }
    print_table(jobs, columns, empty="no job was submitted yet")


@app.command()
def show(job: JobId, kit: KitFolder, json: Json = False) -> None:
    """Say what is known of a job, and how each site stands to it."""
    found = ask(kit, "job", job=job)
    if json:
        print_json(found)
        return
    facts = {
        "job": str(found["job"]),
        "name": str(found.get("name") or ""),
        "status": str(found["status"]),
        "reason": str(found.get("reason") or ""),
        "rounds": _rounds(found),
        "submitter": str(found.get("submitter") or ""),
        "submitted": moment(found.get("submitted")),
        "started": moment(found.get("started")),
        "ended": moment(found.get("ended")),
    }
    print_facts(facts)
    typer.echo()
    columns = {
        "site": text_of("site"),
        "state": text_of("state"),
        "connected": lambda row: "yes" if row.get("connected") else "no",
        "reason": text_of("reason"),
    }
    print_table(found.get("members") or (), columns, empty="no site")


@app.command()
def logs(job: JobId, kit: KitFolder, follow: Follow = False, json: Json = False) -> None:
    """Show what happened in a job: rounds, failures, and lines that its sites let out."""
    with_server(kit, lambda client, _: _show(client, job, follow=follow, json=json))


@app.command()
def abort(job: JobId, kit: KitFolder, json: Json = False) -> None:
    """Stop a job. Its last commit is kept."""
    print_answer(ask(kit, "abort", job=job), f"{job} is stopped; go on with: hanse job resume {job}", as_json=json)


@app.command()
def resume(job: JobId, kit: KitFolder, json: Json = False) -> None:
    """Go on with a job that was stopped or failed, from its last commit."""
    print_answer(ask(kit, "resume", job=job), f"{job} goes on", as_json=json)


@app.command()
def download(
    job: JobId,
    kit: KitFolder,
    runs: Annotated[Path, typer.Option(help="Where to make the run folder.")] = Path("runs"),
    json: Json = False,
) -> None:
    """Fetch what came of a job into a new run folder, and print its path."""
    from hanse.environments.federation import download as fetch

    folder = with_server(kit, lambda client, _: fetch(client, job, runs))
    if json:
        print_json({"folder": str(folder)})
    else:
        typer.echo(folder)


async def _show(client: Client, job: str, *, follow: bool, json: bool) -> None:
    """Print the events; if they were followed to the job's end, it decides the exit status."""
    from hanse.environments.federation import events_of
    from hanse.server.console import Console
    from hanse.server.wording import printable

    console = Console("json" if json else "auto")
    async for event in events_of(client, job, follow=follow, lost=lambda text: typer.echo(f"warning: {text}", err=True)):
        if event.get("event") == "output" and not json:
            typer.echo(f"{printable(str(event.get('site', '')))}: {printable(str(event.get('line', '')))}")
        else:
            console.show(event)
    if not follow:
        return
    state: Mapping[str, Any] = await client.call("job", job=job)
    if state["status"] == "stopped":
        raise JobStopped(f"job {job} was stopped.", folder="", hint=f"Go on with: hanse job resume {job}")
    if state["status"] == "failed":
        raise JobFailed(f"job {job} failed: {state.get('reason') or ''}", folder="")


def _rounds(row: Row) -> str:
    return f"{row.get('rounds') or 0}/{row.get('total_rounds') or '?'}"


def _sites(row: Row) -> str:
    return str(len(row.get("sites") or ()))
