"""What people said of which image: `labels/` in a project folder, a hash-chained journal and the CSV file that follows from it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from hanse.errors import ConfigError, Refused, StorageFull
from hanse.seeds import generator
from hanse.site import ledger

How = Literal["band", "similar", "random", "spot"]
"""How an image came up: from the band of scores, as a neighbour of a confirmed anomaly, by chance among others, in a spot check."""

ANOMALY, NORMAL, UNSURE = 1, 0, -1


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """One image's label. label: 1 anomaly, 0 normal, -1 unsure. score: the model's, when it was labelled. when: UTC, ISO 8601.

    n: the line of the journal. window: the browser window it was given in. digest: of the image that was shown, `blake3:` and 64 digits.
    columns: what else is known of the image, such as its device.
    """

    file: str
    label: Literal[-1, 0, 1]
    how: How
    score: float
    by: str
    when: str
    n: int
    window: str = ""
    digest: str = ""
    columns: dict[str, str] = {}


_COLUMNS = ("file", "label", "by", "when", "how", "score")


class Labels:
    """The labels of a project, to be given by one process. by: who gives them.

    A label is in `labels/journal.jsonl`, a ledger of its own, before `give` returns; neither kill -9 nor a power cut takes it back.
    `labels/spot-checks.csv` has those of spot checks, `labels/labels.csv` all others; both leave out what people were unsure of.
    Raises ConfigError if another process labels in this project, WireError if the journal was altered.
    """

    def __init__(self, project: Path, *, by: str) -> None:
        self.folder, self.by = labels_folder(project), by
        self._journal = ledger.Ledger(self.folder / "journal.jsonl")
        self._given = replay(ledger.read(self._journal.path))
        self._write_csv()

    @property
    def given(self) -> Mapping[str, Label]:
        """The labels that stand, by file, in the order in which they were given."""
        return self._given

    def give(
        self, file: str, label: int, *, how: How, score: float, window: str = "", digest: str = "", columns: Mapping[str, str] | None = None
    ) -> Label:
        """Label a file. Raises Refused if it has a label, StorageFull if there is no room."""
        if (earlier := self._given.get(file)) is not None:
            raise Refused(f"{file} was labelled {words(earlier.label)} by {earlier.by}", hint="Undo that label first.")
        self._append("label", file=file, label=label, how=how, score=score, window=window, digest=digest, columns=dict(columns or {}))
        return self._given[file]

    def undo(self, file: str) -> Label:
        """Take back the label of a file, and return it. Raises Refused if it has none."""
        if (taken := self._given.get(file)) is None:
            raise Refused(f"{file} has no label to take back")
        self._append("undo", file=file, of=taken.n)
        return taken

    def close(self) -> None:
        """Let another process label."""
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _append(self, kind: str, **facts: Any) -> None:
        line = {"n": self._journal.head.lines, "kind": kind, **facts, "by": self.by, "when": _now()}
        given = replay([line], self._given)
        self._journal.append(**{name: value for name, value in line.items() if name != "n"})
        self._journal.sync()
        self._given = given
        self._write_csv()

    def _write_csv(self) -> None:
        spot = [each for each in self._given.values() if each.how == "spot"]
        write_csv(self.folder / "spot-checks.csv", spot)
        write_csv(self.folder / "labels.csv", (each for each in self._given.values() if each.how != "spot"))


def replay(lines: Iterable[Mapping[str, Any]], given: Mapping[str, Label] | None = None) -> dict[str, Label]:
    """The labels that stand after these lines of a journal, by file, in the order given; `given` stood before them.

    Raises ConfigError if a line is no line of such a journal, or undoes what is not there.
    """
    standing = dict(given or {})
    for line in lines:
        try:
            if line["kind"] == "label":
                label = msgspec.convert(line, Label)
                if standing.setdefault(label.file, label) is not label:
                    raise ValueError(f"{label.file} has a label")
            elif line["kind"] == "undo" and standing.pop(line["file"]).n != line["of"]:
                raise ValueError(f"{line['file']} has another label than the one of line {line['of']}")
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"the journal of labels, line {line.get('n', '?')}: {error}", hint="Its lines must be as they were written."
            ) from error
    return standing


def read_labels(project: Path) -> list[Label]:
    """The labels that stand in a project, in the order given. It may be labelled meanwhile. Raises WireError if the journal was altered."""
    path = labels_folder(project) / "journal.jsonl"
    return list(replay(ledger.read(path)).values()) if path.exists() else []


def training_set(project: Path, n: int, seed: int) -> list[Label]:
    """At most n labelled images to train on, as one mixture: half of them anomalies, if so many were found.

    Anomalies are taken in turn from those that were found as similar, in the band and by chance, as confidently missed ones are among the
    similar; normal images by chance first, then from the other two, as a set from the band alone is biased. Within each, `seed` draws.
    Spot checks are kept for the drift watch, and unsure images left out. Sorted by file.
    """
    usable = [each for each in read_labels(project) if each.how != "spot" and each.label != UNSURE]
    rng = generator(seed, "training set")
    of = {
        (label, how): [pool[i] for i in rng.permutation(len(pool))]
        for label in (ANOMALY, NORMAL)
        for how in ("similar", "band", "random")
        for pool in [[each for each in usable if (each.label, each.how) == (label, how)]]
    }
    in_turn = zip_longest(*(of[ANOMALY, how] for how in ("similar", "band", "random")))
    anomalies = [each for turn in in_turn for each in turn if each is not None]
    normal = [each for how in ("random", "band", "similar") for each in of[NORMAL, how]]
    taken = min(len(anomalies), max(n // 2, n - len(normal)))
    return sorted(anomalies[:taken] + normal[: n - taken], key=lambda each: each.file)


def write_csv(path: Path, labels: Iterable[Label]) -> None:
    """Write labels as a table, whole or not at all; unsure ones are left out. Header: file,label,by,when,how,score and their columns."""
    sure = [each for each in labels if each.label != UNSURE]
    more = sorted({name for each in sure for name in each.columns}.difference(_COLUMNS))
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow([*_COLUMNS, *more])
            for each in sure:
                table.writerow([*(getattr(each, name) for name in _COLUMNS), *(each.columns.get(name, "") for name in more)])
        part.replace(path)
    except OSError as error:
        raise StorageFull(f"{path} cannot be written: {error.strerror}.", hint="The journal beside it has every label.") from error


def labels_folder(project: Path) -> Path:
    """Where a project's labels are."""
    return project / "labels"


def words(label: int) -> str:
    """A label in words."""
    return {ANOMALY: "an anomaly", NORMAL: "normal", UNSURE: "unsure"}[label]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
