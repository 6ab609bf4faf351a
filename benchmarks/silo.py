"""`silo`: a whole process that federates 8 sites is at most 1.3 × a bare PyTorch script's wall time, and 2 × its memory.

Both train the same model on the same batches in the same order, so their last models are compared too. They take turns, and medians
count. Memory is that of the process tree, each shared page counted once (PSS), since that is what the machine has to give; it is measured
in runs of its own, as looking at it takes time. Hanse runs as a user starts it, with a worker for each core, and once more with a single
worker, which computes with as many threads as the bare script: one.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from claims import Claim, parser, ratio, run
from processes import MIB, Finished, TreeMemory
from processes import run as run_process

from hanse.messages.codec import read

WORKLOADS = Path(__file__).parent / "workloads"
BARE, HANSE, ONE_WORKER = "bare", "hanse", "hanse, one worker"


def measure(options: Namespace) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = {
            BARE: [sys.executable, WORKLOADS / "digits_bare.py", folder / "bare.npz"],
            HANSE: [sys.executable, WORKLOADS / "digits_job.py"],
            ONE_WORKER: [sys.executable, WORKLOADS / "digits_job.py", "1"],
        }
        timed: dict[str, list[Finished]] = {kind: [] for kind in programs}
        for turn in range(-1, options.repetitions):  # the first fills the page cache and does not count
            for kind, argv in programs.items():
                finished = run_process(argv, cwd=folder)
                if turn >= 0:
                    timed[kind].append(finished)
            if turn >= 0:
                print("   ".join(f"{kind} {timed[kind][-1].wall_s:.2f} s" for kind in programs), flush=True)
        held: dict[str, list[TreeMemory]] = {kind: [] for kind in programs}
        for _ in range(options.memory_repetitions):
            for kind, argv in programs.items():
                held[kind].append(TreeMemory())
                run_process(argv, cwd=folder, watch=held[kind][-1])

        yield from _compare("silo: wall time", {kind: [one.wall_s for one in runs] for kind, runs in timed.items()}, "s", 1.3)
        yield from _compare("silo: peak memory", {kind: [one.pss / MIB for one in runs] for kind, runs in held.items()}, "MiB", 2.0)
        yield from _compare("silo: CPU time", {kind: [one.cpu_s for one in runs] for kind, runs in timed.items()}, "s")
        yield from _compare("silo: peak memory as RSS", {kind: [one.rss / MIB for one in runs] for kind, runs in held.items()}, "MiB")
        yield _same_model(folder)


def _compare(what: str, values: Mapping[str, Sequence[float]], unit: str, limit: float | None = None) -> Iterator[Claim]:
    texts = {kind: f"{median(all):.2f} {unit}" if unit == "s" else f"{median(all):.0f} {unit}" for kind, all in values.items()}
    for kind in (HANSE, ONE_WORKER):
        label = what + kind.removeprefix(HANSE)
        yield Claim(what=label, hanse=texts[kind], bare=texts[BARE], figure=ratio(values[kind], values[BARE]), limit=limit)


def _same_model(folder: Path) -> Claim:
    """How far the last models are apart, and how well both do on the images held out."""
    sys.path.insert(0, str(WORKLOADS))
    import torch  # after the timing, since a large process forks slowly
    from digits import SITES, Net, accuracy, site_data

    def score(params: Mapping[str, np.ndarray]) -> str:
        net = Net()
        net.load_state_dict({name: torch.tensor(array) for name, array in params.items()})
        return f"accuracy {np.mean([accuracy(net, *site_data(rank)[2:]) for rank in range(SITES)]):.4f}"

    last_run = max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    mine, bare = read(last_run / "model.safetensors")[0].params, dict(np.load(folder / "bare.npz"))
    apart = max(float(np.abs(mine[name] - array).max()) for name, array in bare.items())
    return Claim(what="silo: largest difference of the models", hanse=score(mine), bare=score(bare), figure=apart, unit="", limit=1e-5)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, default=7)
    options.add_argument("--memory-repetitions", type=int, default=3)
    run(measure, options.parse_args())
