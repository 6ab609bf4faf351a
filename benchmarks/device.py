"""`device`: a CNN on 1,000 simulated sites, 100 a round, trains at least 0.95 of the sites/s of two bare processes of one thread each.

Hanse has two workers of one thread each. Both use the same training function. They take turns, each time in a new process whose first
round does not count; what counts is the median of the turns' ratios. A round of Hanse goes from commit to commit, so it holds all that
Hanse does.
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
PROGRAMS = {"hanse": WORKLOADS / "cnn_job.py", "bare": WORKLOADS / "cnn_bare.py"}
SITES_PER_ROUND = 100


def measure(options: Namespace) -> Iterator[Claim]:
    speeds: dict[str, list[list[float]]] = {kind: [] for kind in PROGRAMS}  # by turn and round
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for kind in sorted(PROGRAMS, reverse=turn % 2 == 1):
                output = run_process([sys.executable, PROGRAMS[kind], options.rounds], cwd=Path(folder)).output
                speeds[kind].append([SITES_PER_ROUND / seconds for seconds in json.loads(output)])
                print(f"{kind:5}", "  ".join(f"{speed:.0f}" for speed in speeds[kind][-1]), "sites/s", flush=True)
    hanse, bare = ([median(turn) for turn in speeds[kind]] for kind in ("hanse", "bare"))
    yield Claim(
        what="device: sites/s",
        hanse=f"{median(hanse):.0f}",
        bare=f"{median(bare):.0f}",
        figure=ratio(hanse, bare),
        limit=0.95,
        at_least=True,
    )
    quickest, bare_quickest = (max(max(turn) for turn in speeds[kind]) for kind in ("hanse", "bare"))
    what = "device: sites/s in the quickest round"
    yield Claim(what=what, hanse=f"{quickest:.0f}", bare=f"{bare_quickest:.0f}", figure=quickest / bare_quickest)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=8)
    options.add_argument("--rounds", type=int, default=6, help="in each turn, after one that does not count")
    run(measure, options.parse_args())
