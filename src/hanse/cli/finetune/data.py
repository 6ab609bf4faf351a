"""`hanse finetune check`: what is wrong with this party's data, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hanse.cli.admin import Json, print_json

app = typer.Typer()

Folder = Annotated[Path, typer.Option("--project", help="This party's project folder.")]


@app.command()
def check(
    project: Folder = Path(),
    reference: Annotated[Path | None, typer.Option(help="Another party's reports/data-profile.json: how unlike is this data?")] = None,
    json: Json = False,
) -> None:
    """Check this party's data before training; write reports/data-check.html. Exit status 1 if the data cannot be used."""
    import msgspec

    from hanse.finetuning.check import REPORT, as_text, check_folder

    found = check_folder(project, reference)
    if json:
        print_json(msgspec.to_builtins(found))
    else:
        typer.echo(as_text(found))
        typer.echo(f"\nreport: {project / 'reports' / REPORT}")
    if found.outcome == "failed":
        raise typer.Exit(1)
