"""`report.html`: a run folder as one page that a person wants to look at.

The page stands alone: no script, no font, no picture from anywhere. What sites wrote (names, messages, logged texts) is hostile input: the
template escapes all of it, and the page's own policy forbids scripts and every connection.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import math
import os
import shlex
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hanse.errors import ConfigError, NotInstalled
from hanse.server.chart import Chart, Columns, Points, bars, curves
from hanse.server.events import Event, read_events
from hanse.server.statistics_section import statistics_section
from hanse.server.wording import as_number, duration, in_order, number, plural, printable, quantity

MAX_CHARTS = 12  # of metrics; what does not fit is named in a sentence
MAX_TRACKED = 24
MAX_SITES = 200  # a longer table is cut to the CUT_SITES that need attention
CUT_SITES = 100
MAX_ROWS = 100  # of failures, texts, log lines
FEW = 10  # failures shown before a fold
MAX_CELLS = 40  # rows and columns of a cross-site table
MAX_TEXT = 1500  # characters of one message


def write_report(folder: Path) -> Path:
    """Write `report.html` into the run folder from its `run.json` and `metrics.jsonl`, in one step; return its path.

    Raises: NotInstalled without Jinja2; ConfigError if there is no readable `run.json`.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise NotInstalled("the report needs the package jinja2", hint="Install it with: pip install 'hanse[report]'") from error
    run = _read_run(folder)
    history = History.of(folder / "metrics.jsonl", _listed_sites(run))
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_printable_value)
    page.filters |= {"number": number, "quantity": quantity, "duration": duration, "moment": _moment, "csp_hash": _csp_hash}
    template = page.from_string(importlib.resources.files("hanse.server").joinpath("report.html.j2").read_text(encoding="utf-8"))
    text = template.render(_view(run, history, folder))
    path = folder / "report.html"
    unfinished = folder / f".report.html.{os.getpid()}"
    try:
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


@dataclass(slots=True)
class SiteRow:
    """What the table says about one site. `last` maps each task to the metrics last sent."""

    name: str
    rounds: int = 0
    updates: int = 0
    failures: int = 0
    seconds: float = 0.0
    weight: Any = None
    last_round: int = -1
    last: dict[str, Event] = field(default_factory=dict)

    @property
    def mean_seconds(self) -> float:
        return self.seconds / self.updates if self.updates else math.nan


@dataclass(slots=True)
class Tracked:
    """A scalar that training code logged, over its own steps; over their order where steps are missing or begin anew."""

    steps: Columns = field(default_factory=Columns)
    order: Columns = field(default_factory=Columns)
    rising: bool = True
    last: dict[int, tuple[int, int]] = field(default_factory=dict)  # site: its last step, how many values

    def add(self, site: int, step: object, value: float) -> None:
        step = step if isinstance(step, int) and abs(step) < 2**53 else None
        before, count = self.last.get(site, (-(2**62), 0))
        self.rising = self.rising and step is not None and step > before
        self.last[site] = (before if step is None else step, count + 1)
        self.steps.add(site, 0 if step is None else step, value)
        self.order.add(site, count + 1, value)


