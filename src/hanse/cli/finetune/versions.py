"""`hanse finetune versions …`, `approve`, `accept`, `refuse`, `deploy`: the model's versions, and what the parties decide about them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hanse.cli.admin import Json, KitFolder, print_facts, print_json, print_table, text_of
from hanse.cli.finetune.project import Client, ProjectFolder, user

if TYPE_CHECKING:
    from hanse.finetuning.decisions import Decision

app = typer.Typer(no_args_is_help=True)
versions = typer.Typer(help="The model's versions: list, show, compare, carry, and go back.", no_args_is_help=True)
app.add_typer(versions, name="versions")

VersionName = Annotated[str, typer.Argument(help='The first digits of its digest, or "current".')]
Why = Annotated[str, typer.Option(help="The reason, which is signed and recorded too.")]
HERE = Path(".")


@versions.command("list")
def list_versions(project: ProjectFolder = HERE, client: Client = None, json: Json = False) -> None:
    """List the versions, oldest first."""
    from hanse.finetuning.versions import Versions

    store = Versions(project, client)
    current = store.current
    rows = [
        {
            "version": version.digest,
            "created": f"{version.created:%Y-%m-%d %H:%M}",
            "threshold": version.threshold,
            "parent": version.parent,
            "decisions": {site: statement.decision for site, statement in store.decisions(version).items()},
            "deployed": version == current,
            "notes": version.notes,
        }
        for version in store.list()
    ]
    if json:
        print_json(rows)
        return
    columns = {
        "": lambda row: "*" if row["deployed"] else "",
        "version": lambda row: _short(row["version"]),
        "created": text_of("created"),
        "threshold": lambda row: f"{row['threshold']:.4g}",
        "parent": lambda row: _short(row["parent"] or ""),
        "decisions": lambda row: ", ".join(f"{site}: {decision}" for site, decision in row["decisions"].items()),
        "notes": text_of("notes"),
    }
    print_table(rows, columns, empty="there is no version yet")


@versions.command()
def show(
    version: VersionName,
    kit: Annotated[Path | None, typer.Option(envvar="HANSE_KIT", help="Your startup kit: check the files and signatures too.")] = None,
    project: ProjectFolder = HERE,
    client: Client = None,
    json: Json = False,
) -> None:
    """Say what a version is, who decided what about it, and what it lacks to be deployed."""
    import msgspec

    from hanse.finetuning.versions import Versions
    from hanse.identity.kit import read_kit

    store = Versions(project, client)
    found = store.get(version)
    roots = read_kit(kit).credentials().roots if kit else None
    decisions = store.decisions(found)
    missing = store.missing(found, roots) if roots else ()
    says = {"version": found.digest, **msgspec.to_builtins(found)}
    if json:
        checked = {"verified": kit is not None, "decisions": msgspec.to_builtins(decisions), "missing": list(missing) if kit else None}
        print_json(says | checked)
        return
    facts = {name: value if isinstance(value, str) else msgspec.json.encode(value).decode() for name, value in says.items()}
    for site, each in decisions.items():
        facts[site] = f"{each.decision}, {each.by}, {each.when:%Y-%m-%d %H:%M}{f': {each.why}' if each.why else ''}"
    facts["checked"] = "every file and signature is good" if kit else "nothing: name your --kit"
    facts["to deploy"] = ("; ".join(missing) or "nothing is missing") if kit else ""
    print_facts(facts)


@versions.command()
def diff(a: VersionName, b: VersionName, project: ProjectFolder = HERE, client: Client = None, json: Json = False) -> None:
    """Say what differs between two versions: what is said of them, the code, and how far each tensor moved."""
    import msgspec

    from hanse.finetuning.versions import Versions
    from hanse.server.wording import printable

    store = Versions(project, client)
    found = store.diff(store.get(a), store.get(b))
    if json:
        print_json(msgspec.to_builtins(found))
        return
    if found.changed:
        print_facts({name: " → ".join(msgspec.json.encode(value).decode() for value in values) for name, values in found.changed.items()})
    for line in found.code.splitlines():
        typer.echo(printable(line))
    rows = [{"tensor": name, "moved": f"{moved:.4g}", "of": f"{norm:.4g}"} for name, (moved, norm) in found.tensors.items()]
    rows += [{"tensor": name, "moved": "in one of them only, or of another shape"} for name in found.only]
    print_table(rows, {"tensor": text_of("tensor"), "L2 norm of the difference": text_of("moved"), "of": text_of("of")}, empty="no tensors")


@versions.command()
def add(
    weights: Annotated[Path | None, typer.Option(help="A safetensors file; default: the parent's weights.")] = None,
    parent: Annotated[str | None, typer.Option(help="The version that it comes from, by its first digits.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Positive from this score; default: the parent's, or 0.5.", min=0, max=1)] = None,
    notes: Annotated[str, typer.Option(help="What people should know of it.")] = "",
    project: ProjectFolder = HERE,
) -> None:
    """Add a version: other weights, or a parent's with another threshold."""
    from hanse.finetuning.init import add_weights
    from hanse.finetuning.versions import Versions

    origin = Versions(project).get(parent) if parent else None
    typer.echo(add_weights(project, weights, who=user(), parent=origin, threshold=threshold, notes=notes).digest)


