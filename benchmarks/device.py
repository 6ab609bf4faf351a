"""`device`: a CNN on 1,000 simulated sites, 100 a round: a function trains at least 0.95 of the sites/s of two bare processes of one thread
each, and `LocalSGD` at least 1.3 × those of two that train as the textbook does.

Hanse has two workers of one thread each. The function and the bare loop beside it are the same training function, with what makes a CNN
quick on a CPU; the textbook's loop makes a DataLoader and an optimizer for each site. They take turns, each time in a new process whose
first round does not count; what counts is the median of the turns' ratios. A round of Hanse goes from commit to commit, so it holds all
that Hanse does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from claims import Claim, parser, ratio, run
from processes import run as run_process

WORKLOADS = Path(__file__).parent / "workloads"
PROGRAMS = {
    "hanse": ("cnn_job.py",),
    "bare": ("cnn_bare.py",),
    "LocalSGD": ("cnn_job.py", "value"),
    "plain": ("cnn_plain_bare.py",),
}
SITES_PER_ROUND = 100


def measure(options: Namespace) -> Iterator[Claim]:
    speeds: dict[str, list[list[float]]] = {kind: [] for kind in PROGRAMS}  # by turn and round
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for kind in sorted(PROGRAMS, reverse=turn % 2 == 1):
                program, *form = PROGRAMS[kind]
                output = run_process([sys.executable, WORKLOADS / program, options.rounds, *form], cwd=Path(folder)).output
                speeds[kind].append([SITES_PER_ROUND / seconds for seconds in json.loads(output)])
                print(f"{kind:8}", "  ".join(f"{speed:.0f}" for speed in speeds[kind][-1]), "sites/s", flush=True)
    medians = {kind: [median(turn) for turn in turns] for kind, turns in speeds.items()}
    quickest = {kind: [max(max(turn) for turn in turns)] for kind, turns in speeds.items()}
    for what, kind, beside, figures, limit in (
        ("sites/s", "hanse", "bare", medians, 0.95),
        ("sites/s in the quickest round", "hanse", "bare", quickest, None),
        ("sites/s, LocalSGD beside the textbook's loop", "LocalSGD", "plain", medians, 1.3),
        ("sites/s, LocalSGD beside the tuned loop", "LocalSGD", "bare", medians, None),
    ):
        yield Claim(
            what=f"device: {what}",
            hanse=f"{median(figures[kind]):.0f}",
            bare=f"{median(figures[beside]):.0f}",
            figure=ratio(figures[kind], figures[beside]),
            limit=limit,
            at_least=True,
        )


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=8)
    options.add_argument("--rounds", type=int, default=6, help="in each turn, after one that does not count")
    run(measure, options.parse_args())