@dataclass(slots=True)
class History:
    """All that `metrics.jsonl` says, in the form the page needs; filled line by line.

    After a resume a round may come twice: the later one counts.
    """

    sites: list[SiteRow] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)
    rounds: dict[int, Event] = field(default_factory=dict)
    metrics: dict[tuple[str, str], Columns] = field(default_factory=dict)  # (task, metric)
    seconds: dict[str, Columns] = field(default_factory=dict)  # by task
    failures: list[Event] = field(default_factory=list)
    failure_codes: Counter[str] = field(default_factory=Counter)
    tracked: dict[str, Tracked] = field(default_factory=dict)
    params: dict[tuple[str, str], set[int]] = field(default_factory=dict)  # (name, value): the sites
    texts: dict[tuple[str, str], tuple[str, Any]] = field(default_factory=dict)  # (key, site): kind, the last text
    logs: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_ROWS))
    messages: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_ROWS))
    cross_site: Event | None = None
    statistics: Event | None = None
    resume: str = ""

    @classmethod
    def of(cls, journal: Path, sites: Sequence[str]) -> History:
        history = cls()
        for name in sites:
            history.site(name)
        for event in read_events(journal):
            history.add(event)
        return history

    def site(self, name: str) -> int:
        if (index := self.index.get(name)) is None:
            index = self.index[name] = len(self.sites)
            self.sites.append(SiteRow(name))
        return index

    def add(self, event: Event) -> None:
        match event.get("event"):
            case "update":
                self._add_update(event)
            case "failure":
                self.sites[self.site(str(event.get("site", "")))].failures += 1
                self.failure_codes[str(event.get("code", ""))] += 1
                if len(self.failures) < MAX_ROWS:
                    self.failures.append(event)
            case "record":
                self._add_record(event)
            case "round":
                self.rounds[int(event.get("round") or 0)] = event
            case "cross_site":
                self.cross_site = event
            case "statistics":
                self.statistics = event
            case "message":
                self.messages.append(event)
            case "end":
                self.resume = str(event.get("resume") or "")

    def _add_update(self, event: Event) -> None:
        index, round, task = self.site(str(event.get("site", ""))), int(event.get("round") or 0), str(event.get("task", "train"))
        row = self.sites[index]
        seconds = as_number(event.get("seconds")) or 0.0
        row.updates += 1
        row.seconds += seconds
        row.rounds += round != row.last_round
        row.last_round = round
        if event.get("weight") is not None and (task == "train" or row.weight is None):
            row.weight = event["weight"]
        self.seconds.setdefault(task, Columns()).add(index, round + 1, seconds)
        if (metrics := event.get("metrics")) and not event.get("model_of"):  # another model's stand in the cross-site table
            row.last[task] = metrics
            for name, value in metrics.items():
                if (amount := as_number(value)) is not None:
                    self.metrics.setdefault((task, name), Columns()).add(index, round + 1, amount)

    def _add_record(self, event: Event) -> None:
        site, key, value, kind = str(event.get("site", "")), str(event.get("key", "")), event.get("value"), event.get("kind", "scalar")
        index = self.site(site)
        if kind == "scalar" and (amount := as_number(value)) is not None:
            self.tracked.setdefault(key, Tracked()).add(index, event.get("step"), amount)
        elif kind in ("param", "tag"):
            if (key, text := _as_text(value)) in self.params or len(self.params) < MAX_ROWS:
                self.params.setdefault((key, text), set()).add(index)
        elif kind == "log":
            self.logs.append(event)
        elif (key, site) in self.texts or len(self.texts) < MAX_ROWS:
            self.texts[key, site] = (str(kind), value)


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        run = json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is not a run folder: {error}", hint="Every run leaves a run.json in its own.") from error
    if not isinstance(run, dict):
        raise ConfigError(f"{folder / 'run.json'} holds a {type(run).__name__}: it must be an object")
    return run


def _listed_sites(run: Event) -> list[str]:
    sites = run.get("sites")
    return [str(name) for name in sites] if isinstance(sites, list) else []


def _view(run: Event, history: History, folder: Path) -> dict[str, Any]:
    """What the template shows, by name."""
    job = run.get("job") or {}
    best = run.get("best")
    rounds = run.get("rounds") or {}
    sites = run.get("sites")
    count = max(len(history.sites), int(sites.get("count", 0)) if isinstance(sites, dict) else 0)
    charts = _metric_charts(history, best["metric"] if best else "")
    shown = _sites_shown(history.sites)
    described, described_left_out = statistics_section(history.statistics)
    return {
        "run": run,
        "job": job,
        "status": str(run.get("status", "unknown")),
        "reason": str(run.get("reason") or ""),
        "sentence": _sentence(run, len(history.rounds), count, history),
        "best": best,
        "done": rounds.get("done", len(history.rounds)),
        "total": rounds.get("total"),
        "site_count": count,
        "seconds": _total_seconds(run, history),
        "virtual_s": _simulated_seconds(history),
        "participation": _participation(history.rounds),
        "failure_count": sum(history.failure_codes.values()),
        "failures": history.failures,
        "failure_codes": history.failure_codes.most_common(8),
        "charts": charts[:MAX_CHARTS],
        "charts_left_out": [chart.title for chart in charts[MAX_CHARTS:]],
        "times": _time_chart(history),
        "slowest": _slowest(history.sites),
        "sites": shown,
        "sites_cut": len(history.sites) - len(shown),
        "site_metrics": _site_metrics(history)[:6],
        "matrices": _matrices(history.cross_site),
        "described": described,
        "described_left_out": described_left_out,
        "tracked": [_tracked_chart(key, tracked, history) for key, tracked in list(history.tracked.items())[:MAX_TRACKED]],
        "tracked_left_out": list(history.tracked)[MAX_TRACKED:],
        "params": [(key, value, _named(where, history.sites)) for (key, value), where in history.params.items()],
        "texts": [(key, site, kind, _as_text(value)[:MAX_TEXT]) for (key, site), (kind, value) in history.texts.items()],
        "logs": history.logs,
        "messages": history.messages,
        "arguments": [(name, _as_text(value)) for name, value in (job.get("arguments") or {}).items()],
        "versions": sorted({"hanse": run.get("hanse") or "–", **(run.get("versions") or {})}.items()),
        "again": _again(run, count),
        "resume": history.resume or f"hanse resume {shlex.quote(str(folder))}",
        "folder": folder.resolve().name,
        "max_text": MAX_TEXT,
        "few": FEW,
    }