@versions.command()
def export(
    version: VersionName,
    to: Annotated[Path, typer.Argument(help="The file to write.")],
    project: ProjectFolder = HERE,
    client: Client = None,
) -> None:
    """Write a version, with the decisions on it, to one file for the other party."""
    from hanse.finetuning.versions import Versions

    store = Versions(project, client)
    store.export(store.get(version), to)
    typer.echo(to)


@versions.command("import")
def import_version(
    file: Annotated[Path, typer.Argument(help="What `export` wrote at the other party.")],
    kit: KitFolder,
    project: ProjectFolder = HERE,
    client: Client = None,
) -> None:
    """Take over a version, or new decisions on one, that the other party exported. Every digest and signature is checked first."""
    from hanse.finetuning.versions import Versions
    from hanse.identity.kit import read_kit

    typer.echo(Versions(project, client).import_(file, read_kit(kit).credentials().roots).digest)


@versions.command()
def rollback(
    to: Annotated[str | None, typer.Option(help="An earlier version, by its first digits; default: the one before.")] = None,
    why: Why = "",
    project: ProjectFolder = HERE,
    client: Client = None,
) -> None:
    """Go back to the version that was deployed before."""
    from hanse.finetuning.versions import Versions

    store = Versions(project, client)
    typer.echo(f"version {store.rollback(store.get(to) if to else None, who=user(), why=why).digest} is deployed again")


@app.command()
def approve(version: VersionName, kit: KitFolder, why: Why = "", project: ProjectFolder = HERE, client: Client = None) -> None:
    """As the vendor: approve a version, with your signature. Unless the gate has accepted it, --why is needed."""
    _sign(version, "approve", kit, why, project, client)


@app.command()
def accept(version: VersionName, kit: KitFolder, why: Why = "", project: ProjectFolder = HERE, client: Client = None) -> None:
    """As the client: accept a version, with your signature."""
    _sign(version, "accept", kit, why, project, client)


@app.command()
def refuse(
    version: VersionName,
    kit: KitFolder,
    why: Annotated[str, typer.Option(help="The reason, which is signed and recorded too.")] = ...,  # type: ignore[assignment]
    project: ProjectFolder = HERE,
    client: Client = None,
) -> None:
    """As the client: refuse a version, with your signature. It cannot be taken back."""
    _sign(version, "refuse", kit, why, project, client)


def _sign(version: str, decision: Decision, kit: Path, why: str, project: Path, client: str | None) -> None:
    from hanse.finetuning.versions import Versions
    from hanse.identity.kit import read_kit

    store = Versions(project, client)
    statement = store.sign(store.get(version), decision, read_kit(kit).signer(), why=why)
    typer.echo(f"{statement.who}: {decision} {statement.version}; the project is now in the state {store.history.state!r}")


@app.command()
def deploy(version: VersionName, kit: KitFolder, why: Why = "", project: ProjectFolder = HERE, client: Client = None) -> None:
    """Make a version the one that is used here. Both parties must have signed it."""
    from hanse.finetuning.versions import Versions
    from hanse.identity.kit import read_kit

    opened, store = read_kit(kit), Versions(project, client)
    found = store.get(version)
    store.deploy(found, opened.credentials().roots, who=f"{opened.name} of {opened.organisation}", why=why)
    typer.echo(f"version {found.digest} is deployed")


def _short(digest: str) -> str:
    return digest.removeprefix("blake3:")[:12]
