"""The part of a report that shows federated statistics: a histogram and a table a column. See `hanse.workflows.describe` for the event."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hanse.server.chart import MAX_COLOURS, Chart, histogram
from hanse.server.wording import in_order, number, plural

MAX_COLUMNS = 24
MAX_ROWS = 60  # groups and sites in the table of one column

Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a group, or a site. `depth` says how deep the group lies."""

    name: str
    depth: int
    cells: Sequence[str]


@dataclass(frozen=True, slots=True)
class Column:
    """What is shown of one column; `chart` is None without a histogram."""

    name: str
    chart: Chart | None
    headings: Sequence[str]
    rows: Sequence[Row]
    cut: int
    withheld: str


def statistics_section(event: Event | None) -> tuple[list[Column], list[str]]:
    """The first columns as they are shown, and the names of those left out."""
    columns = dict((event or {}).get("columns") or {})
    names = sorted(columns, key=in_order)
    return [_column(name, columns[name]) for name in names[:MAX_COLUMNS]], names[MAX_COLUMNS:]


def _column(name: str, column: Event) -> Column:
    groups, sites = column.get("groups") or {}, column.get("sites") or {}
    levels = [q["q"] for q in next((each["quantiles"] for each in groups.values() if each.get("quantiles")), ())]
    told = any(each.get("min") is not None for each in (*groups.values(), *sites.values()))
    extremes = ("min", "max") if told else ()
    headings = ["values", "missing", "mean", "std. dev.", *extremes, *(f"{100 * q:g} %" for q in levels)]
    rows = [
        Row(group.rpartition("/")[2] or "all sites", group.count("/") + bool(group), _cells(groups[group], extremes, levels))
        for group in sorted(groups, key=_path)
    ]
    rows += [Row(site, 0, _cells(sites[site], extremes, levels)) for site in sorted(sites, key=in_order)]
    withheld = column.get("withheld") or ()
    note = f"Withheld in part or whole by {plural(len(withheld), 'site')}: {', '.join(withheld[:10])}{', …' if len(withheld) > 10 else ''}."
    return Column(name, _chart(name, column, groups), headings, rows[:MAX_ROWS], max(0, len(rows) - MAX_ROWS), note if withheld else "")


def _cells(summary: Event, extremes: Sequence[str], levels: Sequence[float]) -> list[str]:
    variance = summary.get("variance")
    spread = None if variance is None else math.sqrt(max(0.0, variance))
    measured = [summary.get("mean"), spread, *(summary.get(name) for name in extremes)]
    known = {each["q"]: each for each in summary.get("quantiles") or ()}
    quantiles = [_quantile(known[q]) if q in known else "–" for q in levels]
    return [number(summary.get("count")), number(summary.get("missing")), *map(number, measured), *quantiles]


def _quantile(found: Event) -> str:
    """The estimate, and how far the true one may lie from it."""
    value, low, high = found.get("value"), found.get("low"), found.get("high")
    if value is None or low is None or high is None:
        return "–"
    return f"{number(value)} ± {float(f'{max(value - low, high - value):.2g}'):,g}"


def _chart(name: str, column: Event, groups: Mapping[str, Event]) -> Chart | None:
    whole = (groups.get("") or {}).get("histogram")
    if not column.get("edges") or not whole:
        return None
    parts = [group for group in sorted(groups, key=_path) if group and "/" not in group]
    if len(parts) == 1:
        parts = [group for group in sorted(groups, key=_path) if group.count("/") == 1]
    lines = {part: _counts(groups[part]) for part in parts[:MAX_COLOURS] if groups[part].get("histogram")}
    outside, hidden = whole.get("below", 0) + whole.get("above", 0), whole.get("hidden", 0)
    notes = [
        f"{number(outside)} values lie outside the range." if outside else "",
        f"{number(hidden)} are in cells that were not sent." if hidden else "",
    ]
    return histogram(
        name,
        np.array(column["edges"], dtype=float),
        np.array(whole["counts"], dtype=float),
        lines,
        subtitle=f"share of values, {plural(whole.get('sites', 0), 'site')}",
        note=" ".join(filter(None, notes)),
        bar_label="all sites",
    )


def _counts(summary: Event) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(summary["histogram"]["counts"], dtype=float)


def _path(group: str) -> list[str]:
    """A sort key that puts a group right before the groups in it."""
    return group.split("/") if group else []
