"""Fine-tuning on nine devices that the vendor never had: each mode at 50 and 500 labelled images, beside both controls; 3 seeds.

Everything goes the way of a real run: project folders, the workflow, both parties' own data, int8 on the way; in `SimEnv`, whose bits are
those of a federation. Claims, on the means of the seeds:
* `rehearsed`, 4 round trips, is within 0.3 percentage points of 600 iterations of `gradient-mix` in the client's EER, in at most 1/150 of
  the round trips and 1/500 of the bytes, and takes at least 30 % off the base's EER at 50 images, 40 % at 500;
* with the vendor trained on augmented images first, it is better than either alone at 500 images;
* the vendor's EER stays within the gate's margin.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import msgspec
import numpy as np
from base import CLIENT, HERE, SCHEMA, VENDOR, Split, base, split

sys.path.insert(0, str(HERE.parent))
from claims import Claim, parser, run

from hanse.environments import SimEnv
from hanse.finetuning.contract import Gate, Learning, Party, Project, write_project
from hanse.finetuning.party import app
from hanse.finetuning.recipe import FinetuneRecipe
from hanse.seeds import generator
from hanse.server.run import Run

HOLDOUT = 6_000
MODES = {
    "rehearsed": Learning(controls=True),
    "rehearsed, LoRA of rank 4": Learning(adapter="lora", controls=False),
    "gradient-mix": Learning(mode="gradient-mix", controls=False),
    "one-shot": Learning(mode="one-shot", controls=False),
    "average": Learning(mode="average", round_trips=30, client_steps=20, bits=32, controls=False),
    "augmented vendor, then rehearsed": Learning(augmented_vendor_first=True, controls=False),
}


def measure(options: Namespace) -> Iterator[Claim]:
    figures: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for seed in options.seeds:
        for images in options.images:
            for name in options.modes:
                for what, found in tried(name, images, seed).items():
                    figures[what, images].append(found)
                    print(f"seed {seed}, {images:3} images, {what:34}", _line(found), flush=True)
    print("\nmeans of the seeds, EER in percent", flush=True)
    for (what, images), found in figures.items():
        means = {name: mean(each[name] for each in found) for name in found[0]}
        print(f"{images:3} images  {what:34}", _line(means), flush=True)
    yield from _claims({key: {name: mean(each[name] for each in found) for name in found[0]} for key, found in figures.items()})


def _line(found: dict[str, float]) -> str:
    text = f"client {found['client']:5.2f}  vendor {found['vendor']:5.2f}"
    return text + (f"  {found['trips']:3.0f} round trips  {found['bytes'] / 1e6:7.3f} MB" if "trips" in found else "")


def _claims(means: dict[tuple[str, int], dict[str, float]]) -> Iterator[Claim]:
    for images, less in ((50, 30), (500, 40)):
        ours, base_, mix = (means.get((what, images)) for what in ("rehearsed", "base", "gradient-mix"))
        if ours is None or base_ is None:
            continue
        yield _claim(f"{images} images: EER taken off the base's", 100 * (1 - ours["client"] / base_["client"]), less, "%", at_least=True)
        yield _claim(f"{images} images: the vendor's EER beyond the base's", ours["vendor"] - base_["vendor"], 0.5, "pp")
        if mix is not None:
            yield _claim(f"{images} images: rehearsed beyond gradient-mix", ours["client"] - mix["client"], 0.3, "pp")
            yield _claim(
                f"{images} images: round trips of gradient-mix in one of rehearsed", mix["trips"] / ours["trips"], 150, "", at_least=True
            )
            yield _claim(
                f"{images} images: bytes of gradient-mix in one of rehearsed", mix["bytes"] / ours["bytes"], 500, "", at_least=True
            )
        both, alone = means.get(("augmented vendor, then rehearsed", images)), means.get(("vendor alone", images))
        if both is not None and alone is not None:
            limit = 0.0 if images == 500 else None
            better = both["client"] - min(ours["client"], alone["client"])
            yield _claim(f"{images} images: augmented first, beyond the better of the two alone", better, limit, "pp")


def _claim(what: str, figure: float, limit: float | None, unit: str, *, at_least: bool = False) -> Claim:
    return Claim(what=what, hanse="", bare="", figure=figure, limit=limit, unit=unit, at_least=at_least)


def tried(name: str, images: int, seed: int) -> dict[str, dict[str, float]]:
    """What one mode gave, with base and controls where they were measured: EERs in percent, round trips of training and their bytes."""
    with tempfile.TemporaryDirectory() as folder:
        pool, rng = split("client-pool", seed), generator(seed, "labelled", images)
        labelled = np.concatenate([rng.choice(np.flatnonzero(pool.labels == label), images // 2, replace=False) for label in (0, 1)])
        recipe, env = of_project(Path(folder), MODES[name], pool.rows(labelled), split("client-test", seed), seed)
        return _figures(name, recipe.execute(env))


def _figures(name: str, run: Run) -> dict[str, dict[str, float]]:
    eers: dict[str, dict[str, float]] = defaultdict(dict)
    for event in run.events("figures"):
        if "rows" in event:
            eers[name if event["what"] == "candidate" else event["what"]][event["party"]] = 100 * event["eer"]
    crossed = [event for event in run.events("crossed") if event["party"] == "client"]
    training = [event for event in crossed if event["task"] in ("train", "gradient")]
    controls = sum(what == "client alone" for what in eers)  # its training came first, and so did the evaluations of controls
    training = training[controls:]
    last = [event for event in crossed if event["task"] == "evaluate"][-1]  # the candidate, which travels for it
    eers[name] |= {
        "trips": len(training),
        "bytes": last["down_bytes"] + sum(event["down_bytes"] + event["up_bytes"] for event in training),
    }
    if name != "rehearsed":
        eers.pop("base")
        if name.startswith("augmented"):
            eers.pop("vendor alone", None)
    return dict(eers)


def of_project(folder: Path, learning: Learning, labelled: Split, test: Split, seed: int) -> tuple[FinetuneRecipe, SimEnv]:
    """The project folders of both parties, and the job. labelled, test: what the client has."""
    project = Project(
        name="clothes", vendor=Party(site="vendor", organisation="Vendor"), clients=[Party(site="client", organisation="Client")],
        schema=msgspec.structs.replace(SCHEMA, slices=["device"]), learning=learning, gate=Gate(resamples=200), seed=seed,
    )  # fmt: skip
    parts = {
        "vendor": {"train": split("vendor-train", seed), "holdout": split("vendor-holdout", seed).rows(np.arange(HOLDOUT))},
        "client": {"train": labelled, "test": test},
    }
    for site, sections in parts.items():
        write_project(folder / site, project)
        (folder / site / "model.py").write_bytes((HERE / "model.py").read_bytes())
        cameras = np.array([device.name for device in (VENDOR if site == "vendor" else CLIENT)])
        for section, part in sections.items():
            np.savez(folder / site / f"{section}.npz", inputs=part.images[..., None], labels=part.labels, device=cameras[part.devices])
        (folder / site / "data.yaml").write_text("".join(f"{name}: {{kind: arrays, file: {name}.npz}}\n" for name in sections))
    recipe = FinetuneRecipe(name="clothes", app=app, model=base(seed), project=msgspec.to_builtins(project), client="client", seed=seed)
    folders = {site: {"finetuning": str(folder / site)} for site in parts}
    return recipe, SimEnv(sites=list(parts), site_config=folders, runs=folder / "runs", workers=2, console="quiet")


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--images", type=int, nargs="+", default=[50, 500])
    options.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    run(measure, options.parse_args())
