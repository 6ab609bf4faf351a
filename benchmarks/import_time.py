"""`import hanse`, `hanse --help` and `import hanse.client` each cost under 0.3 s of CPU time.

User and system time of a whole process, in which everything takes its turn; medians count. Beside them, what Python alone takes, and NumPy.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from claims import Claim, parser, run
from processes import run as run_process

HANSE = Path(sys.executable).with_name("hanse")
PROGRAMS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import numpy": [sys.executable, "-c", "import numpy"],
    "import hanse": [sys.executable, "-c", "import hanse"],
    "hanse --help": [HANSE, "--help"],
    "import hanse.client": [sys.executable, "-c", "import hanse.client"],
    "from hanse import FedAvgRecipe, SimEnv": [sys.executable, "-c", "from hanse import FedAvgRecipe, SimEnv"],
}
JUDGED = ("import hanse", "hanse --help", "import hanse.client")


def measure(options: Namespace) -> Iterator[Claim]:
    seconds: dict[str, list[float]] = {what: [] for what in PROGRAMS}
    for turn in range(-1, options.repetitions):  # the first fills the page cache and writes bytecode
        for what, argv in PROGRAMS.items():
            cpu_s = run_process(argv).cpu_s
            if turn >= 0:
                seconds[what].append(cpu_s)
    python_s = median(seconds["python -c pass"])
    for what in list(PROGRAMS)[1:]:
        cpu_s = median(seconds[what])
        limit = 0.3 if what in JUDGED else None
        yield Claim(what=f"CPU time: {what}", hanse=f"{cpu_s:.3f} s", bare=f"{python_s:.3f} s", figure=cpu_s, unit="s", limit=limit)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, default=10)
    run(measure, options.parse_args())
