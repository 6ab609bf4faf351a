"""What a person sees while a job runs: one line a round, failures as they come, and where everything is at the end.

No thread is started here, for the process forks its workers. What sites wrote is printed without any character that could steer a terminal.
Rounds are printed counting from 1.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from hanse.errors import ConfigError
from hanse.server.events import Event, one_by_one
from hanse.server.wording import as_number, duration, in_order, number, one_line, plural, printable

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

MODES = ("auto", "plain", "rich", "json", "quiet")
PLAIN_WIDTH = 80
MAX_FAILURES = 10  # lines a round; the rest are summed up
MAX_SITES = 12  # rows of the closing table; more sites are summed up
REDRAW_S = 0.05  # least time between two drawings of the progress line

Part = tuple[str, str]  # text and its style


class Console:
    """Shows a job's events as they happen: `show` each one, `progress` within a round.

    mode: rich, coloured and with a progress line; plain, text only; json, each event as one line of JSON and nothing else; quiet, nothing;
        auto, rich on a terminal and plain elsewhere.
    file: where to, standard output unless given.
    Raises: ConfigError if there is no such mode.
    """

    def __init__(self, mode: str = "auto", file: TextIO | None = None) -> None:
        if mode not in MODES:
            raise ConfigError(f"console mode is {mode!r}: it must be one of {', '.join(MODES)}")
        self._file = sys.stdout if file is None else file
        self.mode = ("rich" if _is_able(self._file) else "plain") if mode == "auto" else mode
        self._rich = _rich_console(self._file) if self.mode == "rich" else None
        self._total: int | None = None
        self._started: float | None = None
        self._failures: Counter[str] = Counter()  # of the current round, by code
        self._failing_round: int | None = None
        self._sites = _Sites()
        self._line_shown = False
        self._drawn_at = -math.inf

    def show(self, event: Event) -> None:
        """Show one event of `metrics.jsonl`. The event "end" may also hold folder, model, best, report, and resume, a command.

        If nobody reads any more, as after `| head`, the console falls silent and the job goes on.
        """
        if self.mode == "quiet":
            return
        try:
            for each in one_by_one(event):
                self._show(each)
        except BrokenPipeError:
            self.mode, self._rich = "quiet", None
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())  # so that nothing is left to fail at exit

    def _show(self, event: Event) -> None:
        if self.mode == "json":
            self._file.write(json.dumps(_json_value(event)) + "\n")
            self._file.flush()
            return
        match event.get("event"):
            case "start":
                self._start(event)
            case "update":
                self._sites.add(event)
            case "failure":
                self._failure(event)
            case "round":
                self._round(event)
            case "cross_site":
                self._cross_site(event.get("scores") or {})
            case "message":
                level = str(event.get("level", "info"))
                style = {"warning": "yellow", "error": "red"}.get(level, "")
                self._print(("" if level == "info" else f"{level}: ", style), (printable(str(event.get("text", ""))), style))
            case "end":
                self._end(event)

    def progress(self, round: int, done: int, total: int) -> None:
        """Draw how far a round is, over the line drawn before; on a terminal only. Cheap enough to call for every update."""
        if self._rich is None or time.monotonic() - self._drawn_at < REDRAW_S:
            return
        bar = "━" * (24 * done // max(total, 1))
        of = "" if self._total is None else f"/{self._total}"
        text = f"round {round + 1}{of}  {bar:<24}  {done:,}/{total:,} sites"
        self._file.write(f"\r{text[: self._width - 1]}\x1b[K")
        self._file.flush()
        self._line_shown, self._drawn_at = True, time.monotonic()

    def _start(self, event: Event) -> None:
        self._total, self._started = event.get("rounds"), as_number(event.get("time"))
        facts = [plural(int(event.get("sites") or 0), "site")]
        facts += [plural(event[name], name.removesuffix("s")) for name in ("workers", "rounds") if event.get(name)]
        facts += [f"seed {event['seed']}"] if event.get("seed") is not None else []
        facts += [f"resumed after {plural(event['resumed'], 'commit')}"] if event.get("resumed") else []
        self._print((one_line(str(event.get("job", "job")), 40), "bold"), (": " + ", ".join(facts), ""))

    def _failure(self, event: Event) -> None:
        if event.get("round") != self._failing_round:
            self._sum_up_failures()
            self._failing_round = event.get("round")
        code = one_line(str(event.get("code", "")), 40)
        self._failures[code] += 1
        self._sites.failed(str(event.get("site", "")))
        if self._failures.total() <= MAX_FAILURES:
            lead = f"  {one_line(str(event.get('site', '')), 30)} failed: "
            room = self._width - len(lead) if self.mode == "rich" else 200
            self._print((lead, "red"), (one_line(f"{code}: {event.get('message', '')}", room), "red"))

    def _sum_up_failures(self) -> None:
        if (more := self._failures.total() - MAX_FAILURES) > 0:
            counts = ", ".join(f"{code} {count:,}" for code, count in self._failures.most_common(3))
            self._print((f"  and {more:,} more failed; in all {counts}{', …' if len(self._failures) > 3 else ''}", "red"))
        self._failures.clear()
        self._failing_round = None

    def _round(self, event: Event) -> None:
        self._sum_up_failures()
        good, asked = int(event.get("good", 0)), int(event.get("asked", 0))
        digits = len(str(self._total or ""))
        at = f"round {int(event.get('round') or 0) + 1:>{digits}}" + ("" if self._total is None else f"/{self._total}")
        parts: list[Part] = [
            (at, "bold"),
            (" * " if event.get("best") else "   ", "bold green"),
            (f"{duration(as_number(event.get('seconds')) or 0.0):>8}", "dim"),
            (f"  {good:>{len(str(asked))},}/{asked:,} sites", "" if good == asked else "yellow"),
        ]
        if (simulated := event.get("virtual_s")) is not None:
            parts.append((f"  {duration(as_number(simulated) or 0.0)} simulated", ""))
        room = self._width - sum(len(text) for text, _ in parts)
        metrics = [(one_line(str(name), 24), f"{number(value):<6}") for name, value in (event.get("metrics") or {}).items()]
        for index, (name, value) in enumerate(metrics):
            left = len(metrics) - index - 1
            text = f"  {name} {value}"
            if len(text) + (len(f"  +{left}") if left else 0) > room:
                parts.append((f"  +{left + 1}", "dim"))
                break
            parts += [(f"  {name} ", "dim"), (value, "")]
            room -= len(text)
        self._print(*parts)

    def _cross_site(self, scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """A table for each metric, models down and sites across, where there are few."""
        sites = sorted({site for row in scores.values() for site in row}, key=in_order)
        self._print(("cross-site  ", "bold"), (f"{plural(len(scores), 'model')} measured on {plural(len(sites), 'site')}", ""))
        if max(len(sites), len(scores)) > MAX_SITES + 1:
            return
        for metric in dict.fromkeys(metric for row in scores.values() for metrics in row.values() for metric in metrics):
            rows = [[model, *(number(row.get(site, {}).get(metric)) for site in sites)] for model, row in scores.items()]
            self._print()
            for index, line in enumerate(_aligned([[f"{metric} of", *sites], *rows], self._width)):
                self._print((line, "bold" if index == 0 else ""))

    def _end(self, event: Event) -> None:
        self._sum_up_failures()
        if rows := self._sites.table():
            self._print()
            for index, row in enumerate(_aligned(rows, self._width)):
                self._print((row, "bold" if index == 0 else ""))
        status, best = one_line(str(event.get("status", "ended")), 20), event.get("best")
        ended = as_number(event.get("time"))
        within = f" in {duration(ended - self._started)}" if ended and self._started and ended >= self._started else ""
        style = {"completed": "bold green", "failed": "bold red", "stopped": "bold yellow"}.get(status, "bold")
        self._print()
        self._print((status, style), (within, ""))
        for line in printable(str(event.get("reason") or "")).splitlines():
            self._print((f"  {line}", "red" if status == "failed" else ""))
        if isinstance(best, Mapping):
            in_round = "" if best.get("round") is None else f" in round {best['round'] + 1}"
            self._fact("best", f"{one_line(str(best.get('metric', '')), 40)} {number(best.get('value'))}{in_round}")
        for name in ("model", "report", "folder"):
            self._fact(name, event.get(name))
        if status != "completed":
            self._fact("go on", event.get("resume"))

    def _fact(self, name: str, value: object) -> None:
        if value:
            self._print((f"  {name:<7} ", "dim"), (printable(str(value)), ""))

    @property
    def _width(self) -> int:
        return PLAIN_WIDTH if self._rich is None else max(self._rich.width, 40)

    def _print(self, *parts: Part) -> None:
        if self._rich is None:
            text = "".join(text for text, _ in parts).rstrip() + "\n"
            encoding = getattr(self._file, "encoding", None) or "utf-8"
            self._file.write(text.encode(encoding, "replace").decode(encoding))
        else:
            from rich.text import Text

            if self._line_shown:
                self._file.write("\r\x1b[K")
                self._line_shown = False
            self._rich.print(Text.assemble(*parts), soft_wrap=True)  # as Text, for what sites wrote is no markup
        self._file.flush()


@dataclass(slots=True)
class _Spread:
    """Smallest, mean and largest of what was added; NaN is passed over."""

    low: float = math.inf
    high: float = -math.inf
    total: float = 0.0
    count: int = 0

    def add(self, value: float | None) -> None:
        if value is not None and not math.isnan(value):
            self.low, self.high = min(self.low, value), max(self.high, value)
            self.total += value
            self.count += 1


@dataclass(slots=True)
class _Row:
    seconds: _Spread = field(default_factory=_Spread)
    failures: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Sites:
    """What the closing table needs: of few sites a row each, of many only the spread of their last round, so memory stays small."""

    rows: dict[str, _Row] = field(default_factory=dict)
    many: bool = False
    round: int | None = None
    seconds: _Spread = field(default_factory=_Spread)
    spreads: dict[str, _Spread] = field(default_factory=dict)

    def row(self, site: str) -> _Row | None:
        if site not in self.rows and not self.many:
            self.many = len(self.rows) == MAX_SITES
            if self.many:
                self.rows.clear()
            else:
                self.rows[site] = _Row()
        return self.rows.get(site)

    def failed(self, site: str) -> None:
        if row := self.row(site):
            row.failures += 1

    def add(self, event: Event) -> None:
        measured = {} if event.get("model_of") else event.get("metrics") or {}  # another model's stand in the cross-site table
        metrics = {_heading(name, event): value for name, value in measured.items()}
        seconds = as_number(event.get("seconds"))
        if row := self.row(str(event.get("site", ""))):
            row.seconds.add(seconds)
            row.metrics |= metrics
        if event.get("round") != self.round:
            self.round, self.seconds, self.spreads = event.get("round"), _Spread(), {}
        self.seconds.add(seconds)
        for name, value in metrics.items():
            self.spreads.setdefault(name, _Spread()).add(as_number(value))

    def table(self) -> list[list[str]]:
        """The heading and the rows; nothing if no site answered or failed."""
        if self.many:
            named = [("time", self.seconds, duration), *((name, spread, number) for name, spread in self.spreads.items())]
            body = [[name, text(s.low), text(s.total / s.count), text(s.high)] for name, s, text in named if s.count]
            return [["sites, last round", "lowest", "mean", "highest"], *body] if body else []
        if not self.rows:
            return []
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row.metrics))
        heading = ["site", *(["failed"] if any(row.failures for row in self.rows.values()) else []), "mean time", *names]
        body = []
        for site, row in sorted(self.rows.items(), key=lambda item: in_order(item[0])):
            failed = [str(row.failures)] if "failed" in heading[:2] else []
            mean = duration(row.seconds.total / row.seconds.count) if row.seconds.count else "–"
            body.append([one_line(site, 24), *failed, mean, *(number(row.metrics.get(name)) for name in names)])
        return [heading, *body]


def _heading(metric: str, event: Event) -> str:
    """A metric's name in the closing table: training tasks need no mention."""
    task = event.get("task", "train")
    return one_line(metric if task == "train" else f"{metric}, {task}", 24)


