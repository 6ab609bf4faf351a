"""Where a candidate decides otherwise than the current version: counts, shares and names, from the pairs that both have scored."""

from __future__ import annotations

import heapq
import importlib.resources
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from hanse.errors import ConfigError, NotInstalled
from hanse.finetuning.files import write_whole
from hanse.finetuning.routing import Pair
from hanse.server.wording import printable
from hanse.statistics.intervals import wilson
from hanse.statistics.paired import Changes, mcnemar

PAIRS = Path("scores") / "pairs"
REPORT = Path("reports") / "disagreement.html"
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
LISTED = 1000
"""So many inputs are named, those with the largest difference in score."""


class Share(msgspec.Struct, frozen=True):
    """count of `of`, with the Wilson 95 % interval of the share."""

    count: int
    of: int
    share: float
    low: float
    high: float


class Differing(msgspec.Struct, frozen=True):
    """How often the two decide otherwise. only_current: the current version alone decides positive; only_candidate: the candidate alone."""

    either: Share
    only_current: Share
    only_candidate: Share


class Labelled(msgspec.Struct, frozen=True):
    """Of the inputs whose label is known. current_right, candidate_right: so often each is right where they differ.

    p_value: of McNemar's exact test that both are right equally often.
    """

    inputs: int
    current_right: int
    candidate_right: int
    p_value: float


class Named(msgspec.Struct, frozen=True):
    """An input that the two decide otherwise."""

    name: str
    current_score: float
    candidate_score: float
    current_decision: int
    candidate_decision: int
    columns: Mapping[str, str]
    label: int | None


class Disagreement(msgspec.Struct, frozen=True, kw_only=True):
    """The report. inputs: that both scored, each counted once, the first time; lines: with the repeated ones. first, last: Unix seconds.

    p_value: of McNemar's exact test that both decide positive equally often. differences: quantiles of candidate score − current score.
    slices: by column and value. differing_inputs: at most LISTED, largest difference first.
    """

    current: str
    candidate: str
    inputs: int
    lines: int
    answered_by_candidate: int
    first: float
    last: float
    differing: Differing
    p_value: float
    differences: dict[str, float]
    slices: dict[str, dict[str, Differing]]
    labelled: Labelled | None
    differing_inputs: list[Named]


@dataclass(slots=True)
class _Tally:
    inputs: int = 0
    only_current: int = 0
    only_candidate: int = 0

    def add(self, pair: Pair) -> None:
        self.inputs += 1
        self.only_current += pair.current_decision > pair.candidate_decision
        self.only_candidate += pair.candidate_decision > pair.current_decision

    def result(self) -> Differing:
        counts = (self.only_current + self.only_candidate, self.only_current, self.only_candidate)
        return Differing(*(Share(count, self.inputs, count / self.inputs, *wilson(count, self.inputs)) for count in counts))


@dataclass(slots=True)
class _Labels:
    inputs: int = 0
    current_right: int = 0
    candidate_right: int = 0

    def add(self, pair: Pair) -> None:
        self.inputs += 1
        if pair.current_decision != pair.candidate_decision:
            self.current_right += pair.current_decision == pair.label
            self.candidate_right += pair.candidate_decision == pair.label

    def result(self) -> Labelled | None:
        right = self.current_right, self.candidate_right
        return Labelled(self.inputs, *right, mcnemar(Changes(*right))) if self.inputs else None


@dataclass(slots=True)
class _Largest:
    """The LISTED pairs with the largest difference in score."""

    heap: list[tuple[float, int, Pair]] = field(default_factory=list)
    seen: int = 0

    def add(self, pair: Pair) -> None:
        self.seen += 1
        entry = abs(pair.candidate_score - pair.current_score), -self.seen, pair
        (heapq.heappush if len(self.heap) < LISTED else heapq.heappushpop)(self.heap, entry)

    def result(self) -> list[Named]:
        fields = Named.__struct_fields__
        return [Named(*(getattr(pair, name) for name in fields)) for _, _, pair in sorted(self.heap, reverse=True)]