def _again(run: Event, count: int) -> str:
    """The command that runs the job anew, with as many sites or those of the same names."""
    environment = run.get("environment") or {}
    sites = ",".join(map(str, environment.get("sites") or ())) or str(environment.get("num_clients") or count)
    threads = f" --threads {environment['threads']}" if environment.get("threads", 1) != 1 else ""
    return f"hanse run job --sites {shlex.quote(sites)}{threads}"


def _sentence(run: Event, seen_rounds: int, count: int, history: History) -> str:
    job, rounds, best = run.get("job") or {}, run.get("rounds") or {}, run.get("best")
    done, total = rounds.get("done", seen_rounds), rounds.get("total")
    of = f"{done:,} of {plural(total, 'round')}" if total is not None and total != done else plural(done, "round")
    recipe = job.get("recipe") or "The job"
    with_sites = f" with {plural(count, 'site')}" if count else ""
    spent = _total_seconds(run, history)
    within = "" if math.isnan(spent) else f" in {duration(spent)}"
    match run.get("status"):
        case "completed":
            text = f"{recipe}{with_sites} finished {of}{within}"
        case "failed":
            text = f"{recipe}{with_sites} failed after {of}{within and ', ' + within.strip()}"
        case "stopped":
            text = f"{recipe}{with_sites} was stopped after {of}{within and ', ' + within.strip()}"
        case _:
            text = f"{recipe}{with_sites} is running: {of} done"
    return f"{text}; best {best['metric']} {number(best['value'])}, in round {best['round'] + 1}." if best else f"{text}."


def _total_seconds(run: Event, history: History) -> float:
    started, ended = as_number(run.get("started")), as_number(run.get("ended"))
    if started and ended and ended >= started:
        return ended - started
    times = [as_number(event.get("seconds")) or 0.0 for event in history.rounds.values()]
    return math.fsum(times) if times else math.nan


def _simulated_seconds(history: History) -> float | None:
    """When the last round was committed, by the simulated clock; None if time was real."""
    last: Event = history.rounds[max(history.rounds)] if history.rounds else {}
    return as_number(last["virtual_s"]) if last.get("virtual_s") is not None else None


def _participation(rounds: Mapping[int, Event]) -> str:
    good = [int(event["good"]) for event in rounds.values() if "good" in event]
    if not good:
        return ""
    return f"{min(good):,} in every round" if min(good) == max(good) else f"{min(good):,} to {max(good):,} a round"


def _metric_charts(history: History, best_metric: str) -> list[Chart]:
    """One chart a metric; one a metric and task where several tasks carry the same name. The job's own metric first."""
    overall: dict[str, list[tuple[int, float]]] = {}
    for round, event in sorted(history.rounds.items()):
        for name, value in (event.get("metrics") or {}).items():
            if (amount := as_number(value)) is not None:
                overall.setdefault(name, []).append((round + 1, amount))
    names = dict.fromkeys([*overall, *(metric for _, metric in history.metrics)])
    charts = []
    for name in sorted(names, key=lambda name: name != best_metric):
        line = Points(*np.array(overall[name], dtype=float).T) if name in overall else None
        by_task = {task: columns for (task, metric), columns in history.metrics.items() if metric == name}
        owner = _task_of(line, by_task)
        for task, columns in sorted(by_task.items(), key=lambda item: item[0] != owner) or [("", Columns())]:
            mine = line if task == owner else None
            charts.append(
                curves(
                    f"{name}, {task}" if len(by_task) > 1 else name,
                    columns,
                    [row.name for row in history.sites],
                    subtitle=f"{task} tasks, by round" if task else "by round",
                    x_label="round",
                    bold=columns.mean() if mine is None else mine,
                    bold_label="mean of sites" if mine is None else "global",
                    max_points=3000,
                )
            )
    return charts


def _task_of(line: Points | None, by_task: Mapping[str, Columns]) -> str:
    """The task that a global curve belongs to: a round's metrics do not say it, so the one whose sites' mean lies closest."""
    if line is None or len(by_task) < 2:
        return next(iter(by_task), "")

    def distance(task: str) -> float:
        mean = by_task[task].mean()
        gaps = np.abs(np.interp(line.x, mean.x, mean.y) - line.y) if len(mean.x) else np.full(1, np.inf)
        return float(np.nanmean(gaps)) if np.isfinite(gaps).any() else math.inf

    return min(by_task, key=distance)