def _aligned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A table as lines: the first column to the left, the others to the right; those that would pass `width` are left out."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    while len(widths) > 1 and 2 * len(widths) + sum(widths) > width:
        widths.pop()
    return [
        f"  {row[0]:<{widths[0]}}" + "".join(f"  {cell:>{cell_width}}" for cell, cell_width in zip(row[1:], widths[1:], strict=False))
        for row in rows
    ]


def _is_able(file: TextIO) -> bool:
    """Whether `file` is a terminal that can move its cursor and draw a bar."""
    return file.isatty() and os.environ.get("TERM") != "dumb" and "utf" in (file.encoding or "").lower()


def _rich_console(file: TextIO) -> RichConsole:
    """Rich, for the colours a terminal has; loaded only here, for it is slow to import."""
    from rich.console import Console as RichConsole

    width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if not file.isatty() else None
    return RichConsole(file=file, width=width, highlight=False, markup=False, emoji=False, force_terminal=True)


def _json_value(value: object) -> object:
    """`value` as strict JSON has it: null for a number that is not finite, NumPy's numbers as Python's, anything unknown as its text."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case Mapping():
            return {str(key): _json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_value(item) for item in value]
    item = getattr(value, "item", None)
    return _json_value(item()) if callable(item) and getattr(value, "size", 1) == 1 else str(value)
