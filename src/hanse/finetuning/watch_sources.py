"""Where a drift watch gets its inputs from: files of scores, a pipe, or a folder of images that the deployed version scores."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from hanse.errors import ConfigError, LinkBroken, Refused
from hanse.finetuning.reference import Reference, reference
from hanse.finetuning.watch import Alarm, Figures, Watch
from hanse.finetuning.webhook import Webhook

if TYPE_CHECKING:
    from hanse.finetuning.versions import Version

BATCH = 256
_EMBEDDING = "embedding"
SPOT_CHECKS = Path("labels", "spot-checks.csv")
_OWN = frozenset({"name", "score", "label", _EMBEDDING, "decision", "version", "time", "error", "file", "by", "when", "how"})


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Scored inputs, for `Watch.feed`. scores: float64, shape (n,). embeddings: float32, shape (n, d). labels: None where unknown.

    labels_alone: these are labels of inputs that come otherwise.
    """

    names: list[str]
    scores: npt.NDArray[np.float64]
    embeddings: npt.NDArray[np.float32] | None = None
    columns: dict[str, list[str]] = field(default_factory=dict)
    labels: list[int | None] | None = None
    labels_alone: bool = False


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    score: float
    label: int | None
    columns: Mapping[str, str]
    embedding: Sequence[float] | None


def read_scored(
    lines: Iterable[str], *, where: str, slices: Sequence[str] | None = None, version: str = "", batch: int = BATCH
) -> Iterator[Batch]:
    """Batches of scored inputs from the lines of a CSV file with a header, or of a JSONL file: the first character tells which.

    Columns: name, score, and if there are: label (0 or 1; empty or -1 where unknown), embedding_0, embedding_1, … (in JSONL also one list
    called embedding), and slices. The log of `hanse finetune serve` can be read, and the spot checks of `hanse finetune label`: what else
    they have is passed over, as are rows with an error in place of a score and, if `version` is given, rows of another version.
    where: the file's name, for errors. slices: the columns that are slices; None: all others.
    Raises ConfigError that names the line.
    """
    rows = (row for row in _rows(iter(lines), where, slices, version) if row is not None)
    while part := list(islice(rows, batch)):
        names = sorted({name for row in part for name in row.columns})
        embedded = [row.embedding for row in part if row.embedding is not None]
        if len({len(each) for each in embedded}) > 1:
            raise ConfigError(f"{where}: embeddings differ in length")
        yield Batch(
            [row.name for row in part],
            np.array([row.score for row in part]),
            np.array(embedded, np.float32) if len(embedded) == len(part) else None,
            {name: [row.columns.get(name, "") for row in part] for name in names},
            [row.label for row in part] if any(row.label is not None for row in part) else None,
        )


def _rows(lines: Iterator[str], where: str, slices: Sequence[str] | None, version: str) -> Iterator[_Row | None]:
    """One a line, None where it is passed over."""
    first = next(lines, "").removeprefix("\ufeff")
    whole = chain([first], lines)
    as_json = first.lstrip().startswith("{")
    records: Iterator[Any] = map(_json, whole) if as_json else map(_cells, csv.DictReader(whole, strict=True))
    for number in count(1 if as_json else 2):
        try:
            record = next(records)
            row = None if record is None else _row(record, slices, version)
        except StopIteration:
            return
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            what = f"there is no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{where}, line {number}: {what}", hint="Needed are name and score; see docs/drift.md.") from error
        yield row


def _json(line: str) -> Any:
    return msgspec.json.decode(line, type=dict[str, Any]) if line.strip() else None


def _cells(record: dict[str, Any]) -> dict[str, Any]:
    if None in record or None in record.values():
        raise ValueError("the line has not as many cells as the header")
    return record


def _row(record: Mapping[str, Any], slices: Sequence[str] | None, version: str) -> _Row | None:
    if record.get("error") or (version and record.get("version") not in (None, "", version)):
        return None
    score = float(record["score"])
    if not 0 <= score <= 1:
        raise ValueError(f"the score is {score:g}, not in 0…1")
    label = str(record.get("label", "")).strip()
    if label not in ("", "None", "-1", "0", "1"):
        raise ValueError(f"the label is {label[:20]!r}, not 0 or 1")
    columns = {name: str(value) for name, value in record.items() if _is_slice(name, slices)}
    return _Row(
        str(record["file"] if "file" in record else record["name"]),
        score,
        int(label) if label in ("0", "1") else None,
        columns,
        _embedding(record),
    )


def _is_slice(name: str, slices: Sequence[str] | None) -> bool:
    return name in slices if slices is not None else name not in _OWN and not name.startswith(f"{_EMBEDDING}_")


def _embedding(record: Mapping[str, Any]) -> list[float] | None:
    values = record.get(_EMBEDDING)
    if values is None:
        numbered = {int(name.removeprefix(f"{_EMBEDDING}_")): value for name, value in record.items() if name.startswith(f"{_EMBEDDING}_")}
        values = [numbered[place] for place in sorted(numbered)]
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("an embedding is not finite")
    return numbers or None


def spot_checks(folder: Path) -> Iterator[Batch]:
    """The labels of the spot checks in a project folder, so far."""
    if (path := folder / SPOT_CHECKS).is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for batch in read_scored(file, where=str(path), slices=()):
                yield replace(batch, labels_alone=True)


