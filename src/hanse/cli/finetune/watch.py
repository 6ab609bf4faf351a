"""`hanse finetune watch` and `watch-reference`: has the data at the client changed, and why?"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hanse.finetuning.contract import Project
    from hanse.finetuning.watch import Figures, Watch
    from hanse.finetuning.watch_sources import Batch
    from hanse.finetuning.webhook import Webhook

app = typer.Typer()

ProjectFolder = Annotated[Path, typer.Option("--project", help="The project folder.")]


@app.command()
def watch(
    source: Annotated[str, typer.Argument(help="A folder to score, a CSV or JSONL file of scored inputs, or - for standard input.")],
    project: ProjectFolder = Path(),
    reference: Annotated[Path | None, typer.Option(help="The vendor's reference; default: watch/reference.safetensors.")] = None,
    window: Annotated[int, typer.Option(help="Inputs in a window.", min=1)] = 100,
    in_a_row: Annotated[int, typer.Option(help="So many windows must differ one after the other.", min=1)] = 2,
    positives: Annotated[
        float | None, typer.Option(help="The share of positives that is normal here; default: the holdout's.", min=0, max=1)
    ] = None,
    keep_slices: Annotated[bool, typer.Option("--keep-slices", help="Name no slice, such as a device, in an alarm.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Go through what is there, then stop.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds until the source is looked at again.", min=0.1)] = 30,
    webhook: Annotated[str | None, typer.Option(help="https:// address that alarms are sent to, signed.")] = None,
    kit: Annotated[Path | None, typer.Option(envvar="HANSE_KIT", help="The kit of the person who signs what is sent.")] = None,
    secret: Annotated[Path | None, typer.Option(help="A file with a secret shared with the receiver, to sign with instead.")] = None,
    plain_http: Annotated[bool, typer.Option("--plain-http", help="Allow http:// to another machine.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line: each window and each alarm.")] = False,
) -> None:
    """Watch scored inputs for drift. Goes on where it was; nothing leaves but alarms, and those only to --webhook."""
    import msgspec

    from hanse.finetuning.watch import Alarm, Settings, Watch, read_reference
    from hanse.finetuning.watch_sources import follow
    from hanse.server.wording import printable

    about = _project(project)
    settings = Settings(window=window, in_a_row=in_a_row, positives=positives, name_slices=not keep_slices)
    place = project / "watch"
    hook = _hook(webhook, kit, secret, plain_http)
    known = read_reference(reference or place / "reference.safetensors")
    with Watch(place, known, settings, project=about.name if about else "", site=_site(about)) as open_watch:

        def told(what: Figures | Alarm) -> None:
            if json:
                typer.echo(json_module.dumps({type(what).__name__.lower(): msgspec.to_builtins(what)}))
            elif isinstance(what, Alarm):
                typer.echo(f"{what.time}  {what.reason}: {printable(what.words)}\n  Next: {what.next_step}")

        repeat = None if once or source == "-" else interval
        batches = _batches(source, project, about, open_watch, growing=repeat is not None)
        follow(open_watch, batches, told=told, warn=lambda text: typer.echo(f"warning: {text}", err=True), hook=hook, interval_s=repeat)
        counts = open_watch.counts()
    if json:
        typer.echo(json_module.dumps({"counts": counts}))
    else:
        typer.echo("so far " + ", ".join(f"{number} {what}" for what, number in counts.items()))


@app.command("watch-reference")
def watch_reference(
    scores: Annotated[Path | None, typer.Argument(help="CSV or JSONL of scored, labelled rows; default: score the holdout.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write it.")] = Path("reference.safetensors"),
    project: ProjectFolder = Path(),
    version: Annotated[str, typer.Option(help="The first digits of the version's digest; default: the deployed version.")] = "",
    threshold: Annotated[float | None, typer.Option(help="With SCORES: the operating threshold, if there is no version here.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the calibration; default: the project's.", min=0)] = None,
) -> None:
    """At the vendor: write what a client's watch compares with. It holds statistics of the holdout alone."""
    from hanse.finetuning.contract import read_project
    from hanse.finetuning.watch_sources import reference_of_holdout, reference_of_scores, version_of

    if scores is None:
        made = reference_of_holdout(project, version=version, seed=seed)
    elif threshold is not None:
        made = reference_of_scores(scores, threshold, seed=seed or 0)
    else:
        of, about = version_of(project, version), read_project(project)
        seed = about.seed if seed is None else seed
        made = reference_of_scores(scores, of.threshold, seed=seed, slices=of.schema.slices, model=of.digest)
    made.write(out)
    rows, what = sum(map(sum, made.confusion)), "scores and embeddings" if made.dimension else "scores"
    typer.echo(f"{out}: {what} of {rows} rows, {made.positives:.1%} of them positive, in {out.stat().st_size} bytes")


def _project(folder: Path) -> Project | None:
    """The project in the folder, if it is one: scored inputs can be watched without."""
    from hanse.finetuning.contract import PROJECT, read_project

    return read_project(folder) if (folder / PROJECT).is_file() else None


def _site(about: Project | None) -> str:
    """Of the client, where the project has only one."""
    return about.clients[0].site if about and len(about.clients) == 1 else ""


def _hook(url: str | None, kit: Path | None, secret: Path | None, plain_http: bool) -> Webhook | None:
    from hanse.finetuning.webhook import Webhook, read_secret

    if url is None:
        return None
    if secret is not None:
        return Webhook(url=url, secret=read_secret(secret), plain_http=plain_http)
    if kit is None:
        raise typer.BadParameter("a webhook is signed: give the --kit of the person who signs, or a --secret")
    from hanse.identity.kit import read_kit

    return Webhook(url=url, signer=read_kit(kit).signer(), plain_http=plain_http)


def _batches(source: str, folder: Path, about: Project | None, watch: Watch, *, growing: bool) -> Callable[[], Iterable[Batch]]:
    """What the source holds, each time anew, and the labels of spot checks. growing: a last line without its end is still being written."""
    import sys

    from hanse.errors import ConfigError
    from hanse.finetuning.watch_sources import read_scored, score_folder, spot_checks

    path = Path(source)
    slices, version = about.schema.slices if about else None, watch.reference.model
    if source != "-" and not path.exists():
        raise ConfigError(f"{source} is neither a folder nor a file of scored inputs")

    def batches() -> Iterable[Batch]:
        if source == "-":
            yield from read_scored(sys.stdin, where="standard input", slices=slices, version=version, batch=10)
        elif path.is_dir():
            yield from score_folder(folder, path, watch)
        else:
            with path.open(encoding="utf-8", newline="") as file:
                lines = (line for line in file if not growing or line.endswith("\n"))
                yield from read_scored(lines, where=source, slices=slices, version=version)
        yield from spot_checks(folder)

    return batches
