"""What the benchmarks of real federations share: certificates for a bare program, and the memory of each part of a federation."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from processes import _fields, _tree

from hanse.identity.authority import Authority, new_key, request
from hanse.identity.certificates import Credentials, Identity, Role

RAW = Path(__file__).parent / "workloads" / "raw_grpc.py"
PARTS = {  # by what stands in the command line
    "hanse.environments.member server": "server",
    "hanse.server.job_process": "server",
    "hanse.environments.member site": "agent",
    "hanse.site.trainer": "training",
}


def write_credentials(folder: Path, sites: int) -> None:
    """`folder/server` and `folder/site-1` and so on: a key, a certificate and the root each, of EC P-256 as Hanse's are."""
    root = Authority.new_root("benchmark")
    names = {"server": Role.SERVER} | {f"site-{number}": Role.SITE for number in range(1, sites + 1)}
    for name, role in names.items():
        key = new_key()
        addresses = ["localhost", "127.0.0.1"] if role is Role.SERVER else []
        certificate = root.issue(Identity("benchmark", role, name, "benchmark"), request(key), days=1, addresses=addresses)
        Credentials(key, certificate, root.roots).save(folder / name)


class PartsMemory:
    """The peak memory of a federation's parts, in bytes: of the server's processes together, of the largest agent, of the largest training
    process. anonymous: what was allocated, shared memory without a file included; resident: with the files that are mapped."""

    def __init__(self) -> None:
        self.anonymous: dict[str, int] = defaultdict(int)
        self.resident: dict[str, int] = defaultdict(int)

    def __call__(self, pid: int) -> None:
        anonymous: dict[str, list[int]] = defaultdict(list)
        resident: dict[str, list[int]] = defaultdict(list)
        for part, member in parts_of(pid):
            with suppress(OSError, KeyError):
                sizes = _fields(Path(f"/proc/{member}/status"))
                anonymous[part].append(sizes["RssAnon"] + sizes["RssShmem"])
                resident[part].append(sizes["VmRSS"])
        for part in anonymous:
            together = sum if part == "server" else max
            self.anonymous[part] = max(self.anonymous[part], together(anonymous[part]))
            self.resident[part] = max(self.resident[part], together(resident[part]))


def parts_of(pid: int) -> Iterator[tuple[str, int]]:
    """The processes of the federation below a process, each with its part."""
    for member in _tree(pid):
        with suppress(OSError):
            line = Path(f"/proc/{member}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            part = next((part for words, part in PARTS.items() if words in line), None)
            if part is not None and "bwrap" not in line.partition(" ")[0]:
                yield part, member


def raw_rounds(folder: Path, sites: int, mib: int, rounds: int) -> list[float]:
    """The seconds of each round but the first of plain gRPC streams that carry the same bytes."""
    server = subprocess.Popen(
        [sys.executable, RAW, "server", folder / "server", str(sites), str(mib), str(rounds + 1)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    others = [
        subprocess.Popen([sys.executable, RAW, "site", folder / f"site-{number}", port, str(mib), str(rounds + 1)])
        for number in range(1, sites + 1)
    ]
    output = server.stdout.read()
    for process in (server, *others):
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    seconds: list[float] = [float(each) for each in output.strip()[1:-1].split(",")]
    return seconds[1:]