def score_folder(folder: Path, source: Path, watch: Watch) -> Iterator[Batch]:
    """Score what is in `source` and not counted yet with the version that is deployed in the project folder: images, or tables' rows.

    What cannot be read, such as a file that is still being written, is left for the next time.
    Raises ConfigError if nothing is deployed, or the reference is of another version.
    """
    from hanse.finetuning.contract import read_project
    from hanse.finetuning.data import UNKNOWN, Dataset, prepared
    from hanse.finetuning.models import embed, score
    from hanse.finetuning.scoring import Input, as_input
    from hanse.finetuning.serving import items_in, load_scorer, resizes

    version = version_of(folder)
    if watch.reference.model != version.digest:
        raise ConfigError(
            f"{version.digest} is deployed, and the reference is of {watch.reference.model or 'no version'}",
            hint="Ask the vendor for that version's.",
        )
    new = (item for item in items_in(source, version.schema) if watch.unseen([item.name]))
    resize, embedding, scorer = resizes(folder), read_project(folder).model.embedding, None
    while items := list(islice(new, BATCH)):
        inputs = [each for each in (as_input(item, version.schema, resize=resize) for item in items) if isinstance(each, Input)]
        if not inputs:
            continue
        scorer = scorer or load_scorer(folder, version.digest)
        names = [each.item.name for each in inputs]
        x = prepared(Dataset(np.stack([each.array for each in inputs]), np.full(len(names), UNKNOWN), names), version.schema)
        columns = {name: [each.item.columns.get(name, "") for each in inputs] for name in version.schema.slices}
        embeddings = embed(scorer.module, x, embedding) if watch.reference.dimension else None
        yield Batch(names, score(scorer.module, x), embeddings, columns, [each.item.label for each in inputs])


def reference_of_holdout(folder: Path, *, version: str = "", seed: int | None = None) -> Reference:
    """At the vendor: the reference of a version on the holdout that data.yaml names.

    version: the first digits of its digest; default the deployed one. seed: default the project's.
    """
    from hanse.finetuning.contract import read_project
    from hanse.finetuning.data import load, prepared, read_data
    from hanse.finetuning.models import embed, score
    from hanse.finetuning.serving import load_scorer

    of, project = version_of(folder, version), read_project(folder)
    if (spec := read_data(folder).holdout) is None:
        raise ConfigError(f"the data.yaml in {folder} names no holdout", hint="The reference is the vendor's to make.")
    rows = load(spec, of.schema, folder).labelled
    module, x = load_scorer(folder, of.digest).module, prepared(rows, of.schema)
    return reference(
        score(module, x),
        rows.labels,
        embed(module, x, project.model.embedding),
        of.threshold,
        seed=project.seed if seed is None else seed,
        slices={name: rows.columns[name] for name in of.schema.slices},
        model=of.digest,
    )


def reference_of_scores(path: Path, threshold: float, *, seed: int = 0, slices: Sequence[str] | None = None, model: str = "") -> Reference:
    """The reference of a file of scored rows that all have labels; see `read_scored`."""
    with path.open(encoding="utf-8", newline="") as file:
        batches = list(read_scored(file, where=str(path), slices=slices))
    labels = [label for batch in batches for label in batch.labels or [None] * len(batch.names)]
    if not labels or None in labels:
        raise ConfigError(f"{path}: each row of a holdout needs a label, 0 or 1")
    embeddings = [batch.embeddings for batch in batches if batch.embeddings is not None]
    return reference(
        np.concatenate([batch.scores for batch in batches]),
        np.array(labels),
        np.concatenate(embeddings) if len(embeddings) == len(batches) else None,
        threshold,
        seed=seed,
        slices={name: [value for batch in batches for value in batch.columns[name]] for name in batches[0].columns},
        model=model,
    )


def follow(
    watch: Watch,
    batches: Callable[[], Iterable[Batch]],
    *,
    told: Callable[[Figures | Alarm], object],
    warn: Callable[[str], object] = lambda text: None,
    hook: Webhook | None = None,
    interval_s: float | None = None,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Feed all batches, then again after `interval_s`, for ever; once if that is None.

    Each window and each alarm is told at once, and alarms are sent by the hook. One that cannot be sent is kept and tried again each round.
    """
    while True:
        _send(watch, hook, warn)
        for batch in batches():
            before = watch.counts()["windows"]
            values = (batch.names, batch.scores, batch.embeddings, batch.columns, batch.labels)
            raised = watch.feed(*values, labels_alone=batch.labels_alone)
            for figures in watch.windows(before):
                told(figures)
            for alarm in raised:
                told(alarm)
            if raised:
                _send(watch, hook, warn)
        if interval_s is None:
            return
        wait(interval_s)


def _send(watch: Watch, hook: Webhook | None, warn: Callable[[str], object]) -> None:
    if hook is None:
        return
    try:
        watch.send(hook)
    except (Refused, LinkBroken) as error:
        warn(str(error))


def version_of(folder: Path, prefix: str = "") -> Version:
    """The version whose digest begins so; the deployed one without. Raises ConfigError if there is none."""
    from hanse.finetuning.versions import Versions

    versions = Versions(folder)
    if (version := versions.get(prefix) if prefix else versions.current) is None:
        raise ConfigError(f"no version is deployed in {folder}", hint="`hanse finetune versions list` shows those that are there.")
    return version
