"""A training script that uses the Client API, as a job names it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hanse.errors import ConfigError


@dataclass(frozen=True)
class Script:
    """A Python file that uses the Client API, and its command-line arguments. Raises ConfigError if there is no such file."""

    path: Path
    argv: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).absolute())
        object.__setattr__(self, "argv", tuple(self.argv))
        if not self.path.is_file():
            raise ConfigError(f"there is no script {self.path}")
        if not all(isinstance(arg, str) for arg in self.argv):
            raise ConfigError(f"argv is {self.argv!r}: arguments are strings, as on a command line")