def disagreement(folder: Path, candidate: str = "") -> Disagreement:
    """The report on the comparison that was written last in this project folder.

    candidate: the first digits of the candidate's digest; empty: any. Raises ConfigError if there is nothing to compare.
    """
    total, labels, named = _Tally(), _Labels(), _Largest()
    slices: dict[str, dict[str, _Tally]] = {}
    differences, seen = array("d"), set[str]()
    lines = by_candidate = 0
    first = last = None
    for pair in read_pairs(_newest(folder, candidate)):
        lines += 1
        first, last = first or pair, pair
        if pair.input in seen:
            continue
        seen.add(pair.input)
        by_candidate += pair.answered_by == "candidate"
        total.add(pair)
        differences.append(pair.candidate_score - pair.current_score)
        for column, value in pair.columns.items():
            slices.setdefault(column, {}).setdefault(value, _Tally()).add(pair)
        if pair.label is not None:
            labels.add(pair)
        if pair.current_decision != pair.candidate_decision:
            named.add(pair)
    if first is None or last is None:
        raise _nothing(folder)
    return Disagreement(
        current=first.current,
        candidate=first.candidate,
        inputs=total.inputs,
        lines=lines,
        answered_by_candidate=by_candidate,
        first=first.time,
        last=last.time,
        differing=total.result(),
        p_value=mcnemar(Changes(total.only_current, total.only_candidate)),
        differences={f"{q:g}": value for q, value in zip(QUANTILES, np.quantile(differences, QUANTILES).tolist(), strict=True)},
        slices={column: {value: tally.result() for value, tally in sorted(tallies.items())} for column, tallies in sorted(slices.items())},
        labelled=labels.result(),
        differing_inputs=named.result(),
    )


def pairs_file(folder: Path, pair: Pair) -> Path:
    """Where the pairs of these two versions are kept."""
    return folder / PAIRS / f"{_digits(pair.current)}-{_digits(pair.candidate)}.jsonl"


def read_pairs(path: Path) -> Iterator[Pair]:
    """The file's pairs in order; a last line that a crash cut off is left out. Raises ConfigError, naming the line, for anything else."""
    decoder = msgspec.json.Decoder(Pair)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error


def words(found: Disagreement) -> list[str]:
    """The report in sentences."""
    both = found.differing
    lines = [
        f"{found.inputs:,} inputs were scored by both {_short(found.current)} (current) and {_short(found.candidate)} (candidate).",
        f"They decide {_said(both.either)} otherwise: {both.only_current.count:,} are positive for the current version alone,"
        f" {both.only_candidate.count:,} for the candidate alone.",
    ]
    if found.p_value < 0.05:
        more = "more" if both.only_candidate.count > both.only_current.count else "less"
        lines.append(f"The candidate decides positive {more} often (McNemar, p = {found.p_value:.2g}).")
    else:
        lines.append(f"That one decides positive more often than the other is not shown (McNemar, p = {found.p_value:.2g}).")
    if (known := found.labelled) is not None:
        lines.append(
            f"{known.inputs:,} of them are labelled. Where the two differ, the current version is right {known.current_right:,} times and"
            f" the candidate {known.candidate_right:,} times (McNemar, p = {known.p_value:.2g})."
        )
    return lines


def write_report(found: Disagreement, folder: Path) -> Path:
    """Write reports/disagreement.html and disagreement.json into the project folder; return the page's path. Raises NotInstalled."""
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise NotInstalled("the report needs the package jinja2", hint="Install it with: pip install 'hanse[finetuning]'") from error
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"short": _short, "said": _said, "moment": _moment, "printable": printable}
    text = importlib.resources.files("hanse.finetuning").joinpath("disagreement.html.j2").read_text(encoding="utf-8")
    path = folder / REPORT
    write_whole(path, page.from_string(text).render(found=found, words=words(found)).encode())
    write_whole(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(found)))
    return path


def _newest(folder: Path, candidate: str) -> Path:
    digits = _digits(candidate)
    found = [path for path in (folder / PAIRS).glob("*.jsonl") if path.stem.partition("-")[2].startswith(digits)]
    if not found:
        raise _nothing(folder)
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def _nothing(folder: Path) -> ConfigError:
    return ConfigError(f"{folder / PAIRS} holds no comparison", hint="`hanse finetune serve --shadow VERSION` makes one.")


def _digits(version: str) -> str:
    """The first 16 digits: enough to tell one project's versions apart, and short enough for a file name of two."""
    return version.removeprefix("blake3:")[:16]


def _short(version: str) -> str:
    return version.removeprefix("blake3:")[:12]


def _said(share: Share) -> str:
    return f"{share.count:,} of {share.of:,} ({share.share:.2%}; 95 % interval {share.low:.2%} to {share.high:.2%})"


def _moment(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")
