"""`silo`: a whole process that federates 8 sites is at most 1.3 × a bare PyTorch script's wall time, and 2 × its memory.

Both train the same model on the same batches in the same order, so their last models are compared too. Time and memory are measured in runs of
their own, since looking at memory takes time. Bare and Hanse take turns, and medians count.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from claims import Claim, parser, run
from processes import MIB, TreeMemory
from processes import run as run_process

from hanse.messages.codec import read

WORKLOADS = Path(__file__).parent / "workloads"
JOB = [sys.executable, WORKLOADS / "digits_job.py"]


def measure(options: Namespace) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = {
            "bare": [sys.executable, WORKLOADS / "digits_bare.py", folder / "bare.npz"],
            "hanse": JOB,
            "one worker": [*JOB, "1"],
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in programs}
        memory: dict[str, list[TreeMemory]] = {kind: [] for kind in programs}
        for repetition in range(-1, options.repetitions):
            for kind, argv in programs.items():
                finished = run_process(argv, cwd=folder)
                if repetition >= 0:  # the one before filled the page cache
                    seconds[kind].append(finished.wall_s)
            if repetition >= 0:
                print("  ".join(f"{kind} {seconds[kind][-1]:.2f} s" for kind in programs), flush=True)
        for _ in range(options.memory_repetitions):
            for kind, argv in programs.items():
                memory[kind].append(TreeMemory())
                run_process(argv, cwd=folder, watch=memory[kind][-1])

        bare_s, bare_pss = median(seconds["bare"]), median(m.pss for m in memory["bare"])
        for kind, label in (("hanse", ""), ("one worker", ", one worker")):
            wall_s, pss = median(seconds[kind]), median(m.pss for m in memory[kind])
            yield Claim(what=f"silo: wall time{label}", hanse=f"{wall_s:.2f} s", bare=f"{bare_s:.2f} s", figure=wall_s / bare_s, limit=1.3)
            yield Claim(
                what=f"silo: peak memory{label}", hanse=f"{pss / MIB:.0f} MiB", bare=f"{bare_pss / MIB:.0f} MiB", figure=pss / bare_pss, limit=2.0
            )  # fmt: skip
        rss, bare_rss = (median(m.rss for m in memory[kind]) for kind in ("hanse", "bare"))
        yield Claim(
            what="silo: the same, shared pages counted in each process", hanse=f"{rss / MIB:.0f} MiB", bare=f"{bare_rss / MIB:.0f} MiB", figure=rss / bare_rss
        )  # fmt: skip
        yield _same_model(folder)


def _same_model(folder: Path) -> Claim:
    """How far the last models are apart, and how well both do."""
    sys.path.insert(0, str(WORKLOADS))
    import torch  # after the timing: a large process forks slowly
    from digits import SITES, Net, accuracy, site_data

    mine, bare = read(sorted((folder / "runs").iterdir())[-1] / "model.safetensors")[0].params, dict(np.load(folder / "bare.npz"))
    assert mine.keys() == bare.keys()
    apart = max(float(np.abs(mine[name] - bare[name]).max()) for name in bare)

    def score(params: dict[str, np.ndarray]) -> float:
        net = Net()
        net.load_state_dict({name: torch.tensor(array) for name, array in params.items()})
        return float(np.mean([accuracy(net, *site_data(rank)[2:]) for rank in range(SITES)]))

    return Claim(
        what="silo: the same model, largest difference", hanse=f"accuracy {score(mine):.4f}", bare=f"accuracy {score(bare):.4f}", figure=apart, unit="", limit=1e-4
    )  # fmt: skip


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, default=7)
    options.add_argument("--memory-repetitions", type=int, default=3)
    run(measure, options.parse_args())
