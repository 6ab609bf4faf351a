"""`device`: a CNN on 1,000 simulated sites, 100 a round, trains at least 0.95 of the sites/s of two bare processes of one thread each.

Hanse has two workers of one thread each. Both use the same training function. They take turns, each time in a new process whose first
round does not count, and medians over all rounds count. A round of Hanse goes from commit to commit, so it holds all that Hanse does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from claims import Claim, parser, run
from processes import run as run_process

WORKLOADS = Path(__file__).parent / "workloads"
PROGRAMS = {"hanse": WORKLOADS / "cnn_job.py", "bare": WORKLOADS / "cnn_bare.py"}
SITES_PER_ROUND = 100


def measure(options: Namespace) -> Iterator[Claim]:
    seconds: dict[str, list[float]] = {kind: [] for kind in PROGRAMS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for kind in sorted(PROGRAMS, reverse=turn % 2 == 1):
                rounds = json.loads(run_process([sys.executable, PROGRAMS[kind], options.rounds], cwd=Path(folder)).output)
                seconds[kind] += rounds
                print(f"{kind:5}", "  ".join(f"{SITES_PER_ROUND / s:.0f}" for s in rounds), "sites/s", flush=True)
    hanse, bare = (SITES_PER_ROUND / median(seconds[kind]) for kind in ("hanse", "bare"))
    yield Claim(what="device: sites/s", hanse=f"{hanse:.0f}", bare=f"{bare:.0f}", figure=hanse / bare, limit=0.95, at_least=True)
    hanse, bare = (SITES_PER_ROUND / min(seconds[kind]) for kind in ("hanse", "bare"))
    yield Claim(what="device: sites/s in the quickest round", hanse=f"{hanse:.0f}", bare=f"{bare:.0f}", figure=hanse / bare)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=4)
    options.add_argument("--rounds", type=int, default=8, help="in each turn, after one that does not count")
    run(measure, options.parse_args())
