"""`poc`: the job of `silo` end to end in a federation of real processes: at most 2.5 × the bare script plus 8 starts of Python with torch.

`PocEnv` makes an authority, starts a server and 8 agents, which make keys and join, and each agent starts Python with torch to train. The
8 bare starts run at the same time, as those of Hanse do. All take turns, and medians count.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from claims import Claim, parser, ratio, run
from processes import run as run_process

WORKLOADS = Path(__file__).parent / "workloads"
SITES = 8


def measure(options: Namespace) -> Iterator[Claim]:
    bare, starts, hanse = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for turn in range(-1, options.repetitions):  # the first fills the page cache and does not count
            script = run_process([sys.executable, WORKLOADS / "digits_bare.py", folder / "bare.npz"], cwd=folder).wall_s
            start = _starts()
            job = run_process([sys.executable, WORKLOADS / "digits_job.py", "poc"], cwd=folder).wall_s
            if turn >= 0:
                bare.append(script)
                starts.append(start)
                hanse.append(job)
                print(f"bare {script:.2f} s   {SITES} starts {start:.2f} s   hanse {job:.2f} s", flush=True)
    both = [one + other for one, other in zip(bare, starts, strict=True)]
    yield Claim(what="poc: wall time", hanse=f"{median(hanse):.2f} s", bare=f"{median(both):.2f} s", figure=ratio(hanse, both), limit=2.5)


def _starts() -> float:
    began = time.perf_counter()
    processes = [subprocess.Popen([sys.executable, "-c", "import torch"]) for _ in range(SITES)]
    for process in processes:
        process.wait()
    return time.perf_counter() - began


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, default=3)
    run(measure, options.parse_args())
