"""TensorBoard's event files, written by tensorboardX."""

from __future__ import annotations

from pathlib import Path

from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

from hanse.errors import ConfigError
from hanse.server.run import Run
from hanse.tracking.values import params, values

GLOBAL = "global"


def write(run: Run, at: str | None = None, *, sites: bool = True) -> str:
    """Write a run to a folder that `tensorboard --logdir` shows: one subfolder for the federation, `global`, and one for each site.

    at: the folder, which must not hold anything yet; None: `tensorboard` in the run folder. Returns it.
    Raises ConfigError if it is not empty.
    """
    folder = run.folder / "tensorboard" if at is None else Path(at)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: event files of two runs would be shown as one. Name another folder, or remove it.")
    writers: dict[str, SummaryWriter] = {}
    try:
        writers[GLOBAL] = SummaryWriter(str(folder / GLOBAL))
        writers[GLOBAL].add_text("job", "\n".join(f"    {key}: {value}" for key, value in params(run).items()), 0)
        for value in values(run, sites=sites):
            name = value.site or GLOBAL
            if name not in writers:
                writers[name] = SummaryWriter(str(folder / "sites" / name))
            if value.kind == "scalar":
                writers[name].add_scalar(value.key, value.value, value.step)
            else:
                writers[name].add_text(value.key, value.value, value.step)
    finally:
        for writer in writers.values():
            writer.close()
    return str(folder)
