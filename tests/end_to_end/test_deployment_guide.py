"""The deployment guide, followed to the letter: four machines that are network namespaces, and a firewall between them.

The commands are those of docs/deployment.md. The firewall lets new connections to the server's port through and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hanse.messages.codec import read

GUIDE = Path(__file__).parents[2] / "docs" / "deployment.md"
HOST, PORT = "fl.example.org", 8443
MACHINES = ("server", "admin", "north", "south")
ADDRESS = {name: f"10.99.{i}.2" for i, name in enumerate(MACHINES)}
GATEWAY = {name: f"10.99.{i}.1" for i, name in enumerate(MACHINES)}
BLOCK = re.compile(r'^```sh title="(\w+)(: keeps running)?"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
WALL = f"""
table inet wall {{
    counter to_server {{ }}
    counter by_server {{ }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        ct state new ip saddr {ADDRESS["server"]} counter name by_server
        ct state new ip daddr {ADDRESS["server"]} tcp dport {PORT} counter name to_server accept
        reject with icmpx type admin-prohibited
    }}
}}
"""
LISTENER = """
import socket
with socket.create_server(("0.0.0.0", 4711)) as server:
    print("ready", flush=True)
    while True:
        server.accept()[0].close()
"""
PROBE = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20).close()
except OSError as error:
    sys.exit(f"no way: {error}")
"""


