"""`median` and `krum`: of 32 mapped updates of 64 MiB float32, at least 3 × the bandwidth of `np.median`, in one model's memory and blocks.

Each measurement is a process of its own, with as many threads as there are cores; `np.median` has no use for more than one. The files lie
in the page cache. Bandwidth is that of the updates, each read once. NumPy gets its array of all updates, tensor by tensor, before the clock
starts. Memory is the peak of anonymous memory, so without the mapped files, less that of a process that only loads and maps the same.
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

PROGRAM = Path(__file__).parent / "workloads" / "robust.py"
KINDS = ("idle", "numpy", "median", "krum")
TENSORS = 8


def measure(options: Namespace) -> Iterator[Claim]:
    elements = int(options.mib * MIB) // 4 // TENSORS
    model_bytes = elements * TENSORS * 4
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for number in range(options.updates):
            rng = np.random.default_rng(number)
            params = {f"layer.{k}": rng.standard_normal(elements, np.float32) for k in range(TENSORS)}
            write(Path(name) / f"site-{number:03}.safetensors", FLModel(params=params))
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        peaks: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for _ in range(options.repetitions):
            for kind in KINDS:
                memory = AnonymousMemory()
                seconds[kind].append(json.loads(run_process([sys.executable, PROGRAM, kind, name], watch=memory).output))
                peaks[kind].append(memory.peak)
                print(f"{kind}: {seconds[kind][-1]:.2f} s, {memory.peak / MIB:.0f} MiB", flush=True)
    speeds = {kind: [options.updates * model_bytes / 1e9 / each for each in seconds[kind]] for kind in KINDS if kind != "idle"}
    for kind in ("median", "krum"):
        mine, bare = speeds[kind], speeds["numpy"]
        yield Claim(
            what=f"{kind}: GB/s of {options.updates} updates of {model_bytes / MIB:.0f} MiB",
            hanse=f"{median(mine):.2f}", bare=f"{median(bare):.2f}", figure=ratio(mine, bare), limit=3, at_least=True,
        )  # fmt: skip
        more, numpy_more = (max(peaks[which]) - min(peaks["idle"]) for which in (kind, "numpy"))
        yield Claim(
            what=f"{kind}: anonymous memory ÷ one model",
            hanse=f"{more / MIB:.0f} MiB", bare=f"{numpy_more / MIB:.0f} MiB", figure=more / model_bytes, limit=1.25,
        )  # fmt: skip


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--mib", type=float, default=64.0, help="size of one update; the targets are for 64")
    options.add_argument("--updates", type=int, default=32)
    options.add_argument("--repetitions", type=int, default=3)
    options.add_argument("--folder", type=Path, help="where the files are written, and deleted at the end")
    run(measure, options.parse_args())
