"""`overhead`: an empty task, 10,000 float32 parameters in 4 arrays and no training, costs at most 200 µs a site in one worker.

A round of 1,000 sites goes from commit to commit, so it holds all that Hanse does. Beside it: a loop that calls the same function and
averages with NumPy.
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
SITES = 1000


def measure(options: Namespace) -> Iterator[Claim]:
    programs = {
        "bare": [WORKLOADS / "empty_bare.py"],
        "function": [WORKLOADS / "empty_job.py", "function"],
        "script": [WORKLOADS / "empty_job.py", "script"],
    }
    rounds: dict[str, list[float]] = {kind: [] for kind in programs}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.turns):
            for kind, argv in programs.items():
                seconds = json.loads(run_process([sys.executable, *argv, SITES, options.rounds], cwd=Path(folder)).output)
                rounds[kind] += seconds
                print(f"{kind:8}", "  ".join(f"{s / SITES * 1e6:.0f}" for s in seconds), "µs a site", flush=True)
    for what, pick, kind, limit in (
        ("function form", median, "function", 200),
        ("function form, quickest round", min, "function", None),
        ("script form", median, "script", None),
    ):
        hanse, bare = (pick(rounds[one]) / SITES * 1e6 for one in (kind, "bare"))
        yield Claim(what=f"overhead: a site, {what}", hanse=f"{hanse:.0f} µs", bare=f"{bare:.0f} µs", figure=hanse, unit="µs", limit=limit)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--rounds", type=int, default=6, help="in each turn, after one that does not count")
    run(measure, options.parse_args())
