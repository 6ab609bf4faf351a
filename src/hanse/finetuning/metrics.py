"""How good a version is on labelled rows: rates with intervals, over all rows and slice by slice. And the scores they come from, as a file.

docs/gate.md has the conventions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import blake3
import msgspec
import numpy as np

from hanse.errors import ConfigError, WireError
from hanse.messages import codec
from hanse.messages.flmodel import FLModel
from hanse.seeds import generator
from hanse.statistics.error_rates import Array, checked, eer, rates
from hanse.statistics.intervals import bootstrap, bounds, wilson

RATES = ("hter", "eer", "fpr", "fnr", "accuracy")

ALIASES: Mapping[str, Mapping[str, tuple[str, bool]]] = {
    "presentation attacks": {"fpr": ("BPCER", False), "fnr": ("APCER", False), "hter": ("ACER", False)},
    "access": {"fpr": ("FRR", False), "fnr": ("FAR", False)},
    "medicine": {"fpr": ("specificity", True), "fnr": ("sensitivity", True)},
}
"""What a sector calls a rate, and whether its word is for 1 minus the rate. The positive class is the anomaly: an attack, an impostor, a
finding. So a false acceptance (FAR) is a false negative here."""


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rate with its interval, each a share of 1. None: no row could count, or the interval is not known."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The figures of some rows. positive_share: positives of all rows, without which accuracy says nothing."""

    positives: int
    negatives: int
    positive_share: float | None
    hter: Figure
    eer: Figure
    fpr: Figure
    fnr: Figure
    accuracy: Figure


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A version on some rows. slices: column, then value, then the figures of its rows. threshold: at which all but eer are taken.

    equal_error_threshold: where FPR = FNR on these rows; None if a class is absent. Intervals have the level `level`: of fpr, fnr and
    accuracy Wilson's, of hter and eer (and of all if `grouped`) from `resamples` bootstrap draws that come of the seed.
    """

    threshold: float
    equal_error_threshold: float | None
    overall: Figures
    slices: dict[str, dict[str, Figures]]
    grouped: bool
    level: float
    resamples: int
    seed: int


def evaluate(
    scores: Array,
    labels: Array,
    threshold: float,
    *,
    slices: Mapping[str, Sequence[str]] | None = None,
    groups: Sequence[str] | None = None,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Evaluation:
    """The figures of all rows and of each value of each slice column. The same arguments give the same bits.

    scores: float in [0, 1], shape (n,). labels: 0 or 1, shape (n,). slices, groups: one value a row.
    Raises ConfigError for rows that are none.
    """
    scores, labels = checked(scores, labels)
    rows = Scores([], labels, scores, slices or {}, groups)
    _check_columns(rows)

    def figures(chosen: Array, *name: str) -> Figures:
        members = None if groups is None else [groups[row] for row in chosen]
        rng = generator(seed, "evaluate", *name)
        return _figures(scores[chosen], labels[chosen], threshold, members, resamples, level, rng)

    crossing = eer(scores, labels)[1]
    return Evaluation(
        threshold=threshold,
        equal_error_threshold=_known(crossing),
        overall=figures(np.arange(len(labels))),
        slices={
            column: {value: figures(chosen, column, value) for value, chosen in rows_by_value(values).items()}
            for column, values in rows.slices.items()
        },
        grouped=groups is not None,
        level=level,
        resamples=resamples,
        seed=seed,
    )


def rows_by_value(values: Sequence[str]) -> dict[str, Array]:
    """The numbers of the rows of each value, values in order."""
    column = np.asarray(values, str)
    return {str(value): np.flatnonzero(column == value) for value in np.unique(column)}


def table(evaluation: Evaluation, *, sector: str = "") -> list[dict[str, str]]:
    """One line for all rows and one for each slice, heading to cell, in percent. sector: one of ALIASES, for its names of the rates."""
    if sector and sector not in ALIASES:
        raise ConfigError(f"sector is {sector!r}: it must be one of {', '.join(ALIASES)}")
    names = ALIASES.get(sector, {})
    lines = [_line("all", evaluation.overall, names)]
    for column, values in evaluation.slices.items():
        lines += [_line(f"{column} = {value}", figures, names) for value, figures in values.items()]
    return lines


def in_percent(figure: Figure, *, complement: bool = False) -> str:
    """Such as `1.43 (1.12–1.80)`."""
    value, low, high = figure.value, figure.low, figure.high
    if value is None:
        return "–"
    if complement:
        value, low, high = 1 - value, None if high is None else 1 - high, None if low is None else 1 - low
    return f"{100 * value:.2f}" if low is None or high is None else f"{100 * value:.2f} ({100 * low:.2f}–{100 * high:.2f})"


@dataclass(frozen=True, eq=False)
class Scores:
    """What a version gave each row of a labelled set. names: of the rows. slices, groups: one value a row.

    labels: int64, 0 or 1, shape (n,). scores: float64 in [0, 1], shape (n,).
    """

    names: Sequence[str]
    labels: Array
    scores: Array
    slices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    groups: Sequence[str] | None = None

    @cached_property
    def rows_digest(self) -> str:
        """BLAKE3 of the rows without the scores, as `blake3:` and 64 hexadecimal digits: the same for every version on the same set."""
        text = [list(self.names), self.labels.tolist(), {name: list(self.slices[name]) for name in sorted(self.slices)}]
        return _digest(json.dumps([*text, None if self.groups is None else list(self.groups)]).encode())

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of the rows and the scores."""
        return _digest(self.rows_digest.encode() + np.asarray(self.scores, "<f8").tobytes())


