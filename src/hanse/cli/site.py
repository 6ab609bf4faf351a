"""`hanse site`: a site joins and runs its agent; admins look at the sites and switch them off and on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hanse.cli.admin import Json, KitFolder, Row, ask, moment, moment_of, print_answer, print_facts, print_json, print_table, text_of

app = typer.Typer(help="Join a federation and run a site's agent; or, as an admin, look at the sites.", no_args_is_help=True)

SiteName = Annotated[str, typer.Argument(help="The site's name.")]


@app.command()
def join(
    folder: Annotated[Path | None, typer.Argument(help="Where to make the site's kit; default: a folder of the site's name.")] = None,
    token: Annotated[str, typer.Option(help="The join token, or the file that holds it.")] = ...,  # type: ignore[assignment]
    server: Annotated[str | None, typer.Option(help="host:port of the server, if it is another one than the token names.")] = None,
    proxy: Annotated[str | None, typer.Option(help="http:// URL of a CONNECT proxy on the way to the server.")] = None,
) -> None:
    """Make this site's key, and have the server certify it with a join token. The key stays here."""
    import asyncio
    import os

    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from hanse.identity.tokens import read_token
    from hanse.site.joining import join as enrol

    text = Path(token).read_text().strip() if len(token) < 1_000 and Path(token).is_file() else token
    kit = asyncio.run(enrol(text, folder or Path(read_token(text).site), server=server, proxy=proxy))
    typer.echo(f"{kit.name} has joined {kit.federation}. Look through {kit.policy_file}, then: hanse site start {kit.folder}")


@app.command()
def start(kit: Annotated[Path, typer.Argument(help="The site's folder, as `hanse site join` made it.")]) -> None:
    """Run the site's agent until SIGTERM or Ctrl-C. Prints one line once it is connected; its log goes to standard error."""
    from hanse.cli.service import run_service
    from hanse.identity.kit import read_kit
    from hanse.site.agent import run_agent

    run_service(run_agent(read_kit(kit), ready=lambda: typer.echo("ready")))


@app.command()
def pause(
    kit: Annotated[Path, typer.Argument(help="The site's folder.")],
    why: Annotated[str, typer.Option(help="The reason, for the audit log.")] = "",
) -> None:
    """Have this site's agent begin no new task until it is resumed; it stays connected, and what it is at goes on."""
    import getpass

    from hanse.identity.kit import read_kit
    from hanse.site.hours import pause as begin_pause

    opened = read_kit(kit)
    begin_pause(opened, who=getpass.getuser(), why=why)
    typer.echo(f"{opened.name} is paused. Go on with: hanse site resume {kit}")


@app.command()
def resume(kit: Annotated[Path, typer.Argument(help="The site's folder.")]) -> None:
    """Have this site's agent begin tasks again."""
    from hanse.identity.kit import read_kit
    from hanse.site.hours import resume as end_pause

    opened = read_kit(kit)
    end_pause(opened)
    typer.echo(f"{opened.name} is resumed")


@app.command("list")
def list_sites(kit: KitFolder, json: Json = False) -> None:
    """List the sites: which are connected, and what they have."""
    sites = ask(kit, "sites")
    if json:
        print_json(sites)
        return
    columns = {
        "site": text_of("site"),
        "organisation": text_of("organisation"),
        "state": _state,
        "since": moment_of("since"),
        "has": lambda row: resources(row.get("resources")),
        "certified until": lambda row: moment(row.get("expires"))[:10],
    }
    print_table(sites, columns, empty="no site has joined yet")


@app.command()
def show(site: SiteName, kit: KitFolder, json: Json = False) -> None:
    """Say what is known of a site."""
    found = ask(kit, "site", site=site)
    if json:
        print_json(found)
        return
    facts = {
        "site": str(found["site"]),
        "organisation": str(found.get("organisation") or ""),
        "state": _state(found),
        "since": moment(found.get("since")),
        "has": resources(found.get("resources")),
        "version": str(found.get("version") or ""),
        "certified until": moment(found.get("expires")),
        "jobs": ", ".join(map(str, found.get("jobs") or ())),
    }
    print_facts(facts)


@app.command()
def disable(site: SiteName, kit: KitFolder, json: Json = False) -> None:
    """Give a site no more tasks, and refuse its connections, until it is enabled again."""
    _switch("disable", site, kit, json)


@app.command()
def enable(site: SiteName, kit: KitFolder, json: Json = False) -> None:
    """Let a disabled site connect again."""
    _switch("enable", site, kit, json)


def _switch(name: str, site: str, kit: Path, json: bool) -> None:
    print_answer(ask(kit, name, site=site), f"{site} is {name}d", as_json=json)


def _state(row: Row) -> str:
    connected = "connected" if row.get("connected") else "away"
    return ", ".join([connected, *(name for name in ("disabled", "revoked") if row.get(name))])


def resources(value: Any) -> str:
    """Cores, memory and GPUs in words."""
    if not isinstance(value, dict):
        return ""
    parts = [f"{value['cores']:g} cores"] if value.get("cores") else []
    parts += [f"{value['memory_bytes'] / (1 << 30):.1f} GiB"] if value.get("memory_bytes") else []
    parts += [f"{value['gpus']} GPUs"] if value.get("gpus") else []
    return ", ".join(parts)