def needs() -> str | None:
    """What this machine lacks for network namespaces with a firewall; None if it has all."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "nft", "ss", "bwrap") if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)} (apt-get install iproute2 nftables bubblewrap)"
    return None


@dataclass(frozen=True)
class Network:
    """Machines by name, each with a folder to work in. namespace: what the names of their network namespaces begin with."""

    namespace: str
    homes: dict[str, Path]
    running: list[subprocess.Popen[str]]

    def command(self, machine: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", f"{self.namespace}-{machine}", *words]

    def run(self, machine: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(machine, *words), capture_output=True, text=True, timeout=60, check=False)

    def type(self, machine: str, text: str) -> str:
        """What these commands of a shell print. A shell's variables last: each machine has a file that collects `export` lines."""
        profile = self.homes[machine] / ".profile"
        script = f"[ ! -e {profile} ] || . {profile}\n{text}"
        done = subprocess.run(
            self.command(machine, "sh", "-euc", script), cwd=self.homes[machine], env=self._environment(machine),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"at {machine}:\n{text}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        with profile.open("a") as file:
            file.writelines(line + "\n" for line in text.splitlines() if line.startswith("export "))
        return done.stdout

    def keep_running(self, machine: str, *words: str) -> str:
        """Start this beside, and wait for the first line that it prints."""
        with (self.homes[machine] / "log").open("a") as log:
            process = subprocess.Popen(
                self.command(machine, *words), cwd=self.homes[machine], env=self._environment(machine),
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        self.running.append(process)
        assert process.stdout is not None
        return process.stdout.readline()

    def listening(self, machine: str) -> list[str]:
        """The addresses that something listens at, TCP and UDP."""
        return [line.split()[4] for line in self.run(machine, "ss", "-Htuln").stdout.splitlines()]

    def reaches(self, machine: str, address: str, port: int) -> str:
        """Nothing if it does; else why not."""
        return self.run(machine, sys.executable, "-c", PROBE, address, str(port)).stderr.strip()

    def counted(self, counter: str) -> int:
        """How many new connections the firewall has counted."""
        said = self.run("wall", "nft", "-j", "list", "counter", "inet", "wall", counter)
        return next(int(part["counter"]["packets"]) for part in json.loads(said.stdout)["nftables"] if "counter" in part)

    def logs(self) -> str:
        return "\n".join(f"log of {name}:\n{path.read_text()[-3000:]}" for name in MACHINES if (path := self.homes[name] / "log").exists())

    def _environment(self, machine: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        plain = {"HOME": str(self.homes[machine]), "PATH": path, "LANG": "C.UTF-8", "NO_COLOR": "1", "TERM": "dumb"}
        return plain | {name: value for name, value in os.environ.items() if name in ("PYTHONPATH", "VIRTUAL_ENV")}


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Four machines, each on a wire of its own to a fifth, `wall`, which routes and filters."""
    if (lacking := needs()) is not None:
        pytest.skip(lacking)
    prefix = f"hanse{os.getpid()}"
    network = Network(prefix, {name: tmp_path / name for name in MACHINES}, [])
    names = {name: Path("/etc/netns") / f"{prefix}-{name}" for name in MACHINES}
    try:
        try:
            ip("netns", "add", f"{prefix}-wall")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        for name in MACHINES:
            network.homes[name].mkdir()
            names[name].mkdir(parents=True)
            (names[name] / "hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS['server']} {HOST}\n")
            (names[name] / "resolv.conf").write_text("# no name server: the file of hosts knows all names\n")
            machine = f"{prefix}-{name}"
            ip("netns", "add", machine)
            ip("-n", f"{prefix}-wall", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", machine)
            ip("-n", f"{prefix}-wall", "addr", "add", f"{GATEWAY[name]}/24", "dev", f"to-{name}")
            ip("-n", f"{prefix}-wall", "link", "set", f"to-{name}", "up")
            ip("-n", machine, "addr", "add", f"{ADDRESS[name]}/24", "dev", "eth0")
            ip("-n", machine, "link", "set", "lo", "up")
            ip("-n", machine, "link", "set", "eth0", "up")
            ip("-n", machine, "route", "add", "default", "via", GATEWAY[name])
        rules = tmp_path / "wall.nft"
        rules.write_text(WALL)
        made = network.run("wall", "sh", "-euc", f"nft -f {rules}; echo 1 > /proc/sys/net/ipv4/ip_forward")
        assert made.returncode == 0, made.stderr
        yield network
    finally:
        for process in network.running:
            process.send_signal(signal.SIGTERM)
        for process in network.running:
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        for name in ("wall", *MACHINES):
            subprocess.run(["ip", "netns", "delete", f"{prefix}-{name}"], capture_output=True, timeout=20, check=False)
        for folder in names.values():
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another's are in it
            Path("/etc/netns").rmdir()


def carry(network: Network, machine: str) -> None:
    """What the guide leaves to people: bring a machine's archive from the admin's."""
    archive = network.homes["admin"] / f"{machine}.tgz"
    target = network.homes[machine] / archive.name
    if archive.exists() and not target.exists():
        shutil.copy(archive, target)


def test_the_guide_alone_makes_a_federation_that_runs_a_job(network: Network) -> None:
    blocks = BLOCK.findall(GUIDE.read_text("utf-8"))
    assert {machine for machine, _, _ in blocks} == set(MACHINES)
    printed = ""
    for machine, keeps_running, text in blocks:
        carry(network, machine)
        if keeps_running:
            said = network.keep_running(machine, *text.split())
            assert said.startswith("ready"), f"at {machine}: {said}\n{network.logs()}"
        else:
            printed += network.type(machine, text)

    home = network.homes
    for site in ("north", "south"):
        assert re.search(rf"^{site} +\w+ Clinic +connected ", printed, re.MULTILINE), printed
        assert not (home[site] / "study").exists()
    assert "line-0001\n" in printed
    assert "runs/line-001\n" in printed
    assert re.search(r"audit\.jsonl: \d+ lines, all in place and unaltered", printed)
    assert '"sandbox":true' in (home["north"] / "north" / "state" / "audit.jsonl").read_text()
    run = home["admin"] / "runs" / "line-001"
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    model, _ = read(run / "model.safetensors")
    x, y = [1, 2, 3, 4, 5, 6, 7], [3.1, 5.9, 9.2, 11.8, 15.2, 17.9, 20.8]
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    assert model.params["slope"] == pytest.approx([slope], rel=0.02)

    assert network.listening("server") != []
    assert [network.listening(machine) for machine in ("north", "south", "admin")] == [[], [], []]
    assert network.counted("to_server") > 0
    assert network.counted("by_server") == 0, "the server tried to open a connection"

    for machine in ("north", "south", "server"):
        assert network.keep_running(machine, sys.executable, "-c", LISTENER) == "ready\n"
        assert network.reaches(machine, ADDRESS[machine], 4711) == ""
    assert network.reaches("north", ADDRESS["server"], PORT) == ""
    for machine, other in [("north", "south"), ("south", "north"), ("server", "north"), ("admin", "south"), ("north", "server")]:
        assert network.reaches(machine, ADDRESS[other], 4711).startswith("no way"), f"{machine} reaches {other}"
    assert network.counted("by_server") == 1, "the firewall would have counted"
