"""`latency`: an iteration of gradient-mix over mutual TLS takes at most 5 ms beyond the two parties' own computing, at 60,000 parameters.

Vendor and client are processes of this machine in `PocEnv`, with a model of 60,000 parameters and batches of 32. An iteration is a
fiftieth of the time from commit to commit; what the slower party took for its gradient, as measured there, is taken off.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from claims import Claim, parser, run

from hanse.environments import PocEnv
from hanse.finetuning.contract import Gate, Learning, Party, Project, Schema, write_project
from hanse.finetuning.init import init
from hanse.finetuning.models import load_module, params_of
from hanse.finetuning.party import app
from hanse.finetuning.recipe import FinetuneRecipe
from hanse.finetuning.versions import Versions
from hanse.messages.codec import write
from hanse.messages.flmodel import FLModel
from hanse.server.run import Run

COLUMNS, BEYOND_MS = 28, 5
CODE = """from torch import nn


def build():
    return nn.Sequential(nn.Linear(28, 270), nn.ReLU(), nn.Linear(270, 192), nn.ReLU(), nn.Linear(192, 1))
"""
SECTIONS = {"vendor": {"train": 400, "holdout": 400}, "client": {"train": 200, "test": 200}}


def measure(options: Namespace) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = _recipe(folder, options.iterations)
        config = {site: {"finetuning": str(folder / site)} for site in SECTIONS}
        env = PocEnv(sites=list(SECTIONS), site_config=config, runs=folder / "runs", console="quiet")
        began = time.monotonic()
        ended = env.execute(recipe)
        took = time.monotonic() - began
        whole, beyond = _iterations(ended)
    size = sum(array.size for array in recipe.first_model()[0].params.values())
    print(f"{size:,} parameters, {options.iterations} iterations; the whole run took {took:.1f} s", flush=True)
    print(f"an iteration {_milliseconds(whole)}   of it beyond the slower party's computing {_milliseconds(beyond)}", flush=True)
    yield Claim(
        what=f"gradient-mix, {size:,} parameters: an iteration beyond computing", hanse=f"{median(whole) * 1e3:.2f} ms",
        bare=f"{(median(whole) - median(beyond)) * 1e3:.2f} ms", figure=median(beyond) * 1e3, unit="ms", limit=BEYOND_MS,
    )  # fmt: skip


def _iterations(ended: Run) -> tuple[list[float], list[float]]:
    """Mean seconds of an iteration in each commit, and of it beyond the slower party's gradient; without the first commit, which warms up.

    A commit's own time and its one measurement are in it.
    """
    slower: dict[int, list[float]] = {}
    gradients = [event for event in ended.events("update") if event["task"] == "gradient"]
    for one, other in zip(gradients[::2], gradients[1::2], strict=True):
        slower.setdefault(one["round"], []).append(max(one["seconds"], other["seconds"]))
    whole = {event["round"]: event["seconds"] for event in ended.events("round") if event["round"] in slower}
    counted = sorted(whole)[1:]
    return (
        [whole[number] / len(slower[number]) for number in counted],
        [(whole[number] - sum(slower[number])) / len(slower[number]) for number in counted],
    )


def _recipe(folder: Path, iterations: int) -> FinetuneRecipe:
    """The parties' folders, with rows of noise, and the job."""
    project = Project(
        name="latency", vendor=Party(site="vendor", organisation="Vendor"), clients=[Party(site="client", organisation="Client")],
        schema=Schema(kind="table", columns=[f"x{number}" for number in range(COLUMNS)]), gate=Gate(resamples=200),
        learning=Learning(mode="gradient-mix", iterations=iterations, controls=False),
    )  # fmt: skip
    folder.joinpath("model.py").write_text(CODE)
    weights = folder / "base.safetensors"
    write(weights, FLModel(params_of(load_module(folder, project.model))))
    version = init(folder / "vendor", project, who="benchmark", code=folder / "model.py", weights=weights)
    assert version is not None
    write_project(folder / "client", project)
    (folder / "client" / "model.py").write_text(CODE)
    rng = np.random.default_rng(0)
    for site, sections in SECTIONS.items():
        for section, rows in sections.items():
            inputs = rng.normal(size=(rows, COLUMNS)).astype(np.float32)
            np.savez(folder / site / f"{section}.npz", inputs=inputs, labels=np.arange(rows) % 2)
        lines = [f"{section}: {{kind: arrays, file: {section}.npz}}\n" for section in sections]
        (folder / site / "data.yaml").write_text("".join(lines))
    params = Versions(folder / "vendor").params(version)
    return FinetuneRecipe(name="latency", app=app, model=params, project=msgspec.to_builtins(project), client="client", threshold=0.5)


def _milliseconds(seconds: list[float]) -> str:
    return f"{median(seconds) * 1e3:.2f} ms ({min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f})"


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--iterations", type=int, default=600)
    run(measure, options.parse_args())
