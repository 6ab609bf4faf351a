"""All benchmarks of a group, one after the other, and one table at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from claims import Claim, machine, parser, table

HERE = Path(__file__).parent
GROUPS = {
    "runtime": ("silo", "device", "tiny", "sum", "robust", "overhead", "import_time", "transport", "latency", "idle", "poc", "virtual"),
    "finetuning": ("finetuning/gate", "finetuning/latency", "finetuning/serving", "finetuning/modes", "finetuning/new_class"),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("group", nargs="?", default="runtime", choices=GROUPS)
    options = arguments.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        results = options.results or Path(folder) / "results.jsonl"
        for name in GROUPS[options.group]:
            print(f"── {name}", flush=True)
            if subprocess.run([sys.executable, HERE / f"{name}.py", "--results", results]).returncode:
                failed.append(name)
        claims = [Claim(**json.loads(line)) for line in results.read_text().splitlines()]
    print(f"{machine()}\n\n{table(claims)}")
    if failed:
        sys.exit(f"\ncould not be measured: {', '.join(failed)}")
    sys.exit(options.strict and any(claim.missed for claim in claims))


if __name__ == "__main__":
    main()
