"""`virtual`: 1,000,000 simulated sites, 1,000 a round, start and take memory within 10 % of what 10,000 sites do.

Sites are those of a virtual partition of 60,000 rows. Start-up goes from the line that makes the partition to the first task at a site;
memory is the peak of all processes together (PSS), report and all. The two take turns, each time in a new process; what counts is the
median of the turns' ratios.
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
from processes import MIB, TreeMemory
from processes import run as run_process

JOB = Path(__file__).parent / "workloads" / "virtual_job.py"
MANY, FEW = 1_000_000, 10_000


def measure(options: Namespace) -> Iterator[Claim]:
    starts: dict[int, list[float]] = {MANY: [], FEW: []}
    peaks: dict[int, list[float]] = {MANY: [], FEW: []}
    rounds: dict[int, list[float]] = {MANY: [], FEW: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for sites in (MANY, FEW) if turn % 2 else (FEW, MANY):
                memory = TreeMemory()
                found = json.loads(run_process([sys.executable, JOB, str(sites), options.rounds], cwd=Path(folder), watch=memory).output)
                starts[sites].append(found["start_s"])
                peaks[sites].append(memory.pss / MIB)
                rounds[sites].append(median(found["rounds_s"]))
                print(f"{sites:9,} sites  {found['start_s']:.3f} s to start  {peaks[sites][-1]:.0f} MiB", flush=True)
    for what, measured, limit, shown in (
        ("start-up", starts, 1.1, lambda value: f"{1e3 * value:.0f} ms"),
        ("peak memory", peaks, 1.1, lambda value: f"{value:.0f} MiB"),
        ("a round", rounds, None, lambda value: f"{1e3 * value:.0f} ms"),
    ):
        yield Claim(
            what=f"virtual: {what}, {MANY:,} sites beside {FEW:,}",
            hanse=shown(median(measured[MANY])),
            bare=shown(median(measured[FEW])),
            figure=ratio(measured[MANY], measured[FEW]),
            limit=limit,
        )


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=8)
    options.add_argument("--rounds", type=int, default=4)
    run(measure, options.parse_args())
