"""People of two organisations who sign, and the folder of a project between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hanse.finetuning.contract import Gate, Party, Project, Schema, write_project
from hanse.identity.certificates import Role
from hanse.identity.kit import Kit, read_kit
from hanse.provision.kits import provision
from hanse.provision.project import Admin, Server
from hanse.provision.project import Project as Federation

PEOPLE = {"vera": "Acme Vision", "victor": "Acme Vision", "clara": "North Clinic", "mallory": "Elsewhere"}


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kit]:
    """Startup kits by name: vera and victor of the vendor, clara of the client, mallory of neither."""
    folder = tmp_path_factory.mktemp("federation") / "study"
    admins = [Admin(name=name, organisation=organisation, role=Role.RESEARCHER) for name, organisation in PEOPLE.items()]
    server = Server(organisation="Acme Vision", addresses=["localhost"])
    provision(Federation(federation="study", server=server, admins=admins), folder)
    return {name: read_kit(folder / "admins" / name) for name in PEOPLE}


@pytest.fixture(scope="session")
def roots(kits: dict[str, Kit]) -> bytes:
    return kits["vera"].credentials().roots


@pytest.fixture
def project() -> Project:
    return Project(
        name="line-3",
        vendor=Party(site="acme", organisation="Acme Vision"),
        clients=[Party(site="north", organisation="North Clinic")],
        schema=Schema(shape=[8, 8, 1]),
        gate=Gate(resamples=200),
    )


@pytest.fixture
def folder(tmp_path: Path, project: Project) -> Path:
    """A project folder with a contract and code, and no version."""
    path = tmp_path / "vendor"
    write_project(path, project)
    (path / "model.py").write_text("def build():\n    raise NotImplementedError\n")
    return path


@pytest.fixture
def params() -> Callable[[float], dict[str, np.ndarray]]:
    """Weights of two tensors, all of them of this value, and a counter."""

    def make(value: float) -> dict[str, np.ndarray]:
        return {"head.weight": np.full((2, 3), value, np.float32), "body.bias": np.full(4, value, np.float32), "n": np.array(7)}

    return make
