"""`hanse finetune bundle`: tasks and updates as signed files, for parties without a connection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hanse.cli.admin import Json, KitFolder, print_json
from hanse.cli.finetune.project import ProjectFolder

if TYPE_CHECKING:
    from hanse.finetuning.air_gap import Standing

app = typer.Typer(no_args_is_help=True)
bundle = typer.Typer(help="Carry a run's tasks and updates as signed files, where there is no connection.", no_args_is_help=True)
app.add_typer(bundle, name="bundle")


@bundle.command("export")
def export_bundle(
    kit: KitFolder,
    file: Annotated[Path | None, typer.Argument(help="The file to write, or a folder; default: only say where the bundle lies.")] = None,
    project: ProjectFolder = Path("."),
    json: Json = False,
) -> None:
    """Write what is to be carried to the other party: tasks where the run was begun, updates at a site."""
    from hanse.finetuning.air_gap import export, place_of, runs_in
    from hanse.identity.kit import read_kit

    opened, place = read_kit(kit), place_of(project)
    folder = (runs_in(place) or [place / "site"])[-1]
    console = "quiet" if json else "auto"
    say(export(folder, signer=opened.signer(), roots=opened.credentials().roots, target=file, console=console), json)


@bundle.command("import")
def import_bundle(
    file: Annotated[Path, typer.Argument(help="The bundle that was carried here.")],
    kit: KitFolder,
    project: ProjectFolder = Path("."),
    data: Annotated[
        list[Path] | None, typer.Option(help="At a site, the first time: a file or folder with data outside of the project's folder.")
    ] = None,
    checks: Annotated[bool, typer.Option(help="At a site: keep to its policy, and to its sandbox.")] = True,
    json: Json = False,
) -> None:
    """Take in a bundle: at a site its tasks are done, and where the run was begun it goes on."""
    from hanse.finetuning import air_gap
    from hanse.finetuning.contract import WRITTEN
    from hanse.identity.kit import read_kit

    opened, place = read_kit(kit), air_gap.place_of(project)
    roots = opened.credentials().roots
    standing = air_gap.import_bundle(
        file,
        folder=air_gap.folder_for(place, file, roots),
        signer=opened.signer(),
        roots=roots,
        config={"finetuning": str(project.resolve())},
        keep=[str(project.resolve() / name) for name in WRITTEN],
        data=[str(path.resolve()) for path in (project, *(data or ()))],
        checks=checks,
        console="quiet" if json else "auto",
    )
    say(standing, json)


def say(standing: Standing, json: bool) -> None:
    """What a standing asks of people, for people or programs."""
    if json:
        carry = [{"file": str(path), "to": to} for path, to in standing.carry]
        print_json({"status": standing.status, "carry": carry, "notes": list(standing.notes)})
        return
    for note in standing.notes:
        typer.echo(note)
    for path, to in standing.carry:
        typer.echo(f"Waits for a bundle. Carry this to {to}: {path}" if standing.status == "waiting" else f"Carry this to {to}: {path}")
    if standing.status == "completed" and standing.run is not None:
        typer.echo(f"The run is complete: {standing.run.folder}\nnext     hanse finetune run --air-gap --kit KIT takes the candidate in")
