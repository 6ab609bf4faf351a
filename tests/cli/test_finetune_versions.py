from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hanse.cli.finetune import project as project_commands
from hanse.cli.finetune import versions as version_commands
from hanse.errors import ConfigError, IdentityError, Refused
from hanse.finetuning.contract import read_project
from hanse.finetuning.models import load_module, params_of
from hanse.identity.certificates import Role
from hanse.messages.codec import write
from hanse.messages.flmodel import FLModel
from hanse.provision.kits import provision
from hanse.provision.project import Admin, Project, Server

Run = Callable[..., str]
FLAGS = ["--name", "line-3", "--vendor", "acme=Acme Vision", "--clients", "north=North Clinic", "--shape", "8x8x1", "--slices", "device"]


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of startup kits: vera of the vendor, clara of the client."""
    folder = tmp_path_factory.mktemp("federation") / "study"
    people = {"vera": "Acme Vision", "clara": "North Clinic"}
    admins = [Admin(name=name, organisation=organisation, role=Role.RESEARCHER) for name, organisation in people.items()]
    provision(Project(federation="study", server=Server(organisation="Acme Vision", addresses=["localhost"]), admins=admins), folder)
    return folder / "admins"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command, raises what it raises, and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, typed: str | None = None) -> str:
        of_project = arguments[0] in ("init", "invite", "status", "history")
        app = project_commands.app if of_project else version_commands.app
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


@pytest.fixture
def vendor(run: Run, tmp_path: Path) -> Path:
    """The vendor's project folder, with a first version."""
    run("init", "p", *FLAGS)
    write(tmp_path / "w.safetensors", FLModel(params_of(load_module(tmp_path / "p", read_project(tmp_path / "p").model))))
    run("versions", "add", "--weights", "w.safetensors", "--threshold", 0.4, "--notes", "as it ships", "--project", "p")
    return tmp_path / "p"


def listed(run: Run, folder: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("versions", "list", "--project", folder, "--json"))
    return found


def test_two_parties_by_commands_alone(run: Run, vendor: Path, kits: Path, tmp_path: Path) -> None:
    run("invite", "north", "--kit", kits / "vera", "--project", "p")
    (base,) = listed(run, "north")
    assert (base["deployed"], base["threshold"], base["notes"], base["decisions"]) == (True, 0.4, "as it ships", {"acme": "approve"})
    assert json.loads(run("status", "--project", "north", "--json"))["state"] == "draft"

    child = run("versions", "add", "--parent", "current", "--threshold", 0.6, "--project", "p").strip()
    with pytest.raises(ConfigError, match="an approval must say why"):
        run("approve", child[7:15], "--kit", kits / "vera", "--project", "p")
    with pytest.raises(IdentityError, match="cannot sign for the vendor"):
        run("approve", child[7:15], "--kit", kits / "clara", "--why", "x", "--project", "p")
    run("approve", child[7:15], "--kit", kits / "vera", "--why", "the threshold of a new holdout", "--project", "p")
    run("versions", "export", child[7:15], "v.zip", "--project", "p")

    assert run("versions", "import", "v.zip", "--kit", kits / "clara", "--project", "north").strip() == child
    with pytest.raises(Refused, match="the client north has not accepted it"):
        run("deploy", child, "--kit", kits / "clara", "--project", "north")
    shown = run("versions", "show", child, "--project", "north", "--kit", kits / "clara")
    assert "every file and signature is good" in shown
    assert "the client north has not accepted it" in shown
    assert "'approved'" in run("accept", child, "--kit", kits / "clara", "--project", "north")
    run("deploy", child, "--kit", kits / "clara", "--project", "north")
    assert "deployed" in run("status", "--project", "north")
    assert [row["deployed"] for row in listed(run, "north")] == [row["version"] == child for row in listed(run, "north")]
    assert base["version"] in run("versions", "rollback", "--why", "alarms", "--project", "north")
    assert "rolled back" in run("status", "--project", "north")

    lines = [json.loads(line) for line in run("history", "--project", "north", "--json").splitlines()]
    assert [line["kind"] for line in lines] == ["draft", "client acceptance", "approve", "approved", "deployed", "rolled back"]
    assert lines[-1]["why"] == "alarms"
    verified = run("history", "--verify", "--project", "north")
    assert "6 lines, all in place and unaltered" in verified
    assert "clara (north)" in verified


def test_refuse_needs_a_reason(run: Run, vendor: Path, kits: Path) -> None:
    result = CliRunner().invoke(version_commands.app, ["refuse", "current", "--kit", str(kits / "clara"), "--project", str(vendor)])
    assert result.exit_code == 2
    assert "refuse" in run("refuse", "current", "--kit", kits / "clara", "--why", "worse here", "--project", "p")
    assert "worse here" in run("versions", "show", "current", "--project", "p")


def test_diff(run: Run, vendor: Path) -> None:
    child = run("versions", "add", "--parent", "current", "--threshold", 0.6, "--project", "p").strip()
    text = run("versions", "diff", "current", child, "--project", "p")
    assert "0.4 → 0.6" in text
    assert "9.weight" in text  # of the network to begin with
    found = json.loads(run("versions", "diff", "current", child, "--project", "p", "--json"))
    assert found["changed"]["threshold"] == [0.4, 0.6]
    assert all(moved == 0 for moved, _ in found["tensors"].values())


def test_an_empty_list(run: Run) -> None:
    run("init", "p", *FLAGS)
    assert "there is no version yet" in run("versions", "list", "--project", "p")
    status = run("status", "--project", "p")
    assert "draft" in status
    assert "data.yaml" in status


def test_the_wizard_asks_for_what_the_flags_do_not_say(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(project_commands, "_at_terminal", lambda: True)
    typed = ["ward-7", "", "north=North Clinic", "table", "age, dose", "", "", "", "", "patient", "", ""]
    asked = run("init", "p", "--vendor", "acme=Acme Vision", typed="\n".join(typed[:1] + typed[2:]) + "\n")
    project = read_project(tmp_path / "p")
    assert (project.name, project.clients[0].site, project.schema.columns) == ("ward-7", "north", ["age", "dose"])
    assert (project.schema.group, project.vendor.organisation) == ("patient", "Acme Vision")
    assert "The vendor, SITE" not in asked
    assert "height x width" not in asked


def test_without_a_terminal_it_takes_the_defaults(run: Run, tmp_path: Path) -> None:
    run("init", "p")
    assert (read_project(tmp_path / "p").name, read_project(tmp_path / "p").schema.shape) == ("project", [28, 28, 1])
    with pytest.raises(ConfigError, match="holds a project already"):
        run("init", "p")
