"""constraints.txt pins all that an installation needs, to one version that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
REQUIREMENTS = [
    Requirement(line)
    for lines in (
        PROJECT["build-system"]["requires"],
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
    )
    for line in lines
]
OWN = PROJECT["project"]["name"]


def pins() -> dict[str, str]:
    """Package names to their pinned versions."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert re.fullmatch(r"[\w.!]+", version), f"{line!r} is not name==version"
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = version
    return found


def needed(requirements: list[Requirement], seen: set[str]) -> set[str]:
    """Names of all packages that `requirements` bring on this machine, with what these bring in turn."""
    names: set[str] = set()
    for requirement in requirements:
        if str(requirement) not in seen and requirement.name != OWN:
            seen.add(str(requirement))
            try:
                further = [Requirement(line) for line in metadata.requires(requirement.name) or ()]
            except metadata.PackageNotFoundError:
                pytest.fail(f"{requirement.name} is in pyproject.toml and not installed: run `make install`")
            for extra in ("", *requirement.extras):
                wanted = [one for one in further if one.marker is None or one.marker.evaluate({"extra": extra})]
                names |= needed(wanted, seen)
            names.add(canonicalize_name(requirement.name))
    return names


@pytest.mark.parametrize("requirement", [one for one in REQUIREMENTS if one.name != OWN], ids=str)
def test_every_dependency_is_pinned_to_a_version_it_allows(requirement: Requirement) -> None:
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{requirement.name} is not in constraints.txt: run `make constraints`"
    assert requirement.specifier.contains(pinned, prereleases=True)


def test_pins_are_what_is_needed_no_less_no_more() -> None:
    assert needed(REQUIREMENTS, set()) == set(pins())