def _time_chart(history: History) -> Chart | None:
    walls = [(round + 1, as_number(event.get("seconds"))) for round, event in sorted(history.rounds.items())]
    timed = [(round, seconds) for round, seconds in walls if seconds is not None]
    if not timed:
        return None
    lines = {}
    if history.seconds:
        task, columns = max(history.seconds.items(), key=lambda item: sum(item[1].value))
        groups = columns.by_x()
        x = np.array([x for x, _ in groups])
        lines[f"slowest site, {task}"] = Points(x, np.array([seconds.max() for _, seconds in groups]))
        lines[f"median site, {task}"] = Points(x, np.array([np.median(seconds) for _, seconds in groups]))
    return bars(
        "Seconds a round",
        Points(*np.array(timed, dtype=float).T),
        lines,
        subtitle="wall time, and the work at the sites",
        x_label="round",
        bar_label="whole round",
    )


def _tracked_chart(key: str, tracked: Tracked, history: History) -> Chart:
    columns, x_label = (tracked.steps, "step") if tracked.rising else (tracked.order, "value")
    several = len(tracked.last) > 1
    return curves(
        key,
        columns,
        [row.name for row in history.sites],
        subtitle=f"by {x_label}, {plural(len(tracked.last), 'site')}",
        x_label=x_label,
        bold=columns.mean() if several and len(tracked.last) > 8 else None,
        bold_label="mean of sites",
        max_points=1200,
    )


def _sites_shown(sites: Sequence[SiteRow]) -> list[SiteRow]:
    if len(sites) <= MAX_SITES:
        return sorted(sites, key=lambda row: in_order(row.name))
    return sorted(sites, key=lambda row: (-row.failures, -(row.mean_seconds if row.updates else 0.0)))[:CUT_SITES]


def _slowest(sites: Sequence[SiteRow]) -> list[tuple[SiteRow, float]]:
    """The eight slowest sites by mean seconds, each with its share of the slowest one's time, in percent."""
    timed = sorted((row for row in sites if row.updates and row.seconds > 0), key=lambda row: -row.mean_seconds)[:8]
    return [(row, 100 * row.mean_seconds / timed[0].mean_seconds) for row in timed]


def _site_metrics(history: History) -> list[tuple[str, str, str]]:
    """The columns of the sites table: task, metric, heading."""
    names = Counter(name for _, name in history.metrics)
    return [(task, name, f"{name}, {task}" if names[name] > 1 else name) for task, name in history.metrics]


def _matrices(event: Event | None) -> list[dict[str, Any]]:
    """One table a metric: a row a model, a column a site, each cell its value and its heat from 0 to 9."""
    scores = (event or {}).get("scores") or {}
    sites = list(dict.fromkeys(site for row in scores.values() for site in row))
    metrics = list(dict.fromkeys(name for row in scores.values() for cell in row.values() for name in cell))
    tables = []
    for metric in metrics:
        rows = {model: [as_number(row.get(site, {}).get(metric, "")) for site in sites] for model, row in scores.items()}
        known = [value for row in rows.values() for value in row if value is not None and math.isfinite(value)]
        low, high = (min(known), max(known)) if known else (0.0, 0.0)

        def heat(value: float | None, low: float = low, high: float = high) -> int:
            return round(9 * (value - low) / (high - low)) if value is not None and math.isfinite(value) and high > low else 0

        tables.append(
            {
                "metric": metric,
                "sites": sites[:MAX_CELLS],
                "rows": [(model, [(value, heat(value)) for value in row[:MAX_CELLS]]) for model, row in list(rows.items())[:MAX_CELLS]],
                "cut": len(sites) > MAX_CELLS or len(rows) > MAX_CELLS,
                "size": f"{plural(len(rows), 'model')} on {plural(len(sites), 'site')}",
                "low": low,
                "high": high,
            }
        )
    return tables


def _named(where: set[int], sites: Sequence[SiteRow]) -> str:
    if len(where) > 4:
        return plural(len(where), "site")
    return ", ".join(sites[index].name for index in sorted(where))


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _moment(seconds: float | None) -> str:
    """A Unix time as a person reads it, in UTC."""
    amount = as_number(seconds)
    return time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(amount)).lstrip("0") if amount and math.isfinite(amount) else "–"


def _printable_value(value: object) -> object:
    """What Jinja puts out, before it escapes it; what is already escaped passes."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _csp_hash(style: str) -> str:
    """A style sheet as a Content-Security-Policy names it, so that no other style may act on the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
