"""`hanse provision`, `hanse token`, `hanse revoke`: who takes part, and who does not any more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hanse.cli.admin import Json, KitFolder, ask, print_answer
from hanse.errors import ConfigError


def provision(
    project: Annotated[Path | None, typer.Argument(help="The project file: who takes part.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to write the folders; default: one of the federation's name.")] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a project file to begin with, and write nothing.")] = False,
) -> None:
    """Make the authority, and a folder for each participant, from a project file. What is there already stays as it is."""
    from hanse.provision.kits import provision as write_kits
    from hanse.provision.project import EXAMPLE, read_project

    if example:
        typer.echo(EXAMPLE, nl=False)
        return
    if project is None:
        raise ConfigError("which project? Name its file; `hanse provision --example` prints one to begin with.")
    described = read_project(project)
    made = write_kits(described, folder or Path(described.federation))
    for path in made:
        typer.echo(path)
    if made:
        typer.echo("Hand each folder to its owner over a way that you trust, and keep `authority` offline.", err=True)
    else:
        typer.echo("everybody has a folder already", err=True)


def token(
    site: Annotated[str, typer.Argument(help="The name of the site that shall join.")],
    organisation: Annotated[str, typer.Option(help="The organisation that it belongs to.")],
    kit: KitFolder,
    hours: Annotated[float, typer.Option(help="How long the token is good.", min=0.01)] = 24.0,
    json: Json = False,
) -> None:
    """Make a token with which one site can join, once. Give it to the site's people over a way that you trust."""
    answer = ask(kit, "token", site=site, organisation=organisation, hours=hours)
    print_answer(answer, answer["token"], as_json=json)


def revoke(name: Annotated[str, typer.Argument(help="Of a site or a person.")], kit: KitFolder, json: Json = False) -> None:
    """Refuse all certificates of a participant from now on; open connections end at once."""
    print_answer(ask(kit, "revoke", name=name), f"{name} is revoked", as_json=json)
