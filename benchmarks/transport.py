"""`transport`: large models over mutual TLS between real processes: time beside raw gRPC streams, and memory of each part.

A round of Hanse goes from commit to commit: the model goes down to every site, each adds a constant, the updates come up, are stored,
checked, averaged and committed. The raw streams carry the same bytes with the same TLS and drop them. They take turns.
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
from federation import PartsMemory, raw_rounds, write_credentials
from processes import MIB
from processes import run as run_process

JOB = Path(__file__).parent / "workloads" / "transport_job.py"
LIMITS = {"server": 1.3, "training": 2.2}  # × the model
AGENT_MIB = 128


def measure(options: Namespace) -> Iterator[Claim]:
    for mib, sites in options.sizes:
        yield from _measure(mib, sites, options.rounds)


def _measure(mib: int, sites: int, rounds: int) -> Iterator[Claim]:
    what = f"transport, {sites} sites, {mib} MiB"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_credentials(folder, sites)
        raw = raw_rounds(folder, sites, mib, rounds)
        memory = PartsMemory()
        finished = run_process([sys.executable, JOB, str(mib), str(sites), str(rounds)], cwd=folder, watch=memory)
        raw += raw_rounds(folder, sites, mib, rounds)
    hanse = json.loads(finished.output)
    print(f"{what}: hanse {_seconds(hanse)}   raw {_seconds(raw)}", flush=True)
    yield Claim(
        what=f"{what}: a round", hanse=f"{median(hanse):.2f} s", bare=f"{median(raw):.2f} s", figure=median(hanse) / median(raw), limit=1.6
    )
    for part, limit in LIMITS.items():
        held = memory.anonymous[part] / MIB
        yield Claim(
            what=f"{what}: memory, {part}", hanse=f"{held:.0f} MiB", bare=f"{mib} MiB", figure=held / mib,
            limit=limit if mib >= 256 else None,
        )  # fmt: skip
    agent = memory.anonymous["agent"] / MIB
    yield Claim(what=f"{what}: memory, an agent", hanse=f"{agent:.0f} MiB", bare="", unit="MiB", figure=agent, limit=AGENT_MIB)
    resident = memory.resident["agent"] / MIB
    yield Claim(what=f"{what}: the same with its libraries", hanse=f"{resident:.0f} MiB", bare="", unit="MiB", figure=resident)


def _seconds(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values) + " s"


def _size(text: str) -> tuple[int, int]:
    mib, _, sites = text.partition("x")
    return int(mib), int(sites)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="that count, after one that does not")
    options.add_argument("--sizes", type=_size, nargs="+", default=[(1024, 2), (256, 2), (256, 8)], help="MiB x sites, such as 4096x2")
    run(measure, options.parse_args())
