"""`convergence`: the accuracy of each algorithm after equal rounds on Fashion-MNIST, spread over 20 sites by a Dirichlet distribution.

Every algorithm does the same number of local steps with the same rate (Ditto, which trains two models, does twice that).

all: the last shared model on all 10,000 test pictures.
own: each site's unseen pictures under the model that the site would use, its personal one where it has one; the mean over all pictures.

A figure is the mean over seeds, with the least and the greatest. A seed sets the spread, the first model and the order of pictures.
Compare a row with `fedavg`; those with ¼, which ask a quarter of the sites a round, with one another; and `fedbn`, whose network has
batch normalization, with `fedavg+norm`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "workloads"))
from clothes import Net, accuracy, app, pictures

from hanse import (
    Adam,
    ByExamples,
    DittoRecipe,
    FedAsyncRecipe,
    FedAvgRecipe,
    FedBuffRecipe,
    FedDynRecipe,
    FedNova,
    FedOptRecipe,
    FedProxRecipe,
    Median,
    PersonalRecipe,
    PowerOfChoice,
    ScaffoldRecipe,
    SimEnv,
    WeightedMean,
)

DATA = Path(os.environ.get("HANSE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "fashion_mnist.npz"


def asynchronous(recipe: Callable[..., Any], updates: int, **own: Any) -> Callable[..., Any]:
    """Makes it with as many updates as the others' rounds have; so many make one step of the server."""

    def make(*, rounds: int, sites_per_round: int, **common: Any) -> Any:
        return recipe(rounds=max(1, rounds * sites_per_round // updates), concurrency=sites_per_round, **own, **common)

    return make


def some(**own: Any) -> Callable[..., Any]:
    """Makes federated averaging that asks a quarter of the sites a round."""

    def make(*, sites_per_round: int, **common: Any) -> Any:
        return FedAvgRecipe(sites_per_round=sites_per_round // 4, **own, **common)

    return make


# One line an algorithm. The training code, workloads/clothes.py, sees the name as `algorithm` in its config; "+norm" and "fedbn" put
# batch normalization into the network.
ALGORITHMS: Mapping[str, Callable[..., Any]] = {
    "fedavg": FedAvgRecipe,
    "fedprox": partial(FedProxRecipe, mu=0.01),
    "fedadam": partial(FedOptRecipe, server_optimizer=Adam(0.01)),
    "fednova": partial(FedAvgRecipe, aggregator=FedNova()),
    "median": partial(FedAvgRecipe, aggregator=Median()),
    "fedbuff": asynchronous(FedBuffRecipe, 10, buffer=10),
    "fedasync": asynchronous(FedAsyncRecipe, 1),
    "scaffold": ScaffoldRecipe,
    "feddyn": partial(FedDynRecipe, alpha=0.1),
    "ditto": partial(DittoRecipe, strength=0.1),
    "fedper": partial(PersonalRecipe, local=["head.*"]),
    "fedrep": partial(PersonalRecipe, local=["head.*"]),
    "¼ uniform": some(),
    "¼ by size": some(selection=ByExamples(), aggregator=WeightedMean("equal")),
    "¼ by loss": some(selection=PowerOfChoice(10)),
    "fedavg+norm": FedAvgRecipe,
    "fedbn": partial(PersonalRecipe, local=["norm.*"]),
}
PARTLY_LOCAL = {"fedper", "fedrep", "fedbn"}  # there is no model that is whole without a site


def measure(name: str, seed: int, options: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Accuracy of the shared model on all test pictures, NaN where there is none, and of each site's model on its own."""
    norm = name == "fedbn" or name.endswith("+norm")
    torch.manual_seed(seed)
    recipe = ALGORITHMS[name](
        name="convergence",
        app=app,
        model=Net(norm),
        rounds=options.rounds,
        sites_per_round=options.sites_per_round or options.sites,
        config={"algorithm": name, "norm": norm, "data": str(DATA), "spread": options.spread, "split": seed, "rate": options.rate},
        seed=seed,
        best="max own",
    )
    run = recipe.execute(SimEnv(num_clients=options.sites, runs=folder, console="quiet"))
    own = math.nan if name.startswith("¼") else run.metrics[-1].get("own", math.nan)  # not of all sites; asynchronous ones do not evaluate
    if name in PARTLY_LOCAL:
        return math.nan, own
    net = Net(norm)
    net.load_state_dict({tensor: torch.tensor(array) for tensor, array in run.get_result().params.items()})
    _, x, _, y = pictures(str(DATA))
    return accuracy(net, x, y), own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted from 0")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS), metavar="NAME")
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--sites-per-round", type=int, default=None, help="drawn anew each round; all, if not given")
    parser.add_argument("--spread", type=float, default=0.3, help="α of the Dirichlet distribution; the smaller, the less alike the sites")
    parser.add_argument("--rate", type=float, default=0.05, help="the learning rate of local steps")
    options = parser.parse_args()
    if not DATA.is_file():
        sys.exit(f"There is no {DATA}: set HANSE_DATA to the folder of fashion_mnist.npz.")
    print(f"{options.sites} sites, Dirichlet({options.spread:g}), {options.rounds} rounds, {options.seeds} seeds, rate {options.rate:g}\n")
    print(f"| {'algorithm':12} | {'all: mean (least – greatest)':28} | {'own: mean (least – greatest)':28} | seconds a run |")
    print(f"|{'-' * 14}|{'-' * 30}|{'-' * 30}|{'-' * 15}|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.algorithms:
            began_s = time.perf_counter()
            figures = [measure(name, seed, options, Path(folder)) for seed in range(options.seeds)]
            cells = [spread_of(list(column)) for column in zip(*figures, strict=True)]
            seconds = (time.perf_counter() - began_s) / options.seeds
            print(f"| {name:12} | {cells[0]:28} | {cells[1]:28} | {seconds:13.1f} |", flush=True)


def spread_of(values: list[float]) -> str:
    return "–" if math.isnan(mean(values)) else f"{mean(values):.1%} ({min(values):.1%} – {max(values):.1%})"


if __name__ == "__main__":
    main()
