"""Federated statistics: two questions to every site, and the answers merged by groups of sites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hanse.cohort import Cohort
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.messages.task import DESCRIBE, HISTOGRAM, Task
from hanse.messages.update import Update
from hanse.statistics.histogram import bin_edges, quantile
from hanse.statistics.moments import Moments, merged

Array = np.ndarray[Any, np.dtype[Any]]

MOST = 1 << 48
"""A site has at most so many values: sums over all sites stay exact."""


@dataclass(slots=True)
class Told:
    """What one site tells of one column; None where it tells nothing."""

    moments: Moments
    extremes: tuple[float, float] | None = None
    range: tuple[float, float] | None = None
    histogram: Array | None = None


@dataclass(slots=True)
class Answers:
    """By column and site, in the order of the sites' names."""

    told: dict[str, dict[str, Told]] = field(default_factory=dict)
    withheld: dict[str, set[str]] = field(default_factory=dict)


async def describe(
    cohort: Cohort,
    model: FLModel,
    *,
    columns: Sequence[str] | None = None,
    bins: int | None = 20,
    ranges: Mapping[str, Sequence[float]] | None = None,
    quantiles: Sequence[float] = (0.25, 0.5, 0.75),
    groups: Mapping[str, str] | None = None,
    min_updates: int | None = None,
    within_s: float | None = None,
) -> FLModel:
    """Statistics of the sites' tables, noted as the event `statistics`. Nothing is trained: the model is returned as it came.

    The first task asks for moments and for ranges that hold the columns, the second for histograms with edges that all sites share.

    columns: which; None: every column of numbers that a site has. bins: how many a histogram has; None: no histograms, no second task.
    ranges: the ends of the histograms, by column; sites are not asked for the range of these.
    quantiles: which to read off the histograms, to the width of a bin. groups: site to path, such as "eu/de"; each level is a group.
    within_s: seconds for each task. Raises TooFewUpdates if fewer than `min_updates` sites (default: all) answer.
    """
    ranges, groups = dict(ranges or {}), dict(groups or {})
    if unknown := sorted(groups.keys() - set(cohort.sites)):
        raise ConfigError(f"groups names site {unknown[0]!r}, which is not in the job")
    async for _ in cohort.rounds(model, 1):
        answers = Answers()

        async def ask(task: str, question: Mapping[str, Any], answers: Answers = answers) -> None:
            asked = cohort.ask(Task(task, FLModel(), {task: question}), min_updates=min_updates, within_s=within_s)
            updates = [update async for update in asked if update.failure is None]
            for update in sorted(updates, key=lambda update: update.site):
                try:
                    _take_in(answers, update, question.get("edges", {}))
                except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
                    cohort.log(f"site {update.site!r} sent no statistics: {type(error).__name__}: {error}", level="warning")

        named = None if columns is None else list(columns)
        await ask(DESCRIBE, {"columns": named, "range": bins is not None, "known": sorted(ranges)})
        edges: dict[str, list[float]] = {}
        for column, told in sorted(answers.told.items()) if bins else ():
            known = [tuple(ranges[column])] if column in ranges else [each.range for each in told.values() if each.range is not None]
            ends = min((low for low, _ in known), default=math.nan), max((high for _, high in known), default=math.nan)
            try:
                bin_edges(ends[0], ends[1], bins or 1)
            except ConfigError as error:
                cohort.log(f"column {column!r} has no histogram: {error}", level="warning")
            else:
                edges[column] = [float(ends[0]), float(ends[1]), bins or 1]
        if edges:
            await ask(HISTOGRAM, {"edges": edges})
        cohort.event("statistics", **_result(answers, edges, quantiles, groups, tuple(cohort.sites)))
        model = await cohort.commit(model)
    return model


