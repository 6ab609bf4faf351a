"""`sum`: the weighted mean of 8 mapped updates of 1 GiB float32 runs at 0.8 or more of `torch.add_`'s bandwidth, in 1.2 × a model's memory.

Each measurement is a process of its own, so neither finds the other's mappings or memory: map the files (they lie in the page cache),
take fresh memory for the sum, add one file after the other. Bandwidth counts three bytes for each byte of an update: it is read, and the
sum is read and written. Memory is the peak of anonymous memory of the whole process, so without the mapped files.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from claims import Claim, parser, ratio, run
from processes import MIB, AnonymousMemory
from processes import run as run_process

from hanse import FLModel
from hanse.messages.codec import write

PROGRAM = Path(__file__).parent / "workloads" / "weighted_sum.py"
TENSORS, THREADS = 64, (1, 2)


def measure(options: Namespace) -> Iterator[Claim]:
    elements = int(options.gib * (1 << 30)) // 4 // TENSORS
    model_bytes = elements * TENSORS * 4
    moved_gb = 3 * options.updates * model_bytes / 1e9
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for number in range(options.updates):
            tensor = np.full(elements, number + 1, np.float32)
            write(Path(name) / f"site-{number}.safetensors", FLModel(params={f"layer.{k}": tensor for k in range(TENSORS)}))
        seconds: dict[tuple[str, int], list[list[float]]] = {}
        peaks: dict[tuple[str, int], list[int]] = {}
        for turn in range(options.repetitions):
            for threads in THREADS:
                for kind in sorted(("hanse", "torch"), reverse=turn % 2 == 1):
                    memory = AnonymousMemory()
                    output = run_process([sys.executable, PROGRAM, kind, threads, name], watch=memory).output
                    seconds.setdefault((kind, threads), []).append(json.loads(output))
                    peaks.setdefault((kind, threads), []).append(memory.peak)
                    print(f"{kind} {threads} threads: {seconds[kind, threads][-1][0]:.2f} s, {memory.peak / MIB:.0f} MiB", flush=True)
    for threads in THREADS:
        mine = [moved_gb / whole for (whole,) in seconds["hanse", threads]]
        bare, again = ([moved_gb / times[which] for times in seconds["torch", threads]] for which in (0, 1))
        what = f"sum: GB/s, {threads} thread{'s' if threads > 1 else ''}"
        yield Claim(what=what, hanse=f"{median(mine):.1f}", bare=f"{median(bare):.1f}", figure=ratio(mine, bare), limit=0.8, at_least=True)
        what += ", bare in memory that is there already"
        yield Claim(what=what, hanse=f"{median(mine):.1f}", bare=f"{median(again):.1f}", figure=ratio(mine, again))
    mine_bytes, torch_bytes = (max(max(peaks[kind, threads]) for threads in THREADS) for kind in ("hanse", "torch"))
    what = f"sum: peak anonymous memory ÷ {model_bytes / MIB:.0f} MiB"
    yield Claim(what=what, hanse=_mib(mine_bytes), bare=_mib(torch_bytes), figure=mine_bytes / model_bytes, limit=1.2)


def _mib(size: float) -> str:
    return f"{size / MIB:.0f} MiB"


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--gib", type=float, default=1.0, help="size of one update; the targets are for 1")
    options.add_argument("--updates", type=int, default=8)
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--folder", type=Path, help="where the files are written, and deleted at the end")
    run(measure, options.parse_args())
