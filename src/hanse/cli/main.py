"""`hanse`, the command. What a command needs is imported when it runs, so that `hanse --help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hanse.cli import audit, finetune, job, poc, provision, server, site
from hanse.errors import ConfigError, HanseError, JobStopped

app = typer.Typer(
    name="hanse",
    help="Federated learning: the model travels to the data, and only what a site allows travels back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EXTRAS = {
    "cryptography": "site", "grpc": "site", "sqlalchemy": "server", "aiosqlite": "server", "asyncpg": "postgres", "obstore": "s3",
    "torch": "finetuning", "PIL": "finetuning", "starlette": "finetuning", "uvicorn": "finetuning", "pyarrow": "parquet", "ray": "ray",
    "tensorboardX": "tensorboard", "mlflow": "mlflow", "wandb": "wandb",
}  # fmt: skip
"""The extra that brings a package which only some commands need."""

Workers = Annotated[int | None, typer.Option(help="Worker processes; default: one for each core. The result does not depend on it.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of text.")]


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="A job folder: job.yaml (or .toml, .json), code, model.safetensors.")],
    sites: Annotated[str, typer.Option(help="How many sites to simulate, or their names with commas between.")] = "2",
    site_config: Annotated[
        Path | None, typer.Option(help="A YAML, TOML or JSON file: what single sites see in their config, by name.")
    ] = None,
    workers: Workers = None,
    threads: Annotated[int, typer.Option(help="How many threads each worker computes with.", min=1)] = 1,
    engine: Annotated[str, typer.Option(help="Where the workers are: processes, of this machine, or ray, a cluster.")] = "processes",
    address: Annotated[str | None, typer.Option(help="The Ray cluster's head, HOST:PORT, or auto; default: one on this machine.")] = None,
    runs: Annotated[Path, typer.Option(help="Where to make the run folder.")] = Path("runs"),
    track: Annotated[str | None, typer.Option(help="Where its metrics go meanwhile: tensorboard, mlflow or wandb, or NAME=WHERE.")] = None,
    json: Json = False,
) -> None:
    """Run a job folder, with simulated sites on this machine or a Ray cluster."""
    from hanse.environments import SimEnv
    from hanse.jobs.bundle import read_mapping
    from hanse.jobs.loading import read_job

    number = int(sites) if sites.isdecimal() else None
    names = () if number is not None else tuple(name.strip() for name in sites.split(","))
    config = read_mapping(site_config) if site_config else {}
    console = "json" if json else "auto"
    size: dict[str, Any] = {"workers": workers, "threads": threads, "engine": engine, "address": address}
    env = SimEnv(num_clients=number, sites=names, site_config=config, **size, runs=runs, track=track, console=console)
    read_job(folder).execute(env)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The run folder of a job that was stopped, crashed or failed.")],
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Go on with a run from its last commit."""
    from hanse.environments import resume as resume_run

    resume_run(folder, workers=workers, console="json" if json else "auto")


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="A run folder.")], json: Json = False) -> None:
    """Say what came of a run: its status, metrics, and where the model is."""
    from hanse.server.run import Run

    Run(folder).show("json" if json else "auto")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write a run's report.html anew and print its path."""
    from hanse.server.run import Run

    typer.echo(Run(folder).report())


@app.command()
def track(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[str, typer.Option(help="tensorboard, mlflow or wandb.")],
    at: Annotated[str | None, typer.Option(help="A folder for TensorBoard, a tracking URI for MLflow, a project for wandb.")] = None,
    sites: Annotated[bool | None, typer.Option(help="Each site's values too; default: of up to 100 sites.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended, or until Ctrl-C.")] = False,
) -> None:
    """Write what is new of a run's metrics where they are looked at, and print where that is."""
    from hanse.server.track import Target
    from hanse.server.track import track as track_run

    def say(level: str, text: str) -> None:
        typer.echo(f"{level}: {text}", err=True)

    typer.echo(track_run(folder, Target(to, at), sites=sites, follow=follow, say=say))


@app.command()
def version() -> None:
    """Print the versions of Hanse and of what decides a result's bits."""
    from hanse.jobs.bundle import versions

    for name, number in versions().items():
        typer.echo(f"{name} {number}")


for command in (provision.provision, provision.token, provision.revoke):
    app.command()(command)
for name, group in (
    ("server", server.app),
    ("site", site.app),
    ("job", job.app),
    ("poc", poc.app),
    ("audit", audit.app),
    ("finetune", finetune.app),
):
    app.add_typer(group, name=name)


def main() -> None:
    """Run the command; an error ends it with one clear text and a status: 2 for wrong input, 130 if it was stopped, else 1."""
    try:
        app()
    except JobStopped:
        sys.exit(130)
    except HanseError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except ModuleNotFoundError as error:
        if (extra := _EXTRAS.get((error.name or "").partition(".")[0])) is None:
            raise
        typer.echo(f"error: the package {error.name!r} is not installed. Install it with: pip install 'hanse[{extra}]'", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
