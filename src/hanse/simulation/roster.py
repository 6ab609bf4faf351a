"""The names of simulated sites: a million of them are no million strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload


class NumberedSites(Sequence[str]):
    """`site-1` to `site-N`, with leading zeros so that the order of names is the order of numbers."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._width = len(str(count))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, rank: int) -> str: ...
    @overload
    def __getitem__(self, rank: slice) -> Sequence[str]: ...
    def __getitem__(self, rank: int | slice) -> str | Sequence[str]:
        if isinstance(rank, slice):
            return [self[r] for r in range(*rank.indices(self._count))]
        if not -self._count <= rank < self._count:
            raise IndexError(rank)
        return f"site-{rank % self._count + 1:0{self._width}d}"

    def index(self, name: object, start: int = 0, stop: int | None = None) -> int:
        digits = name[5:] if isinstance(name, str) and name.startswith("site-") else ""
        rank = int(digits) - 1 if len(digits) == self._width and digits.isascii() and digits.isdecimal() else -1
        if not 0 <= rank < self._count:
            raise ValueError(f"{name!r} is none of {self[0]} to {self[-1]}")
        return rank


class NamedSites(Sequence[str]):
    """Sites with names of their own, ranked by name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(sorted(names))
        self._ranks = {name: rank for rank, name in enumerate(self._names)}

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, rank: int) -> str: ...
    @overload
    def __getitem__(self, rank: slice) -> Sequence[str]: ...
    def __getitem__(self, rank: int | slice) -> str | Sequence[str]:
        return self._names[rank]

    def index(self, name: object, start: int = 0, stop: int | None = None) -> int:
        if name not in self._ranks:
            raise ValueError(f"{name!r} is none of {', '.join(self._names[:8])}{' …' if len(self._names) > 8 else ''}")
        return self._ranks[str(name)]
