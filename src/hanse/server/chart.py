"""Charts as data: where each line, band, bar and tick of an SVG picture goes. `report.html.j2` draws them, and escapes their texts.

N = points of a curve.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hanse.server.wording import duration, number, plural

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 440, 230  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 30  # room for the axes
MAX_LINES = 40  # more sites than this become a band
MAX_COLOURS = 8  # up to this many sites have a colour each
LARGEST = 1e150  # larger values count as not finite, so that no range overflows


class Points(NamedTuple):
    """One curve: x and y, each float64 of shape (N,), x rising. A NaN in y is a gap."""

    x: Floats
    y: Floats


@dataclass(slots=True)
class Columns:
    """The values of one metric as they came in, one entry each: which site (an index), at which x, what value."""

    site: array[int] = field(default_factory=lambda: array("q"))
    x: array[int] = field(default_factory=lambda: array("q"))
    value: array[float] = field(default_factory=lambda: array("d"))

    def add(self, site: int, x: int, value: float) -> None:
        self.site.append(site)
        self.x.append(x)
        self.value.append(value)

    def by_site(self, *, limit: int) -> dict[int, Points] | None:
        """One curve a site, ordered by x; of two values at one x the later counts. None if there are more than `limit` sites."""
        site, x, value = np.array(self.site), np.array(self.x), _finite(np.array(self.value))
        sites = np.unique(site)
        if len(sites) > limit:
            return None
        return {int(one): _rising(x[site == one], value[site == one]) for one in sites}

    def by_x(self) -> list[tuple[float, Floats]]:
        """Each x with all its values that are numbers, by rising x."""
        x, value = np.array(self.x), _finite(np.array(self.value))
        x, value = x[~np.isnan(value)], value[~np.isnan(value)]
        order = np.argsort(x, kind="stable")
        xs, starts = np.unique(x[order], return_index=True)
        return list(zip(xs.astype(float).tolist(), np.split(value[order], starts[1:]), strict=True)) if len(xs) else []

    def mean(self) -> Points:
        """The plain mean of the sites' values at each x."""
        groups = self.by_x()
        return Points(np.array([x for x, _ in groups]), np.array([values.mean() for _, values in groups]))


@dataclass(frozen=True, slots=True)
class Mark:
    """One drawn thing: `path` is SVG path data, `look` a class of the style sheet, `title` shows on hover."""

    path: str
    look: str
    title: str


class Dot(NamedTuple):
    x: float
    y: float
    title: str


