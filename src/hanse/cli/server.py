"""`hanse server`: the server of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The server of a federation.", no_args_is_help=True)


@app.callback()
def server() -> None:
    """The server of a federation."""


@app.command()
def start(kit: Annotated[Path, typer.Argument(help="The server's folder, as `hanse provision` made it.")]) -> None:
    """Run the server until SIGTERM or Ctrl-C. Prints one line once it is ready; its log goes to standard error."""
    from hanse.cli.service import run_service
    from hanse.identity.kit import read_kit
    from hanse.server.main import serve_kit

    run_service(serve_kit(read_kit(kit), ready=lambda address: typer.echo(f"ready on {address}")))
