"""`latency`: over mutual TLS between real processes, an empty round of 2 sites takes at most 10 ms and a two-party exchange 5 ms.

A round goes from commit to commit. An exchange carries a tensor of 242 kB to one site and another one back, as a gradient exchange does.
Beside them: the same bytes to and fro over plain gRPC streams with the same TLS. They take turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

from claims import Claim, parser, run
from federation import write_credentials
from processes import run as run_process

WORKLOADS = Path(__file__).parent / "workloads"
JOB, RAW = WORKLOADS / "latency_job.py", WORKLOADS / "raw_exchange.py"
EXCHANGE_BYTES, EMPTY_BYTES = 242_000, 400  # an empty task's frame
ROUND_MS, EXCHANGE_MS = 10, 5


def measure(options: Namespace) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_credentials(folder, 2)
        for what, job, sites, size, limit in (
            ("latency: an empty round, 2 sites", ["rounds"], 2, EMPTY_BYTES, ROUND_MS),
            ("latency: an exchange of 242 kB each way", ["exchanges"], 1, EXCHANGE_BYTES, EXCHANGE_MS),
        ):
            hanse: list[float] = []
            raw: list[float] = []
            for _ in range(options.turns):
                raw += _raw(folder, sites, size, options.count)
                arguments = [*job, options.count, *([size] if sites == 1 else [])]
                hanse += json.loads(run_process([sys.executable, JOB, *arguments], cwd=folder).output)
            print(f"{what}: hanse {_milliseconds(hanse)}   raw {_milliseconds(raw)}", flush=True)
            yield Claim(
                what=what, hanse=f"{median(hanse) * 1e3:.2f} ms", bare=f"{median(raw) * 1e3:.2f} ms", figure=median(hanse) * 1e3,
                unit="ms", limit=limit,
            )  # fmt: skip


def _raw(folder: Path, sites: int, size: int, count: int) -> list[float]:
    server = subprocess.Popen(
        [sys.executable, RAW, "server", folder / "server", str(sites), str(size), str(count)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    others = [subprocess.Popen([sys.executable, RAW, "site", folder / f"site-{number}", port]) for number in range(1, sites + 1)]
    seconds: list[float] = json.loads(server.stdout.read())
    for process in (server, *others):
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return seconds


def _milliseconds(seconds: list[float]) -> str:
    tenths = quantiles(seconds, n=10)
    return f"{median(seconds) * 1e3:.2f} ms (one tenth below {tenths[0] * 1e3:.2f}, one above {tenths[-1] * 1e3:.2f})"


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=2)
    options.add_argument("--count", type=int, default=200, help="rounds or exchanges in each turn")
    run(measure, options.parse_args())
