"""What training code prints, line by line under its site's name, though many sites share a process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeAlias

Sink: TypeAlias = Callable[[str, str], None]
"""Takes a site's name and one line, without its end."""


class Output:
    """Stands in for `sys.stdout` and `sys.stderr` while a site's code runs.

    Without a sink, lines go to the real `sys.stdout`, the site's name before each.
    """

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink
        self._site: str | None = None
        self._begun: dict[str, str] = {}  # lines that have no end yet, by site
        self._real: TextIO = sys.stdout
        self._stream = _Stream(self._write)

    @contextmanager
    def of(self, site: str) -> Iterator[None]:
        """What is printed within comes from `site`."""
        real = sys.stdout, sys.stderr
        self._site, self._real = site, sys.stdout
        sys.stdout = sys.stderr = self._stream
        try:
            yield
        finally:
            sys.stdout, sys.stderr = real
            self._site = None

    def turn_to(self, site: str) -> None:
        """Within `of`: what is printed from now on comes from `site`."""
        self._site = site

    def close(self) -> None:
        """Give out lines that never got an end."""
        for site, line in self._begun.items():
            if line:
                self._give(site, line)
        self._begun.clear()

    def _write(self, text: str) -> None:
        if self._site is None:  # a logging handler, say, that kept our stream and is used elsewhere
            self._real.write(text)
            return
        *lines, self._begun[self._site] = (self._begun.get(self._site, "") + text).split("\n")
        for line in lines:
            self._give(self._site, line)

    def _give(self, site: str, line: str) -> None:
        line = line.rstrip("\r").rpartition("\r")[2]  # of a progress bar, what it ends with
        if self._sink is not None:
            self._sink(site, line)
        else:
            self._real.write(f"{site}: {line}\n")


class _Stream(io.TextIOBase):
    """One object for all sites, so that code which keeps it (logging does) still prints under the right name."""

    encoding = "utf-8"

    def __init__(self, write: Callable[[str], None]) -> None:
        self._to = write

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._to(text)
        return len(text)
