"""A training script that uses the Client API, as a job names it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from hanse.client.session import SiteInfo
from hanse.errors import ConfigError


@dataclass(frozen=True)
class Script:
    """A Python file that uses the Client API, and its command-line arguments. Raises ConfigError if there is no such file.

    In an argument, `{site}`, `{rank}` and `{count}` stand for the site's name, its rank from 0, and the number of sites.
    """

    path: Path
    argv: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).absolute())
        object.__setattr__(self, "argv", tuple(self.argv))
        if not self.path.is_file():
            raise ConfigError(f"there is no script {self.path}")
        if not all(isinstance(arg, str) for arg in self.argv):
            raise ConfigError(f"argv is {self.argv!r}: arguments are strings, as on a command line")

    def argv_of(self, info: SiteInfo) -> list[str]:
        """The arguments as one site gets them."""
        known = {"{site}": info.name, "{rank}": str(info.rank), "{count}": str(info.count)}
        return [re.sub(r"\{(site|rank|count)\}", lambda match: known[match[0]], argument) for argument in self.argv]


def imported_modules(path: Path) -> list[str]:
    """The modules that a script imports, itself or by modules that lie beside it; those are not among them. In order of their names."""
    files, imported = [path], set[str]()
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module)
        files += [beside for name in imported if (beside := file.with_name(f"{name}.py")).is_file() and beside not in files]
    return sorted(name for name in imported if not path.with_name(f"{name.partition('.')[0]}.py").is_file())