def _take_in(answers: Answers, update: Update, edges: Mapping[str, Sequence[float]]) -> None:
    """One site's answer, all of it or nothing. Raises one of Python's errors if it is not what was asked."""
    read: dict[str, Told] = {}
    withheld = [column for column, said in (update.model.params or {}).items() if "withheld" in said]
    for column, said in (update.model.params or {}).items():
        if "moments" in said:
            count, missing, total, m2 = np.asarray(said["moments"], np.float64).tolist()
            if not (0 <= count <= MOST and 0 <= missing <= MOST and math.isfinite(total) and 0 <= m2 < math.inf):
                raise ValueError(f"column {column!r} has moments that are none")
            read[column] = Told(Moments(int(count), int(missing), total, m2))
            for name in ("extremes", "range"):
                if name in said:
                    low, high = np.asarray(said[name], np.float64).tolist()
                    setattr(read[column], name, (low, high))
        elif column not in withheld and (told := answers.told.get(column, {}).get(update.site)) is not None:
            cells = np.asarray(said["histogram"], np.int64).reshape(int(edges[column][2]) + 2)
            if not ((cells >= 0) & (cells <= MOST)).all():
                raise ValueError(f"column {column!r} has counts that are none")
            read[column] = Told(told.moments, told.extremes, told.range, cells)
    for column, told in read.items():
        answers.told.setdefault(column, {})[update.site] = told
    for column in withheld:
        answers.withheld.setdefault(column, set()).add(update.site)


def _result(
    answers: Answers, edges: Mapping[str, Sequence[float]], quantiles: Sequence[float], groups: Mapping[str, str], sites: Sequence[str]
) -> dict[str, Any]:
    """The event: by column its edges and, by group and by site, its statistics."""
    members: dict[str, list[str]] = {"": sorted(sites)}
    for site in sorted(groups):
        parts = [part for part in groups[site].split("/") if part]
        for depth in range(len(parts)):
            members.setdefault("/".join(parts[: depth + 1]), []).append(site)
    columns: dict[str, Any] = {}
    for column in sorted(answers.told.keys() | answers.withheld.keys()):
        told = answers.told.get(column, {})
        ends = bin_edges(edges[column][0], edges[column][1], int(edges[column][2])) if column in edges else None

        def of(some: Iterable[str], told: Mapping[str, Told] = told, ends: Array | None = ends) -> dict[str, Any]:
            return _summary([told[site] for site in some if site in told], ends, quantiles)

        columns[column] = {
            "edges": None if ends is None else ends.tolist(),
            "groups": {group: of(those) for group, those in sorted(members.items())},
            "sites": {site: of([site]) for site in told},
            "withheld": sorted(answers.withheld.get(column, ())),
        }
    return {"columns": columns, "members": {group: those for group, those in sorted(members.items())}}


def _summary(told: Sequence[Told], edges: Array | None, quantiles: Sequence[float]) -> dict[str, Any]:
    """The statistics of one column over some sites, as JSON values: null for what is not known."""
    moments = merged(each.moments for each in told)
    extremes = [each.extremes for each in told]
    known = [each for each in extremes if each is not None]
    complete = bool(known) and len(known) == len(extremes)
    summary: dict[str, Any] = {
        "sites": len(told),
        "count": moments.count,
        "missing": moments.missing,
        "sum": _json(moments.total),
        "mean": _json(moments.mean),
        "variance": _json(moments.variance),
        "min": min(low for low, _ in known) if complete else None,
        "max": max(high for _, high in known) if complete else None,
    }
    counted = [(each.moments.count, each.histogram) for each in told if each.histogram is not None]
    if edges is not None and counted:
        cells = np.sum([histogram for _, histogram in counted], axis=0)
        total = sum(count for count, _ in counted)
        summary["histogram"] = {
            "sites": len(counted),
            "counts": cells[1:-1].tolist(),
            "below": int(cells[0]),
            "above": int(cells[-1]),
            "hidden": max(0, total - int(cells.sum())),
        }
        summary["quantiles"] = [
            {"q": q, **{name: _json(number) for name, number in quantile(edges, cells, q, total=total)._asdict().items()}}
            for q in quantiles
        ]
    return summary


def _json(number: float) -> float | None:
    return number if math.isfinite(number) else None
