"""How numbers, times and other people's text are written for a person, on a terminal and in a report alike."""

from __future__ import annotations

import math
import re

# Control characters (terminal escapes among them), marks that turn the direction of text, and what UTF-8 cannot hold.
# Newline and tab may stay.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """`text` with every character that could steer a terminal or a page replaced by U+FFFD: what sites write is hostile input."""
    return UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n"))


def one_line(text: str, limit: int) -> str:
    """The first line of `text` that is not blank, printable, at most `limit` characters long."""
    line = next((line for line in printable(text).split("\n") if line.strip()), "").replace("\t", " ").strip()
    return line if len(line) <= limit else line[: max(limit - 1, 0)] + "…"


def in_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts site-2 before site-10."""
    parts = re.split("([0-9]+)", name)
    return [(len(part.lstrip("0")), part) if index % 2 else (0, part) for index, part in enumerate(parts)]


def as_number(value: object) -> float | None:
    """`value` as a float; None where it is not a number. A JSON null stands for NaN."""
    if value is None:
        return math.nan
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return math.inf


def number(value: object) -> str:
    """A measured value in about four digits: 0.9722, 1.234, 1,234, 3.2e-05. Whole numbers in full; text as it is; an en dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return one_line(str(value), 40)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{as_number(value):.3g}"
    size = abs(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if size == 0 or 0.01 <= size < 1:
        return f"{value:.4f}"
    if size < 0.01 or size >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(size)))}f}"


def quantity(value: object) -> str:
    """A weight or count: as `number`, but 180.0 reads 180."""
    return number(int(value)) if isinstance(value, float) and value.is_integer() else number(value)


def plural(count: int, noun: str) -> str:
    """1 site, 2 sites, 1,000 sites."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time span in two or three digits: 85 ms, 1.2 s, 42 s, 3 min 12 s, 2 h 05 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 0.0995:
        return f"{seconds * 1000:.{1 if seconds < 0.00995 else 0}f} ms"
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"
