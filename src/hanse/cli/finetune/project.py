"""`hanse finetune init`, `invite`, `status`, `history`: a project's folder, where it stands, and how it came there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hanse.cli.admin import Json, KitFolder, print_facts, print_json

app = typer.Typer(no_args_is_help=True)

ProjectFolder = Annotated[Path, typer.Option("--project", help="The project folder.")]
Client = Annotated[str | None, typer.Option(help="The client's site, if the project has more than one.")]

DEFAULTS = {
    "name": "project", "vendor": "vendor=Vendor", "clients": "client=Client", "kind": "image", "shape": "28x28x1", "columns": "x1,x2",
    "classes": "normal,anomaly", "mean": "0", "std": "1", "slices": "", "group": "", "mode": "rehearsed", "vendor_weight": "",
}  # fmt: skip
_ONLY = {"shape": "image", "columns": "table"}

_NEXT = {
    "draft": "fill in data.yaml, then `hanse finetune check`",
    "data check": "`hanse finetune run` measures the deployed version, and trains",
    "base evaluation": "`hanse finetune run` trains",
    "training": "it is being trained; if that was interrupted, `hanse finetune run` goes on",
    "candidate": "the vendor's gate decides on the candidate",
    "vendor gate": "the vendor: `hanse finetune approve VERSION`, then `deliver VERSION`, or `versions export` for a stick",
    "inconclusive": "the vendor: more holdout data and the gate again, or `hanse finetune approve VERSION --why …`",
    "client acceptance": "the client: `hanse finetune receive`, then `accept VERSION` or `refuse`; the vendor fetches it with `deliver`",
    "approved": "`hanse finetune deploy VERSION`",
    "deployed": "`hanse finetune watch` looks for drift; `hanse finetune versions rollback` is the way back",
    "monitored": "once it has drifted, `hanse finetune check` and another run; `hanse finetune versions rollback` is the way back",
    "rejected": "nothing has changed anywhere; `hanse finetune check` begins anew",
    "rolled back": "`hanse finetune watch` looks for drift; `hanse finetune check` begins anew",
}


def _answer(text: str, name: str) -> Any:
    return typer.Option(help=text, show_default=DEFAULTS[name] or "none")


@app.command()
def init(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where to make the project folder.")] = Path("."),
    name: Annotated[str | None, _answer("Name of the project: small letters, digits and -.", "name")] = None,
    vendor: Annotated[str | None, _answer("The vendor, SITE=ORGANISATION: its site, and whose people sign for it.", "vendor")] = None,
    clients: Annotated[str | None, _answer("The clients, SITE=ORGANISATION of each with commas between.", "clients")] = None,
    kind: Annotated[str | None, _answer("What data is: image or table.", "kind")] = None,
    shape: Annotated[str | None, _answer("An image's height x width x channels.", "shape")] = None,
    columns: Annotated[str | None, _answer("The table's columns in the model's order, commas between.", "columns")] = None,
    classes: Annotated[str | None, _answer("What the negative and the positive class (the anomaly) are called.", "classes")] = None,
    mean: Annotated[str | None, _answer("What is subtracted from inputs (images: from 0…1); one number, or one for each.", "mean")] = None,
    std: Annotated[str | None, _answer("What they are divided by after that; one number, or one for each.", "std")] = None,
    slices: Annotated[str | None, _answer("Columns by which results are told apart, such as device.", "slices")] = None,
    group: Annotated[str | None, _answer("The column that says which rows belong together, such as patient.", "group")] = None,
    mode: Annotated[str | None, _answer("How to train: rehearsed, gradient-mix, one-shot or average.", "mode")] = None,
    vendor_weight: Annotated[str | None, _answer("The vendor's weight, 0 to 1; none: the mode's own.", "vendor_weight")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Your model's code, a file with build(); default: a small network to begin with.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the model as it is now, a safetensors file.")] = None,
    threshold: Annotated[float, typer.Option(help="Its operating threshold: positive from this score.", min=0, max=1)] = 0.5,
) -> None:
    """Make a vendor's project folder. On a terminal, it asks for what the flags do not say."""
    from hanse.finetuning.init import init as make
    from hanse.finetuning.init import project_of

    version = make(folder, project_of(_answers(context)), who=user(), code=model, weights=weights, threshold=threshold)
    typer.echo(f"{folder} holds the project; look through project.yaml and data.yaml")
    typer.echo(f"version {version.digest}" if version else "its first version: hanse finetune versions add --weights FILE")


def _answers(context: typer.Context) -> dict[str, str]:
    """What the flags say; for the others what is typed at a terminal, or the default."""
    asks, answers = _at_terminal(), dict[str, str]()
    for parameter in context.command.params:
        if (name := parameter.name) not in DEFAULTS:
            continue
        given = context.params[name]
        if given is None and asks and _ONLY.get(name, answers.get("kind")) == answers.get("kind"):
            given = typer.prompt(getattr(parameter, "help", name), default=DEFAULTS[name])
        answers[name] = DEFAULTS[name] if given is None else given
    return answers


def _at_terminal() -> bool:
    import sys

    return sys.stdin.isatty()


def user() -> str:
    """Who sits at this machine, for what needs no signature."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


@app.command()
def invite(
    client: Annotated[str, typer.Argument(help="The client's site.")],
    kit: KitFolder,
    to: Annotated[Path | None, typer.Option(help="The folder to write; default: one of the client's name.")] = None,
    version: Annotated[str, typer.Option(help="The version that the client begins with, by its first digits.")] = "current",
    project: ProjectFolder = Path("."),
) -> None:
    """Write a client's project folder, to be handed over: the contract, the code, the deployed version with your signature."""
    from hanse.finetuning.init import invite as write
    from hanse.finetuning.versions import Versions
    from hanse.identity.kit import read_kit

    chosen = Versions(project, client).get(version)
    folder = write(project, to or Path(client), read_kit(kit).signer(), client=client, version=chosen)
    typer.echo(f"{folder} is ready: hand it to {client} over a way that you trust")


@app.command()
def status(project: ProjectFolder = Path("."), client: Client = None, json: Json = False) -> None:
    """Say where the project stands, which version is deployed, and what to do next."""
    from hanse.finetuning.versions import Versions

    versions = Versions(project, client)
    state, current = versions.history.state, versions.current
    said = {
        "project": versions.project.name,
        "client": versions.history.client,
        "state": state,
        "deployed": current.digest if current else "",
        "threshold": str(current.threshold) if current else "",
        "next": _NEXT[state],
    }
    if json:
        print_json(said)
    else:
        print_facts(said)


@app.command()
def history(
    project: ProjectFolder = Path("."),
    client: Client = None,
    verify: Annotated[
        bool, typer.Option(help="Check that no line was altered, removed or added, and that every step was allowed.")
    ] = False,
    json: Json = False,
) -> None:
    """Print every step and decision: when, who, why."""
    from hanse.finetuning.history import History
    from hanse.server.wording import one_line

    found = History(project, client)
    if verify:
        count = found.verify()
        typer.echo(f"{found.path}: {count:,} lines, all in place and unaltered", err=json)
    for line in found.lines:
        version = str(line.get("version") or "").removeprefix("blake3:")[:12]
        if json:
            print_json(line)
        else:
            typer.echo(
                one_line(f"{line['time'][:16].replace('T', ' ')}  {line['kind']:<18} {version:<13} {line['who']}  {line['why']}", 300)
            )
