"""`hanse finetune run`, `deliver`, `receive`: fine-tune with a client, and bring the candidate to them and their decision back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hanse.cli.admin import Json, KitFolder, print_json
from hanse.cli.finetune.project import Client, ProjectFolder

if TYPE_CHECKING:
    from hanse.finetuning.run import Tuned
    from hanse.jobs.recipe import Environment
    from hanse.server.run import Run

app = typer.Typer(no_args_is_help=True)

Runs = Annotated[Path, typer.Option(help="Where to make the run folder; relative to the project.")]


@app.command()
def run(
    project: ProjectFolder = Path("."),
    kit: Annotated[Path | None, typer.Option(help="Your kit: the run goes to the federation's sites of vendor and client.")] = None,
    client: Client = None,
    simulate: Annotated[
        Path | None, typer.Option(help="Instead of a federation: the client's project folder, when both are on this machine.")
    ] = None,
    air_gap: Annotated[
        bool, typer.Option(help="By signed files, for a client without a connection; say it again when it is complete.")
    ] = False,
    runs: Runs = Path("runs"),
    json: Json = False,
) -> None:
    """As the vendor: check both parties' data, train a candidate with the client, and have the gate decide."""
    from hanse.cli.finetune.bundle import say
    from hanse.environments import ProdEnv, SimEnv
    from hanse.errors import ConfigError
    from hanse.finetuning.air_gap import WaitingForBundle
    from hanse.finetuning.contract import read_project
    from hanse.finetuning.run import fine_tune, without_connection
    from hanse.identity.kit import read_kit

    contract = read_project(project)
    vendor, party = contract.vendor, contract.client(client)
    console = "json" if json else "auto"
    if (kit is None) == (simulate is None) or (air_gap and kit is None):
        raise ConfigError("say where to run: --kit, for a federation or with --air-gap; or --simulate with the client's project folder")
    if simulate is not None:
        read_project(simulate)
        folders = {vendor.site: {"finetuning": str(project.resolve())}, party.site: {"finetuning": str(simulate.resolve())}}
        env: Environment[Run] = SimEnv(sites=list(folders), site_config=folders, runs=project / runs, console=console)
        who = "simulation"
    else:
        assert kit is not None
        opened = read_kit(kit)
        who = opened.name
        if air_gap:
            env = without_connection(project, opened.signer(), opened.credentials().roots, client=client, console=console)
        else:
            env = ProdEnv(kit, sites=[vendor.site, party.site], runs=project / runs, console=console)
    try:
        tuned = fine_tune(project, env, who=who, client=client)
    except WaitingForBundle as waiting:
        say(waiting.standing, json)
        return
    show(tuned, json=json)


def show(tuned: Tuned, *, json: bool) -> None:
    """What came of a run, for people or programs."""
    from hanse.finetuning.report import write_report

    report = write_report(tuned.run.folder)
    if json:
        print_json(
            {"outcome": tuned.evidence.outcome, "version": tuned.version.digest, "words": tuned.evidence.words, "report": str(report)}
        )
        return
    typer.echo(f"\n{tuned.evidence.words}\n\nversion  {tuned.version.digest}\nreport   {report}")
    if tuned.evidence.outcome != "rejected":
        typer.echo(f"next     hanse finetune approve {tuned.version.digest.removeprefix('blake3:')[:12]} --kit KIT")


@app.command()
def deliver(
    version: Annotated[str, typer.Argument(help="The version that the vendor has approved, by the first digits of its digest.")],
    kit: KitFolder,
    project: ProjectFolder = Path("."),
    client: Client = None,
) -> None:
    """As the vendor: bring a version to the client's inbox, and fetch the client's decision if there is one."""
    from hanse.environments import ProdEnv
    from hanse.finetuning.contract import read_project
    from hanse.finetuning.run import deliver as delivered
    from hanse.finetuning.versions import Versions
    from hanse.identity.kit import read_kit

    found = Versions(project, client).get(version)
    site = read_project(project).client(client).site
    env = ProdEnv(kit, sites=[site], runs=project / "runs", console="quiet")
    if delivered(project, env, found, read_kit(kit).credentials().roots, client=client):
        typer.echo(f"{site} has decided: see `hanse finetune versions show {version}`")
    else:
        typer.echo(f"it is in the inbox of {site}; deliver it again to fetch the decision")


@app.command()
def receive(kit: KitFolder, project: ProjectFolder = Path("."), client: Client = None) -> None:
    """As the client: take over the versions that lie in the inbox, after their signatures are checked."""
    from hanse.finetuning.versions import Versions
    from hanse.identity.kit import read_kit

    roots, versions = read_kit(kit).credentials().roots, Versions(project, client)
    for path in sorted((project / "inbox").glob("*.version")):
        version = versions.import_(path, roots)
        path.unlink()
        typer.echo(f"{version.digest}  is here; look at it, then: hanse finetune accept {version.digest.removeprefix('blake3:')[:12]}")


@app.command()
def adopt(
    folder: Annotated[Path, typer.Argument(help="The folder of a completed run, as `hanse job download` brings it.")],
    project: ProjectFolder = Path("."),
    client: Client = None,
    json: Json = False,
) -> None:
    """As the vendor: take over the candidate of a run that nobody waited for."""
    from hanse.finetuning.run import adopt as adopted
    from hanse.server.run import Run

    show(adopted(project, Run(folder), who="adopt", client=client), json=json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    bundle: Annotated[Path | None, typer.Option(help="Write this zip too, for auditors: report, evidence, and every event.")] = None,
) -> None:
    """Write a run's finetuning.html anew and print its path."""
    from hanse.finetuning.report import write_bundle, write_report

    typer.echo(write_report(folder))
    if bundle is not None:
        typer.echo(write_bundle(folder, bundle))
