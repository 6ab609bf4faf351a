"""The documentation names everything a user can name: public names and their settings, commands and their options, errors."""

from __future__ import annotations

import dataclasses
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import hanse
import hanse.client
import hanse.errors
import hanse.finetuning

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))}
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]


def code_in(page: str) -> str:
    """The parts of a Markdown page that are set as code: fenced blocks, and words between backticks."""
    blocks = re.findall(r"^ *```.*?^ *```", page, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(blocks + re.findall(r"`[^`\n]+`", prose))


CODE = {name: code_in(page) for name, page in PAGES.items()}


def pages_with(term: str) -> list[str]:
    """The pages where `term` stands as code, as a whole word."""
    return [name for name, code in CODE.items() if re.search(rf"(?<![\w-]){re.escape(term)}(?![\w-])", code)]


def of_entry_point(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def settings() -> Iterator[tuple[str, str]]:
    """Each dataclass that users fill in, with each of its fields: public ones, and those that entry points name."""
    targets = [target for group in ("hanse.recipes", "hanse.filters") for target in ENTRY_POINTS[group].values()]
    for thing in [getattr(hanse, name) for name in hanse.__all__] + [of_entry_point(target) for target in targets]:
        if isinstance(thing, type) and dataclasses.is_dataclass(thing):
            yield from (
                (thing.__name__, field.name) for field in dataclasses.fields(thing) if field.init and not field.name.startswith("_")
            )


def commands(command: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    """Each command that can be run, as it is typed, with its options' long names."""
    yield path, [option for param in command.params for option in param.opts if option.startswith("--") and option != "--help"]
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, f"{path} {name}")


def test_every_public_name_is_documented() -> None:
    assert [name for name in hanse.__all__ if not name.startswith("_") and not pages_with(name)] == []


def test_every_setting_is_documented_beside_its_owner() -> None:
    missing = [f"{owner}.{field}" for owner, field in set(settings()) if not set(pages_with(owner)) & set(pages_with(field))]
    assert sorted(missing) == []


@pytest.mark.parametrize("owner", ["Project", "Party", "Model", "Schema", "Learning", "Gate"])
def test_every_setting_of_a_contract_stands_in_its_table_with_its_default(owner: str) -> None:
    _, _, table = PAGES["finetuning.md"].partition(f"| `{owner}` | default | |\n")
    documented: list[tuple[str, Any]] = []
    for names, defaults in re.findall(r"^\| (`.*?) \|(.*?)\|", table.partition("\n\n")[0], re.MULTILINE):
        settings, said = (re.findall("`(.*?)`", cell) for cell in (names, defaults))
        documented += zip(settings, map(yaml.safe_load, said) if said else [msgspec.NODEFAULT] * len(settings), strict=True)
    fields = msgspec.structs.fields(getattr(hanse.finetuning, owner))
    values = [field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory() for field in fields]
    expected = [{} if isinstance(value, msgspec.Struct) else value for value in values]  # parts have tables of their own
    assert documented == [(field.name, value) for field, value in zip(fields, expected, strict=True)]


def test_every_name_of_fine_tuning_is_documented() -> None:
    assert [name for name in hanse.finetuning.__all__ if not pages_with(name)] == []


def test_every_recipe_and_filter_is_documented() -> None:
    targets = [target for group in ("hanse.recipes", "hanse.filters") for target in ENTRY_POINTS[group].values()]
    assert [target for target in targets if not pages_with(of_entry_point(target).__name__)] == []


def test_the_client_api_is_documented() -> None:
    assert [name for name in hanse.client.__all__ if not re.search(rf"\b{name}\b", CODE["client-api.md"])] == []


def test_every_command_and_option_is_documented() -> None:
    from typer.main import get_command

    from hanse.cli.main import app

    page = CODE["command-line.md"]
    listed = dict(commands(get_command(app), "hanse"))
    assert len(listed) > 1
    missing = [command for command in listed if not re.search(rf"\b{command}\b", page)]
    missing += [f"{command} {option}" for command, options in listed.items() for option in options if not re.search(rf"{option}\b", page)]
    assert missing == []


def test_every_error_is_documented() -> None:
    errors = [name for name, thing in vars(hanse.errors).items() if isinstance(thing, type) and issubclass(thing, hanse.errors.HanseError)]
    assert len(errors) > 5
    assert [name for name in errors if not re.search(rf"\b{name}\b", CODE["errors.md"])] == []


def test_every_page_is_reachable() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [name for name in PAGES if name not in navigation] == []


@pytest.mark.parametrize(
    ("page", "term", "found"),
    [
        ("call `fedavg(cohort)` now", "fedavg", True),
        ("call fedavg now", "fedavg", False),
        ("```python\nrun(seed=1)\n```\n", "seed", True),
        ("`seeds` and `is_train`", "seed", False),
        ("```\nx\n```\nseed\n```\ny\n```\n", "seed", False),
    ],
)
def test_what_counts_as_documented(monkeypatch: pytest.MonkeyPatch, page: str, term: str, found: bool) -> None:
    monkeypatch.setitem(CODE, "page.md", code_in(page))
    assert ("page.md" in pages_with(term)) is found