class Tick(NamedTuple):
    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture with its caption. `legend` pairs a look with its label."""

    title: str
    subtitle: str
    last: str = ""
    note: str = ""
    x_label: str
    marks: Sequence[Mark]
    dots: Sequence[Dot] = ()
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    legend: Sequence[tuple[str, str]]


def curves(
    title: str,
    columns: Columns,
    names: Sequence[str],
    *,
    subtitle: str,
    x_label: str,
    bold: Points | None,
    bold_label: str,
    max_points: int,
) -> Chart:
    """A metric over rounds or steps: `bold` on top, below it one thin line a site, or of many sites their band and median.

    names: the sites' names by index. max_points: how many points all thin lines together may have; they are thinned out to it.
    """
    sites = columns.by_site(limit=MAX_LINES)
    bold = Points(bold.x, _finite(bold.y)) if bold is not None else None
    marks: list[Mark] = []
    legend: list[tuple[str, str]] = [("bold", bold_label)] if bold is not None else []
    if sites is None:
        groups = columns.by_x()
        x = np.array([x for x, _ in groups])
        low, middle, high = np.array([np.percentile(values, (10, 50, 90)) for _, values in groups]).reshape(-1, 3).T
        plane = _Plane.around([x], [low, high, *((bold.y,) if bold else ())])
        count = len(set(columns.site))
        marks.append(Mark(plane.area(x, low, high), "band", f"10th to 90th percentile of {plural(count, 'site')}"))
        marks.append(plane.mark(Points(x, middle), max_points, "median", f"median of {plural(count, 'site')}"))
        legend += [("band", f"10th to 90th percentile of {plural(count, 'site')}"), ("median", "median")]
    else:
        every = [*sites.values(), *((bold,) if bold else ())]
        plane = _Plane.around([points.x for points in every], [points.y for points in every])
        coloured = len(sites) <= MAX_COLOURS
        for rank, (site, points) in enumerate(sites.items()):
            look = f"site s{rank}" if coloured else "site"
            caption = f"{names[site]}: {number(float(points.y[-1]))} at {x_label} {points.x[-1]:.0f}"
            marks.append(plane.mark(points, max(2, max_points // len(sites)), look, caption))
            if coloured:
                legend.append((look, names[site]))
        if sites and not coloured:
            legend.append(("site", plural(len(sites), "site")))
    dots: list[Dot] = []
    if bold is not None:
        marks.append(plane.mark(bold, 1000, "bold", bold_label))
        if len(bold.x) <= 200:
            dots = [
                Dot(plane.px(x), plane.py(y), f"{bold_label}, {x_label} {x:.0f}: {number(y)}")
                for x, y in zip(bold.x.tolist(), bold.y.tolist(), strict=True)
                if not math.isnan(y)
            ]
    left_out = int(np.isnan(_finite(np.array(columns.value))).sum()) + (int(np.isnan(bold.y).sum()) if bold else 0)
    return Chart(
        title=title,
        subtitle=subtitle,
        last=number(float(bold.y[-1])) if bold is not None and len(bold.y) else "",
        note=f"{plural(left_out, 'value')} not finite, left out." if left_out else "",
        x_label=x_label,
        marks=marks,
        dots=dots,
        x_ticks=plane.x_ticks(),
        y_ticks=plane.y_ticks(),
        legend=legend,
    )


def bars(title: str, heights: Points, lines: Mapping[str, Points], *, subtitle: str, x_label: str, bar_label: str) -> Chart:
    """Seconds as bars from zero, with the curves in `lines` (at most two, by their labels) over them. Thinned out to 300 bars."""
    keep = _thinned(len(heights.x), 300)
    x, y = heights.x[keep], heights.y[keep]
    plane = _Plane.around([x - 0.5, x + 0.5], [np.zeros(1), y, *(points.y for points in lines.values())])
    width = min(max((plane.px(1.0) - plane.px(0.0)) * 0.72, 0.6), 60.0)
    marks = [
        Mark(
            f"M{plane.px(at) - width / 2:.1f},{plane.py(0):.1f}V{plane.py(height):.1f}h{width:.1f}V{plane.py(0):.1f}z",
            "bar",
            f"{x_label} {at:.0f}: {duration(height)}",
        )
        for at, height in zip(x.tolist(), y.tolist(), strict=True)
        if math.isfinite(height)
    ]
    looks = ("over", "over dashed")
    marks += [plane.mark(points, 300, look, label) for look, (label, points) in zip(looks, lines.items(), strict=False)]
    legend = [("bar", bar_label), *((look, label) for look, label in zip(looks, lines, strict=False))]
    return Chart(
        title=title, subtitle=subtitle, x_label=x_label, marks=marks, x_ticks=plane.x_ticks(), y_ticks=plane.y_ticks(), legend=legend
    )


def histogram(title: str, edges: Floats, counts: Floats, lines: Mapping[str, Floats], *, subtitle: str, note: str, bar_label: str) -> Chart:
    """How large a share of the values lies in each bin, as bars, and that of parts of them as lines, at most MAX_COLOURS, by their labels.

    edges: shape (b + 1,), rising. counts, and each of the lines: shape (b,).
    """
    middles = (edges[:-1] + edges[1:]) / 2
    shares = _shares(counts)
    parts = {label: _shares(line) for label, line in list(lines.items())[:MAX_COLOURS]}
    plane = _Plane.around([edges], [np.zeros(1), shares, *parts.values()])
    marks = [
        Mark(
            f"M{plane.px(left):.1f},{plane.py(0):.1f}V{plane.py(share):.1f}H{plane.px(right):.1f}V{plane.py(0):.1f}z",
            "bar",
            f"{number(left)} to {number(right)}: {number(int(count))} values, {100 * share:.1f} %",
        )
        for left, right, count, share in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), shares.tolist(), strict=True)
        if count
    ]
    legend = [("bar", bar_label)]
    for rank, (label, part) in enumerate(parts.items()):
        marks.append(plane.mark(Points(middles, part), len(middles), f"site s{rank}", label))
        legend.append((f"site s{rank}", label))
    return Chart(
        title=title,
        subtitle=subtitle,
        note=note,
        x_label="",
        marks=marks,
        legend=legend,
        x_ticks=plane.value_ticks(),
        y_ticks=plane.y_ticks(),
    )


def nice_steps(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers, evenly spaced, the first at most `low` and the last at least `high`. `whole`: whole numbers only."""
    if not high - low > 1e-300:  # powers of ten below that have lost their digits
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if abs(low) > 1e-290 else (-1.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class _Plane:
    """From values to places in the drawing."""

    x_low: float
    x_high: float
    y_steps: tuple[float, ...]

    @classmethod
    def around(cls, xs: Iterable[Floats], ys: Iterable[Floats]) -> _Plane:
        x = np.concatenate([np.empty(0), *xs])
        y = np.concatenate([np.empty(0), *ys])
        x, y = x[np.isfinite(x)], y[np.isfinite(y)]
        x_low, x_high = (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
        if x_low == x_high:
            x_low, x_high = x_low - 0.5, x_high + 0.5
        if not len(y):
            return cls(x_low, x_high, (0.0, 1.0))
        low, high = float(y.min()), float(y.max())
        least = 0.005 * max(abs(low), abs(high))  # a smaller range is rounding, not news
        spread = max(0.0, least - (high - low)) / 2
        return cls(x_low, x_high, tuple(nice_steps(low - spread, high + spread, 4)))

    def px(self, x: float) -> float:
        return LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.y_steps[0]) / (self.y_steps[-1] - self.y_steps[0]) * (HEIGHT - TOP - BOTTOM)

    def x_ticks(self) -> list[Tick]:
        inside = [at for at in nice_steps(self.x_low, self.x_high, 6, whole=True) if self.x_low <= at <= self.x_high]
        return [Tick(self.px(at), f"{at:,.0f}") for at in inside]

    def y_ticks(self) -> list[Tick]:
        return [Tick(self.py(at), label) for at, label in zip(self.y_steps, _labels(self.y_steps), strict=True)]

    def value_ticks(self) -> list[Tick]:
        """Of an x axis of measured values."""
        steps = nice_steps(self.x_low, self.x_high, 5)
        slack = (self.x_high - self.x_low) * 1e-9
        inside = [self.x_low - slack <= at <= self.x_high + slack for at in steps]
        return [Tick(self.px(at), label) for at, label, shown in zip(steps, _labels(steps), inside, strict=True) if shown]

    def mark(self, points: Points, max_points: int, look: str, title: str) -> Mark:
        """The curve; a gap at each NaN. A point alone is a stroke of no length, which round ends make a dot."""
        keep = _thinned(len(points.x), max_points)
        parts, open_ = [], False
        for x, y in zip(points.x[keep].tolist(), points.y[keep].tolist(), strict=True):
            if math.isnan(y):
                open_ = False
                continue
            parts.append(f"{'L' if open_ else 'M'}{self.px(x):.1f},{self.py(y):.1f}{'' if open_ else 'h0'}")
            open_ = True
        return Mark("".join(parts), f"{look} alone" if len(parts) == 1 else look, title)

    def area(self, x: Floats, low: Floats, high: Floats) -> str:
        keep = _thinned(len(x), 1000)
        up = [f"{self.px(at):.1f},{self.py(y):.1f}" for at, y in zip(x[keep].tolist(), high[keep].tolist(), strict=True)]
        down = [f"{self.px(at):.1f},{self.py(y):.1f}" for at, y in zip(x[keep].tolist(), low[keep].tolist(), strict=True)]
        return f"M{'L'.join(up + down[::-1])}z" if up else ""


def _labels(steps: Sequence[float]) -> list[str]:
    """Evenly spaced values as they stand beside an axis, neighbours told apart."""
    step = steps[1] - steps[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += not math.isclose(round(step, digits), step, rel_tol=1e-6)  # a step of 2.5 × 10ⁿ has one digit more
    largest = max(map(abs, steps))
    plain = len(f"{largest:,.{digits}f}") <= 8
    exact = max(2, 2 + math.floor(math.log10(largest / step)))  # significant digits that keep neighbours apart
    return [f"{at + 0.0:,.{digits}f}" if plain else f"{at:.{exact}g}" for at in steps]


def _finite(values: Floats) -> Floats:
    """`values` with NaN for everything that cannot be drawn."""
    return np.where(np.abs(values) < LARGEST, values, np.nan)


def _shares(counts: Floats) -> Floats:
    """Each part of the sum; 0 if there is none."""
    total = float(counts.sum())
    return counts / total if total > 0 else np.zeros(len(counts))


def _rising(x: npt.NDArray[np.int64], y: Floats) -> Points:
    """Ordered by x; of several values at one x the last one given."""
    xs, last = np.unique(x[::-1], return_index=True)
    return Points(xs.astype(float), y[::-1][last])


def _thinned(count: int, at_most: int) -> npt.NDArray[np.intp]:
    """The indices of at most `at_most` of `count` points, evenly spread, first and last among them."""
    return np.arange(count) if count <= at_most else np.linspace(0, count - 1, at_most).astype(np.intp)
