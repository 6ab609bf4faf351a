"""`hanse poc`: a federation of real processes on this machine, kept running to try things out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hanse.cli.admin import Json, print_json
from hanse.errors import ConfigError

app = typer.Typer(help="Keep a federation of real processes running on this machine, to try things out.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option(help="Where its kits, jobs and logs are.")]
HERE = Path("poc")


@app.command()
def start(
    sites: Annotated[str, typer.Option(help="How many sites, or their names with commas between.")] = "2",
    folder: Folder = HERE,
    policy: Annotated[Path | None, typer.Option(help="A policy.yaml for every site; default: all is allowed, without a sandbox.")] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay here until Ctrl-C.")] = False,
    json: Json = False,
) -> None:
    """Start a server and sites, and print the startup kit to use them with."""
    from hanse.environments import standing
    from hanse.environments.local import LocalFederation, local_project
    from hanse.environments.settings import roster_of
    from hanse.site.policy import read_policy

    number = int(sites) if sites.isdecimal() else None
    if number == 0:
        raise ConfigError("--sites is 0: it must be a number from 1, or names")
    names = list(roster_of(number, [name.strip() for name in sites.split(",")]))
    local_project(names, port=1)
    standing.check_sites(folder, names)
    allowed = {}
    if policy is not None:
        read_policy(policy)
        allowed = {"policy": policy.read_text(encoding="utf-8")}

    def ready(federation: LocalFederation) -> None:
        _say_where(federation.folder, names, json)

    if foreground:
        standing.stand(folder, names, ready=ready, **allowed)
        return
    if standing.running(folder) is not None:
        raise ConfigError(f"a federation runs in {folder} already.", hint=f"Stop it with: hanse poc stop --folder {folder}")
    arguments = ["poc", "start", "--foreground", "--folder", str(folder), "--sites", ",".join(names)]
    standing.start(arguments + (["--policy", str(policy)] if policy else []), folder)
    _say_where(folder, names, json)


@app.command()
def stop(
    folder: Folder = HERE, delete: Annotated[bool, typer.Option("--delete", help="Delete the folder, with all jobs in it.")] = False
) -> None:
    """Stop the federation. Its folder stays, and the next start goes on with it."""
    import shutil

    from hanse.environments import standing

    typer.echo("stopped" if standing.stop(folder) else f"no federation runs in {folder}")
    if delete and (folder / standing.PID).is_file():
        shutil.rmtree(folder)


@app.command()
def status(folder: Folder = HERE, json: Json = False) -> None:
    """Say whether a federation runs, and with which startup kit it is used. The exit status is 1 if none does."""
    from hanse.environments import standing
    from hanse.environments.local import joined_sites

    if standing.running(folder) is None:
        if json:
            print_json({"running": False})
        else:
            typer.echo(f"no federation runs in {folder}")
        raise typer.Exit(1)
    _say_where(folder, joined_sites(folder), json)


def _say_where(folder: Path, sites: list[str], json: bool) -> None:
    from hanse.environments.local import admin_kit
    from hanse.server.wording import plural

    kit = admin_kit(folder)
    if json:
        print_json({"running": True, "sites": sites, "kit": str(kit), "logs": str(folder / "logs")})
        return
    lines = [
        f"running with {plural(len(sites), 'site')}: {', '.join(sites)}",
        f"  kit   {kit}",
        f"  logs  {folder / 'logs'}",
        f"  use   hanse job submit FOLDER --kit {kit}   or   ProdEnv(startup_kit={str(kit)!r})",
    ]
    typer.echo("\n".join(lines))  # at once: who started it in the background reads one line, and goes
