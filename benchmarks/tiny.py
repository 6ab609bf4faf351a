"""`tiny`: logistic regression on 10,000 simulated sites, 1,000 a round, one step each: with `LocalSGD` at least 10 × the sites/s per core
of a bare loop over the sites, with a function at least 0.9 ×.

The bare loop is one process of one thread: one module and one optimizer, `load_state_dict`, forward, backward, step, a running sum. The
function is the same code. Hanse has as many workers of one thread as there are cores, and its main process beside them; its sites/s are
divided by the cores. A round of Hanse goes from commit to commit, so it holds all that Hanse does. They take turns, each time in a new
process whose first round does not count; what counts is the median of the turns' ratios.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from claims import Claim, parser, ratio, run
from processes import run as run_process

WORKLOADS = Path(__file__).parent / "workloads"
SITES_PER_ROUND = 1000
CORES = len(os.sched_getaffinity(0))


def measure(options: Namespace) -> Iterator[Claim]:
    job, bare = WORKLOADS / "tiny_job.py", WORKLOADS / "tiny_bare.py"
    programs = {
        "LocalSGD": [job, "value", options.rounds, CORES],
        "function": [job, "function", options.rounds, CORES],
        "plain": [bare, "plain", options.rounds],
        "tuned": [bare, "tuned", options.rounds],
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in programs}  # per core, by turn
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for kind in sorted(programs, reverse=turn % 2 == 1):
                seconds = json.loads(run_process([sys.executable, *map(str, programs[kind])], cwd=Path(folder)).output)
                cores = 1 if kind in ("plain", "tuned") else CORES
                speeds[kind].append(median(SITES_PER_ROUND / each / cores for each in seconds))
                print(f"{kind:8}", f"{speeds[kind][-1]:,.0f} sites/s per core", flush=True)
    for what, kind, beside, limit in (
        ("LocalSGD", "LocalSGD", "plain", 10),
        ("function", "function", "plain", 0.9),
        ("LocalSGD beside a loop without module and optimizer", "LocalSGD", "tuned", None),
    ):
        yield Claim(
            what=f"tiny: sites/s per core, {what}",
            hanse=f"{median(speeds[kind]):,.0f}",
            bare=f"{median(speeds[beside]):,.0f}",
            figure=ratio(speeds[kind], speeds[beside]),
            limit=limit,
            at_least=True,
        )


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=4)
    options.add_argument("--rounds", type=int, default=20, help="in each turn, after one that does not count")
    run(measure, options.parse_args())
