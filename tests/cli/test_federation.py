"""A federation made by hand, command by command, as its people do it on their machines: provision, join, start, and shut out."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from hanse.identity.certificates import Credentials
from hanse.sandbox import Sandbox

NO_SANDBOX = Sandbox().problem()

pytestmark = pytest.mark.skipif(NO_SANDBOX is not None, reason=f"server and sites run jobs in a sandbox: {NO_SANDBOX}")

Hanse = Callable[..., subprocess.CompletedProcess[str]]


class Service:
    """`hanse server start` or `hanse site start`, ready."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "hanse.cli.main", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    def end(self, by: int = signal.SIGINT) -> tuple[int, str]:
        """Its exit status after that signal, and its log."""
        self.process.send_signal(by)
        _, log = self.process.communicate(timeout=60)
        return self.process.returncode, log


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, hanse: Hanse) -> Path:
    """The folder that `hanse provision` made of the example, changed to be on this machine."""
    folder = tmp_path_factory.mktemp("study")
    project = yaml.safe_load(hanse("provision", "--example").stdout)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        project["server"] |= {"addresses": ["localhost", "127.0.0.1"], "port": probe.getsockname()[1]}
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    made = hanse("provision", "project.yaml", "--folder", "made", cwd=folder)
    assert (made.returncode, made.stderr.partition(" ")[0]) == (0, "Hand")
    assert {"made/authority", "made/server", "made/admins/ada@example.org", "made/sites/north"} <= set(made.stdout.splitlines())
    return folder / "made"


@pytest.fixture(scope="module")
def server(study: Path) -> Iterator[Service]:
    service = Service("server", "start", study / "server")
    yield service
    status, log = service.end()
    assert status == 0, log
    assert "Traceback" not in log


@pytest.fixture
def ada(hanse: Hanse, study: Path) -> Hanse:
    """The command with the kit of the project admin."""
    return lambda *arguments: hanse(*arguments, "--kit", study / "admins" / "ada@example.org")


def test_provisioning_again_changes_nothing(hanse: Hanse, study: Path) -> None:
    before = (study / "server" / "kit.yaml").read_bytes()
    again = hanse("provision", study.parent / "project.yaml", "--folder", study)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "everybody has a folder already\n")
    assert (study / "server" / "kit.yaml").read_bytes() == before


def test_a_site_joins_trains_and_is_shut_out(hanse: Hanse, ada: Hanse, server: Service, study: Path, job: Callable[..., Path]) -> None:
    address = server.said.removeprefix("ready on ").strip()
    north = study / "sites" / "north"
    joined = hanse("site", "join", ".", "--token", "join.token", "--server", address, cwd=north)
    assert (joined.returncode, joined.stderr) == (0, "")
    assert joined.stdout.startswith("north has joined lung-study. Look through ")
    agent = Service("site", "start", north)
    assert agent.said == "ready\n"
    assert re.search(r"north +North Clinic +connected ", ada("site", "list").stdout)
    assert json.loads(ada("site", "show", "north", "--json").stdout)["connected"] is True
    assert re.search(r"state +connected", ada("site", "show", "north").stdout)
    submitted = ada("job", "submit", job("a"), "-f")
    assert (submitted.returncode, submitted.stderr) == (0, "")

    assert ada("site", "disable", "north").stdout == "north is disabled\n"
    assert re.search(r"away, disabled", ada("site", "list").stdout)
    assert ada("site", "enable", "north").stdout == "north is enabled\n"

    revoked = ada("revoke", "north")
    assert revoked.stdout == "north is revoked\n"
    assert "revoked" in ada("site", "list").stdout
    status, log = agent.end()
    assert status == 0, log
    refused = hanse("site", "join", study / "again", "--token", north / "join.token")
    assert refused.returncode == 1
    assert re.search(r"^error: .*(revoked|used)", refused.stderr)


def test_a_token_is_good_once(hanse: Hanse, ada: Hanse, server: Service, tmp_path: Path) -> None:
    made = ada("token", "west", "--organisation", "West Clinic", "--hours", "1")
    token = made.stdout.strip()
    assert (made.returncode, token.partition("-1.")[0]) == (0, "hanse-join")
    joined = hanse("site", "join", "--token", token, cwd=tmp_path)
    assert joined.returncode == 0, joined.stderr
    assert Credentials.load(tmp_path / "west" / "credentials").identity.organisation == "West Clinic"
    again = hanse("site", "join", "again", "--token", token, cwd=tmp_path)
    assert again.returncode == 1
    assert "used" in again.stderr
    assert json.loads(ada("token", "east", "--organisation", "East Clinic", "--json").stdout).keys() == {"token"}


@pytest.mark.parametrize("person", ["dan@example.org", "cleo@example.org"])
def test_who_may_not(hanse: Hanse, server: Service, study: Path, person: str) -> None:
    kit = study / "admins" / person
    assert hanse("site", "list", "--kit", kit).returncode == 0
    refused = hanse("revoke", "south", "--kit", kit)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "may not call 'revoke'" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["provision"], 2, "error: which project?"),
        (["provision", "nowhere.yaml"], 2, "error: nowhere.yaml cannot be read"),
        (["server", "start", "nowhere"], 2, "nowhere is no kit"),
        (["server", "start", "{study}/admins/ada@example.org"], 2, "is the kit of a project-admin"),
        (["site", "start", "nowhere"], 2, "nowhere is no kit"),
        (["site", "join"], 2, "Missing option '--token'"),
        (["site", "join", "--token", "nonsense"], 1, "error: "),
        (["site", "show", "atlantis", "--kit", "{study}/admins/ada@example.org"], 1, "there is no site 'atlantis'"),
        (["revoke", "ada@example.org", "--kit", "{study}/admins/ada@example.org"], 1, "nobody revokes their own certificates"),
        (["token", "x", "--organisation", "X", "--hours", "0", "--kit", "{study}"], 2, "Invalid value for '--hours'"),
    ],
    ids=str,
)
def test_wrong_input(hanse: Hanse, server: Service, study: Path, tmp_path: Path, arguments: list[str], status: int, says: str) -> None:
    done = hanse(*(argument.format(study=study) for argument in arguments), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_no_server(hanse: Hanse, study: Path, tmp_path: Path) -> None:
    """Nobody listens at the address in this kit."""
    kit = tmp_path / "kit"
    source = study / "admins" / "ada@example.org"
    (kit / "credentials").mkdir(parents=True)
    for path in (source / "credentials").iterdir():
        (kit / "credentials" / path.name).write_bytes(path.read_bytes())
    (kit / "kit.yaml").write_text(re.sub(r"server: .*", "server: localhost:1", (source / "kit.yaml").read_text()))
    done = hanse("site", "list", "--kit", kit)
    assert done.returncode == 1
    assert done.stderr.startswith("error: localhost:1: ")
    assert "No server listens there" in done.stderr
