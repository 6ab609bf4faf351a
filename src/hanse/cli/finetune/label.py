"""`hanse finetune label` and `training-set`: a client labels its own images, and takes from them what to train on."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()

Project = Annotated[Path, typer.Option(help="This party's project folder.")]


@app.command()
def label(
    source: Annotated[Path, typer.Argument(help="A folder of images or a table, or an .npz file with scores, images and embeddings.")],
    project: Project = Path(),
    port: Annotated[int, typer.Option(help="On this machine; 0: any that is free.", min=0, max=65535)] = 0,
    open: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    band: Annotated[tuple[float, float], typer.Option(help="The scores to begin with, from and to.")] = (0.01, 0.3),
    by: Annotated[str, typer.Option(help="Who labels; default: the name of the account.")] = "",
    seed: Annotated[int, typer.Option(help="Of what is left to chance.")] = 0,
) -> None:
    """Label this party's own images in a browser, likely anomalies first, until Ctrl-C. Nothing leaves this machine."""
    import getpass
    import webbrowser

    from hanse.finetuning.labelling.labels import Labels
    from hanse.finetuning.labelling.pool import read_pool
    from hanse.finetuning.labelling.queue import Queue
    from hanse.finetuning.labelling.server import serving

    problems: list[Any] = []
    pool = read_pool(source, project, problems)
    if problems:
        typer.echo(f"{len(problems)} cannot be used; the first: {problems[0].where} {problems[0].what}", err=True)
    with Labels(project, by=by or getpass.getuser()) as labels:
        queue = Queue(pool, labels, seed=seed)
        queue.check()
        with serving(queue, title=source.resolve().stem, band=band, port=port) as url:
            typer.echo(f"{len(pool.names):,} images; label them at {url}  (Ctrl-C ends it)")
            if open:
                webbrowser.open(url)
            _wait()
        tally = queue.tally()
        typer.echo(
            f"\n{len(labels.given)} labels in {labels.folder}; {tally.search.found} anomalies in {tally.search.looked} images searched,"
            f" {tally.chance.found} in {tally.chance.looked} drawn by lot"
        )


@app.command("training-set")
def write_training_set(
    n: Annotated[int, typer.Option(help="At most so many images.", min=1)] = 50,
    project: Project = Path(),
    out: Annotated[Path | None, typer.Option(help="The CSV file to write; default: labels/training.csv in the project.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Write a mixture of the labelled images to train on: anomalies of all kinds, and normal ones drawn by chance first."""
    from hanse.errors import ConfigError
    from hanse.finetuning.labelling.labels import labels_folder, training_set, write_csv

    chosen = training_set(project, n, seed)
    if not chosen:
        raise ConfigError(f"{labels_folder(project)} has no labels to train on", hint="`hanse finetune label` makes them.")
    path = out or labels_folder(project) / "training.csv"
    write_csv(path, chosen)
    typer.echo(f"{path}: {len(chosen)} images, {sum(each.label for each in chosen)} of them anomalies")


def _wait() -> None:
    """Until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