class _Fields(msgspec.Struct, forbid_unknown_fields=True):
    names: list[str]
    slices: dict[str, list[str]]
    groups: list[str] | None


def write_scores(path: Path, scores: Scores) -> None:
    """Write them as a safetensors file, whole or not at all. Raises ConfigError for rows that are none."""
    values, labels = checked(scores.scores, scores.labels)
    _check_columns(scores)
    if len(scores.names) != len(labels):
        raise ConfigError(f"there are {len(labels):,} rows, and {len(scores.names):,} names")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: list(column) for name, column in scores.slices.items()}
    groups = None if scores.groups is None else list(scores.groups)
    codec.write(path, FLModel({"labels": labels, "scores": values}), {"names": list(scores.names), "slices": columns, "groups": groups})


def read_scores(path: Path) -> Scores:
    """What `write_scores` wrote. Raises ConfigError that names the file."""
    try:
        model, fields = codec.read(path)
        about = msgspec.convert(fields, _Fields)
        values, labels = checked(model.params["scores"], model.params["labels"])
        scores = Scores(about.names, labels, values, about.slices, about.groups)
        _check_columns(scores)
    except (OSError, WireError, ConfigError, msgspec.ValidationError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no scores: {error}") from error
    return scores


def keep_scores(folder: Path, scores: Scores) -> Path:
    """Write them to a file in the folder that has their digest's name, for `reproduce` to find."""
    path = scores_file(folder, scores.digest)
    if not path.exists():
        write_scores(path, scores)
    return path


def scores_file(folder: Path, digest: str) -> Path:
    """Where `keep_scores` keeps the scores of this digest."""
    return folder / f"{digest.removeprefix('blake3:')}.safetensors"


def _figures(
    scores: Array, labels: Array, threshold: float, groups: Sequence[str] | None, resamples: int, level: float, rng: np.random.Generator
) -> Figures:
    at = rates(scores, labels, threshold)
    figures = {name: Figure(_known(getattr(at, name))) for name in ("fpr", "fnr", "hter", "accuracy")}
    figures["eer"] = Figure(_known(eer(scores, labels)[0]))
    if at.positives and at.negatives:
        draws = bootstrap(scores, labels, threshold, resamples=resamples, rng=rng, groups=groups)
        figures = {name: Figure(figure.value, *bounds(draws[name], level=level)) for name, figure in figures.items()}
    if groups is None:
        for name, trials in (("fpr", at.negatives), ("fnr", at.positives), ("accuracy", len(labels))):
            if trials:
                share = getattr(at, name)
                figures[name] = Figure(share, *wilson(round(share * trials), trials, level=level))
    return Figures(
        positives=at.positives,
        negatives=at.negatives,
        positive_share=_known(at.positives / len(labels) if len(labels) else math.nan),
        **figures,
    )


def _line(name: str, figures: Figures, names: Mapping[str, tuple[str, bool]]) -> dict[str, str]:
    positives = f"{figures.positives:,}" + ("" if figures.positive_share is None else f" ({100 * figures.positive_share:.3g} %)")
    line = {"rows": name, "negatives": f"{figures.negatives:,}", "positives": positives}
    for rate in RATES:
        heading, complement = names.get(rate, (rate.upper() if rate != "accuracy" else rate, False))
        line[f"{heading} %"] = in_percent(getattr(figures, rate), complement=complement)
    return line


def _check_columns(rows: Scores) -> None:
    columns: dict[str, Any] = dict(rows.slices) | ({} if rows.groups is None else {"groups": rows.groups})
    for name, column in columns.items():
        if len(column) != len(rows.labels):
            raise ConfigError(f"there are {len(rows.labels):,} rows, and column {name!r} has {len(column):,}")


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _digest(data: bytes) -> str:
    return f"blake3:{blake3.blake3(data).hexdigest()}"
