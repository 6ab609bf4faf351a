"""Claims with their figures, printed as a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the table: what was measured for Hanse and for the bare loop, the figure that is judged, and its limit.

    limit: of the figure; None if the line is for information only. at_least: the figure must not be below the limit, else not above it.
    unit: of figure and limit; × for a ratio.
    """

    what: str
    hanse: str
    bare: str
    figure: float
    unit: str = "×"
    limit: float | None = None
    at_least: bool = False

    @property
    def missed(self) -> bool:
        if self.limit is None:
            return False
        return not (self.figure >= self.limit if self.at_least else self.figure <= self.limit)

    @property
    def cells(self) -> tuple[str, ...]:
        if self.limit is None:
            return self.what, self.hanse, self.bare, f"{self.figure:.3g} {self.unit}", "", ""
        target = f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}"
        return self.what, self.hanse, self.bare, f"{self.figure:.3g} {self.unit}", target, "MISS" if self.missed else "PASS"


def ratio(measured: Sequence[float], beside: Sequence[float]) -> float:
    """The median of the ratios turn by turn: what slows the machine for a while slows both of a turn."""
    return median(one / other for one, other in zip(measured, beside, strict=True))


_HEADINGS = ("claim", "Hanse", "bare", "figure", "target", "")


def table(claims: Sequence[Claim]) -> str:
    """The claims as text, columns aligned."""
    rows = [_HEADINGS, *(claim.cells for claim in claims)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=(about or "").partition("\n\n")[0])
    made.add_argument("--strict", action="store_true", help="end with status 1 if a target is missed")
    made.add_argument("--results", type=Path, help="also append each claim to this file, one JSON object a line")
    return made


def run(measure: Callable[[argparse.Namespace], Iterable[Claim]], options: argparse.Namespace) -> None:
    """Measure, print the table, and end the process."""
    print(machine(), flush=True)
    claims = list(measure(options))
    print(f"\n{table(claims)}\n\nload average at the end {_load()}\n", flush=True)
    if options.results:
        with options.results.open("a") as file:
            file.writelines(json.dumps(asdict(claim)) + "\n" for claim in claims)
    sys.exit(options.strict and any(claim.missed for claim in claims))


def machine() -> str:
    """What the figures were measured on, and how busy it was."""
    return f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, load average {_load()}"


def _load() -> str:
    return " ".join(f"{load:.1f}" for load in os.getloadavg())
