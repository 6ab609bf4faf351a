from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from hanse.errors import ConfigError
from hanse.identity.certificates import Role
from hanse.provision.project import EXAMPLE, Project, Site, read_project

SMALL: dict[str, Any] = {
    "federation": "study",
    "server": {"organisation": "Hospital", "addresses": ["localhost"]},
    "admins": [{"name": "ada", "organisation": "Hospital", "role": "project-admin"}],
    "sites": [{"name": "north", "organisation": "North Clinic"}, {"name": "south", "organisation": "South Clinic"}],
}


def write(folder: Path, data: Any) -> Path:
    path = folder / "project.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def changed(place: str, value: Any) -> dict[str, Any]:
    """SMALL with one setting changed; `place` is its keys with dots between."""
    data: Any = msgspec.json.decode(msgspec.json.encode(SMALL))
    at = data
    *way, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    for key in way:
        at = at[key]
    at[last] = value
    return data  # type: ignore[no-any-return]


def test_the_example_is_a_project(tmp_path: Path) -> None:
    project = read_project(write(tmp_path, EXAMPLE))
    assert project.federation == "lung-study"
    assert project.server.address == "fl.example.org:8443"
    assert [admin.role for admin in project.admins] == [Role.PROJECT_ADMIN, Role.ORG_ADMIN, Role.RESEARCHER, Role.AUDITOR]
    assert project.sites == [Site(name="north", organisation="North Clinic"), Site(name="south", organisation="South Clinic")]


def test_the_example_shows_every_setting_and_its_default(tmp_path: Path) -> None:
    lines = [line.replace("# ", "", 1) if line.startswith("  # ") else line for line in EXAMPLE.splitlines()]
    full = read_project(write(tmp_path, "\n".join(lines)))
    shown = yaml.safe_load("\n".join(lines))
    assert {field.name for field in msgspec.structs.fields(Project)} == set(shown)
    assert {field.name for field in msgspec.structs.fields(type(full.server))} == set(shown["server"])
    plain = read_project(write(tmp_path, SMALL))
    for setting in ("token_hours", "certificate_days", "admin_days"):
        assert getattr(plain, setting) == shown[setting]
    assert (plain.server.name, plain.server.port) == (shown["server"]["name"], shown["server"]["port"])


def test_an_ipv6_address_is_written_in_brackets(tmp_path: Path) -> None:
    assert read_project(write(tmp_path, changed("server.addresses", ["2001:db8::1", "x"]))).server.address == "[2001:db8::1]:8443"


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("federation", "", r"\$\.federation"),
        ("federation", "a b", r"\$\.federation"),
        ("sites.1.name", "north", r"`\$\.sites\[1\]\.name`: 'north' is taken by `\$\.sites\[0\]\.name`"),
        ("sites.1.name", "North", r"\$\.sites\[1\]\.name.*not only in their case"),
        ("sites.1.name", "ada", r"taken by `\$\.admins\[0\]\.name`"),
        ("sites.1.name", "server", r"taken by `\$\.server\.name`"),
        ("sites.0.name", "..", r"\$\.sites\[0\]\.name"),
        ("sites.0.name", "a/b", r"\$\.sites\[0\]\.name"),
        ("sites.0.name", "a.", r"\$\.sites\[0\]\.name.*dot"),
        ("sites.0.name", "x" * 64, r"\$\.sites\[0\]\.name"),
        ("sites.0.organisation", "x" * 65, r"\$\.sites\[0\]\.organisation"),
        ("sites.0.role", "site", r"unknown field `role`.*\$\.sites\[0\]"),
        ("admins.0.role", "king", r"\$\.admins\[0\]\.role"),
        ("admins.0.role", "site", r"\$\.admins\[0\]\.role.*no role of an admin"),
        ("server.port", 0, r"\$\.server\.port"),
        ("server.port", 65536, r"\$\.server\.port"),
        ("server.port", "8443", r"\$\.server\.port"),
        ("server.listen", "8443", r"\$\.server\.listen"),
        ("server.addresses", [], r"\$\.server\.addresses"),
        ("server.addresses", ["localhost", "fl.example.org:8443"], r"\$\.server\.addresses\[1\].*ports go to `port`"),
        ("server.addresses", ["https://fl"], r"\$\.server\.addresses\[0\]"),
        ("server.addresses", ["10.0.0.256"], r"\$\.server\.addresses\[0\]"),
        ("server.addresses", ["grüße.example"], r"\$\.server\.addresses\[0\]"),
        ("sever", {}, "unknown field `sever`"),
        ("token_hours", 0, r"\$\.token_hours"),
        ("certificate_days", -1, r"\$\.certificate_days"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, place: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_project(write(tmp_path, changed(place, value)))
    assert str(tmp_path / "project.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "Expected `object`"), ("federation: [", "line 1"), ("federation: a\n\tb", "line 2"), ("- a", "Expected `object`")],
)
def test_what_is_no_project_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_project(write(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read.*--example"):
        read_project(tmp_path / "nowhere.yaml")
