"""`hanse finetune serve` and `disagreement`: score with the deployed version, beside it a candidate, and see where the two differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hanse.finetuning.routing import Router

app = typer.Typer()

ProjectFolder = Annotated[Path, typer.Option("--project", help="The project folder.")]


@app.command()
def serve(
    folder: Annotated[Path | None, typer.Argument(help="Score this folder of images, or table, and end.")] = None,
    http: Annotated[str | None, typer.Option(help="Answer HTTP requests at [HOST:]PORT; without a host, of this machine only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where a folder's scores go: .csv or .jsonl; default: scores/FOLDER.csv.")] = None,
    shadow: Annotated[str, typer.Option(metavar="VERSION", help="Have a candidate score the same inputs; it never answers.")] = "",
    canary: Annotated[str, typer.Option(metavar="VERSION", help="Have a candidate answer a share of the inputs.")] = "",
    share: Annotated[float, typer.Option(help="Of the inputs that a canary answers.", min=0, max=1)] = 0.05,
    log: Annotated[Path | None, typer.Option(help="Append each score to this file of JSON lines, for `hanse finetune watch`.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="A file with the token that each HTTP request has to bear.")] = None,
    project: ProjectFolder = Path(),
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Score a folder, or HTTP requests, with the version that is deployed."""
    from hanse.errors import ConfigError
    from hanse.finetuning.serving import FOLDER_ROWS, REQUEST_ROWS, open_router

    if (folder is None) == (http is None):
        raise ConfigError("name either a folder to score or --http", hint="For example: hanse finetune serve --http 8080")
    router = open_router(project, shadow=shadow, canary=canary, share=share, rows=REQUEST_ROWS if http else FOLDER_ROWS)
    if http is not None:
        _answer(router, http, project, log, token_file)
    elif folder is not None:
        _score(router, folder, out or project / "scores" / f"{folder.resolve().stem}.csv", project, log, json=json)


@app.command()
def disagreement(
    candidate: Annotated[str, typer.Option(help="The candidate, by the first digits of its digest; default: the last compared.")] = "",
    project: ProjectFolder = Path(),
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say where a shadow or canary decides otherwise than the current version, and write reports/disagreement.html."""
    import msgspec

    from hanse.finetuning.disagreement import disagreement as compare
    from hanse.finetuning.disagreement import words, write_report

    found = compare(project, candidate)
    path = write_report(found, project)
    typer.echo(msgspec.json.encode(found).decode() if json else "\n".join([*words(found), str(path)]))


def _score(router: Router, folder: Path, out: Path, project: Path, log: Path | None, *, json: bool) -> None:
    import msgspec
    from rich.console import Console
    from rich.progress import Progress

    from hanse.finetuning.serving import count_in, score_folder

    with Progress(console=Console(stderr=True), transient=True, disable=json) as progress:
        bar = progress.add_task("scoring", total=count_in(folder, router.current.schema))
        done = score_folder(project, folder, out, router=router, log=log, step=lambda rows: progress.advance(bar, rows))
    typer.echo(
        msgspec.json.encode(done).decode()
        if json
        else f"{done.rows:,} inputs, {done.positive:,} positive, {done.refused:,} refused, by {done.version[:19]}: {done.out}"
    )


def _answer(router: Router, http: str, project: Path, log: Path | None, token_file: Path | None) -> None:
    import logging

    from hanse.errors import ConfigError
    from hanse.finetuning.score_server import Service, is_local, listen, read_token, serve
    from hanse.finetuning.serving import Records, resizes

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    host, _, port = http.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not (port.isascii() and port.isdecimal()):
        raise ConfigError(f"--http {http}: the port is missing", hint="For example: --http 8080, or --http 0.0.0.0:8080")
    token = read_token(token_file) if token_file else None
    service = Service(router, Records(project, router.current.schema, log), token=token, resize=resizes(project))
    listener = listen(host, int(port))
    if not is_local(host):
        open_to = "with the token" if token else "without any token"
        typer.echo(
            f"warning: others than this machine reach {http} {open_to}, and nothing is encrypted: put a TLS proxy before it", err=True
        )
    serve(service, listener, ready=lambda url: typer.echo(f"{router.current.version} answers at {url}/score"))
