"""The data check: what is wrong with a party's data, found before anything is trained on it.

The findings name rows, and stay at the party; the numbers of `DataCheck.summary` are all that may leave.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from hanse.errors import ConfigError
from hanse.finetuning.contract import Schema, read_project
from hanse.finetuning.data import DATA, UNKNOWN, Dataset, Problem, load, read_data, told_apart
from hanse.finetuning.duplicates import digests, near, same
from hanse.finetuning.files import write_whole
from hanse.finetuning.page import write_page
from hanse.server.wording import number, one_line, plural, printable, quantity

REPORT = "data-check.html"
PROFILE = "data-profile.json"

EXAMPLES = 20  # of a finding
FEW_TRAIN, FEW_TEST, FEW_SLICE = 10, 50, 10  # rows of a class, below which a warning is given
MANY = 0.05  # of the rows: a warning becomes an error
MUCH_OVERLAP = 0.01  # of the measured rows: an error
FAR = 30.0  # standard deviations from the schema's mean
DRIFT = 0.1  # distance of distributions from which, if it is significant at ALPHA, it is said
ALPHA = 0.01
MAX_NEAR = 50_000  # images; among more, only equal ones are looked for
LEVELS = (np.arange(200) + 0.5) / 200  # of the quantiles in a profile

Level = Literal["error", "warning", "note"]
Floats = npt.NDArray[np.float64]


class Example(msgspec.Struct, frozen=True, omit_defaults=True):
    """A row, and the one it is like, if that is what is wrong."""

    name: str
    like: str = ""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was found. section: train, holdout or test; for an overlap the latter; empty: of the files. count: rows concerned."""

    level: Level
    code: str
    section: str
    sentence: str
    count: int
    examples: list[Example] = []


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Of a section. slices: by column and value, how many negatives, positives and rows without a label."""

    rows: int
    unlabelled: int
    negatives: int
    positives: int
    slices: dict[str, dict[str, tuple[int, int, int]]] = {}


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Data as 200 quantiles of each feature: of images brightness, contrast and sharpness, of tables each column. No rows."""

    rows: int
    quantiles: dict[str, list[float]]


class DataCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. drift: by what was compared ("test and train") and feature, the distance of Kolmogorov and Smirnov."""

    outcome: Literal["ok", "warnings", "failed"]
    findings: list[Finding]
    sections: dict[str, Counts]
    drift: dict[str, dict[str, float]]
    measured: str = "test"

    def summary(self) -> dict[str, float]:
        """The numbers alone: class counts, how many rows each kind of finding concerns, the largest drift. No name, value or slice."""
        numbers = {"errors": self._of("error"), "warnings": self._of("warning")}
        for name, counts in self.sections.items():
            numbers |= {f"{name}_{part}": getattr(counts, part) for part in ("rows", "unlabelled", "negatives", "positives")}
        found: Counter[str] = Counter()
        for finding in self.findings:
            found[finding.code.replace("-", "_")] += finding.count
        largest = {f"drift_{name.split()[-1]}": max(values.values(), default=0.0) for name, values in self.drift.items()}
        return {name: float(value) for name, value in (numbers | dict(found) | largest).items()}

    def _of(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)


def check(
    train: Dataset,
    test: Dataset,
    schema: Schema,
    reference: Profile | None = None,
    *,
    problems: Sequence[Problem] = (),
    measured: str = "test",
    wanted: int = FEW_TEST,
) -> DataCheck:
    """What is wrong with data that is to be trained on, and with that which is measured on.

    problems: what `load` could not use. measured: what the latter is called, test or holdout. wanted: rows of each class it should have.
    """
    sections = {"train": train, measured: test}
    findings = [*_of_files(problems, len(train) + len(test))]
    for name, dataset in sections.items():
        findings += _of_labels(name, dataset, schema, FEW_TRAIN if name == "train" else wanted)
        findings += _of_columns(name, dataset, schema)
        findings += _of_values(name, dataset, schema)
    findings += _of_slices(train, test, schema, measured)
    findings += _of_copies(train.labelled, test.labelled, schema, measured)
    findings += _of_groups(train.labelled, test.labelled, schema, measured)
    profiles = {name: features(dataset, schema) for name, dataset in sections.items()}
    compared = {f"{measured} and train": (profiles[measured], profiles["train"], len(train))}
    if reference is not None:
        compared["train and reference"] = (
            profiles["train"],
            {name: np.array(q) for name, q in reference.quantiles.items()},
            reference.rows,
        )
    drift = {name: _distances(these, those) for name, (these, those, _) in compared.items()}
    for name, (_, _, rows) in compared.items():
        findings += _of_drift(name, drift[name], len(sections[name.split()[0]]), rows)
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.level))
    levels = {finding.level for finding in findings}
    outcome: Any = "failed" if "error" in levels else "warnings" if "warning" in levels else "ok"
    counts = {name: _counts(dataset, schema) for name, dataset in sections.items()}
    return DataCheck(outcome=outcome, findings=findings, sections=counts, drift=drift, measured=measured)


def check_folder(folder: Path, reference: Path | None = None) -> DataCheck:
    """Check the data of the party whose project folder it is; write reports/data-check.html and, of its training data, data-profile.json.

    reference: another party's data-profile.json. Raises ConfigError if data cannot be loaded at all.
    """
    project, data = read_project(folder), read_data(folder)
    if missing := {"train", data.measured} - data.sections.keys():
        raise ConfigError(
            f"{folder / DATA} has no section {min(missing)!r}", hint="It needs train, and holdout (the vendor) or test (a client)."
        )
    problems: list[Problem] = []
    train, test = (load(data.sections[name], project.schema, folder, problems=problems) for name in ("train", data.measured))
    wanted = project.gate.min_per_class if data.measured == "holdout" else FEW_TEST
    other = read_profile(reference) if reference else None
    found = check(train, test, project.schema, other, problems=problems, measured=data.measured, wanted=wanted)
    write_report(found, folder / "reports" / REPORT, {"train": train, data.measured: test})
    write_whole(folder / "reports" / PROFILE, msgspec.json.encode(profile(train, project.schema)))
    return found


# What is looked for


def _of_files(problems: Sequence[Problem], rows: int) -> Iterator[Finding]:
    """Findings about what could not be loaded."""
    meaning: dict[str, tuple[Level, str]] = {
        "unreadable": ("warning", "cannot be read and is left out|cannot be read and are left out"),
        "link": ("warning", "is a link to elsewhere and is left out|are links to elsewhere and are left out"),
        "missing-file": ("warning", "is listed, but not there|are listed, but not there"),
        "size": (
            "error",
            "is not of the schema's size or channels and is left out|are not of the schema's size or channels and are left out",
        ),
        "listed-twice": ("warning", "is listed more than once|are listed more than once"),
        "label": ("error", "has a label that means nothing here, or two|have a label that means nothing here, or two"),
        "cell": ("error", "is missing or no number; the row is left out|are missing or no numbers; the rows are left out"),
    }
    by_code: dict[str, list[Problem]] = {}
    for problem in problems:
        by_code.setdefault(problem.code, []).append(problem)
    for code, found in by_code.items():
        level, words = meaning[code]
        noun = {"label": "row", "listed-twice": "file", "cell": "cell"}.get(code, "file")
        yield Finding(
            level=_at_least(level, len(found), rows + len(found), MANY),
            code=code,
            section="",
            sentence=f"{plural(len(found), noun)} {words.split('|')[len(found) > 1]}.",
            count=len(found),
            examples=[Example(f"{problem.where}: {problem.what}") for problem in found[:EXAMPLES]],
        )


def _of_labels(section: str, dataset: Dataset, schema: Schema, wanted: int) -> Iterator[Finding]:
    """Findings about labels: none, of one class only, too few."""

    def finding(level: Level, code: str, sentence: str, count: int, rows: Iterable[int] = ()) -> Finding:
        return Finding(level=level, code=code, section=section, sentence=sentence, count=count, examples=_examples(dataset, rows))

    unknown = np.flatnonzero(dataset.labels == UNKNOWN)
    if not len(dataset):
        yield finding("error", "empty", f"{section} has no rows that can be used.", 0)
        return
    if len(unknown) == len(dataset):
        yield finding("error", "unlabelled", f"None of the {plural(len(dataset), 'row')} of {section} has a label.", len(unknown), unknown)
        return
    if len(unknown):
        sentence = f"{plural(len(unknown), 'row')} of {section} without a label: they are not used."
        yield finding("note", "unlabelled", sentence, len(unknown), unknown)
    for label, name in enumerate(schema.classes):
        count = int((dataset.labels == label).sum())
        if count == 0:
            yield finding("error", "one-class", f"{section} has no row of class {name!r}.", len(dataset) - len(unknown))
        elif count < wanted:
            yield finding("warning", "few", f"{section} has only {plural(count, 'row')} of class {name!r}; {wanted} are wanted.", count)


def _of_columns(section: str, dataset: Dataset, schema: Schema) -> Iterator[Finding]:
    """Findings about slices and group that rows do not say."""
    for name in told_apart(schema):
        empty = [row for row, value in enumerate(dataset.columns.get(name, [""] * len(dataset))) if not value]
        if empty:
            level: Level = "error" if name == schema.group else "warning"
            what = "rows that belong together cannot be told" if name == schema.group else "they are in no slice"
            sentence = f"{plural(len(empty), 'row')} of {section} without {name!r}: {what}."
            yield Finding(
                level=level, code="column", section=section, sentence=sentence, count=len(empty), examples=_examples(dataset, empty)
            )


def _of_values(section: str, dataset: Dataset, schema: Schema) -> Iterator[Finding]:
    """Findings about values: images of one colour or on another scale; columns that are constant or far from the schema's mean."""

    def warning(code: str, sentence: str, rows: npt.NDArray[np.int64]) -> Finding:
        shown = _examples(dataset, rows.tolist())
        return Finding(level="warning", code=code, section=section, sentence=sentence, count=len(rows), examples=shown)

    x, every = dataset.inputs, np.arange(len(dataset))
    if not len(x):
        return
    if schema.kind == "image":
        flat = x.reshape(len(x), -1, x.shape[-1])
        blank = np.flatnonzero((flat.max(axis=1) == flat.min(axis=1)).all(axis=1))
        if len(blank):
            yield warning("blank", f"{plural(len(blank), 'image')} of {section} of one colour.", blank)
        if x.max() <= 1 and len(blank) < len(x):
            yield warning("range", f"No pixel of {section} is above 1: bytes from 0 to 255 are expected.", every)
        return
    if len(x) > 1:
        for column in np.flatnonzero(np.ptp(x, axis=0) == 0).tolist():
            value = number(float(x[0, column]))
            yield warning("constant", f"Column {schema.columns[column]!r} of {section} is {value} in every row.", every)
    far = np.abs((x - np.array(schema.mean)) / np.array(schema.std)) > FAR
    for column in np.flatnonzero(far.any(axis=0)).tolist():
        rows = np.flatnonzero(far[:, column])
        where = f"more than {FAR:g} of the schema's standard deviations from its mean"
        name = schema.columns[column]
        yield warning("far", f"Column {name!r} of {section} is {where} in {plural(len(rows), 'row')}: another unit?", rows)


def _of_slices(train: Dataset, test: Dataset, schema: Schema, measured: str) -> Iterator[Finding]:
    """Findings about slices that are too small to be measured, or are measured but not trained on."""
    for name in schema.slices:
        sizes = _slice_counts(test, name)
        few = {value: min(size[:2]) for value, size in sizes.items() if value and min(size[:2]) < FEW_SLICE}
        if few:
            what = f"with fewer than {FEW_SLICE} rows of a class: their figures mean little"
            sentence = f"{plural(len(few), 'slice')} by {name!r} of {measured} {what}."
            yield _about_slices("few-in-slice", sentence, measured, few)
        if train.columns.get(name) and (new := sizes.keys() - set(train.columns[name]) - {""}):
            sentence = f"{plural(len(new), 'slice')} by {name!r} in {measured} that train does not have."
            yield _about_slices("new-slice", sentence, measured, sorted(new))


def _about_slices(code: str, sentence: str, measured: str, values: Iterable[str]) -> Finding:
    shown = [Example(value) for value in values]
    return Finding(level="note", code=code, section=measured, sentence=sentence, count=len(shown), examples=shown[:EXAMPLES])


def _of_copies(train: Dataset, test: Dataset, schema: Schema, measured: str) -> Iterator[Finding]:
    """Findings about rows that are there twice: within a section, and in both. In tables that may well be chance, so it is no error."""
    images = schema.kind == "image"
    noun = "image" if images else "row"
    keys = {"train": digests(train.inputs), measured: digests(test.inputs)}
    for section, dataset in (("train", train), (measured, test)):
        pairs = same(keys[section])
        differ = dataset.labels[pairs[:, 0]] != dataset.labels[pairs[:, 1]]
        if differ.any():
            sentence = f"{plural(int(differ.sum()), noun)} of {section} equal to another one with the other label."
            yield _about_pairs("error" if images else "warning", "conflict", section, sentence, pairs[differ], dataset, dataset)
        if not differ.all():
            sentence = f"{plural(int((~differ).sum()), noun)} of {section} more than once."
            yield _about_pairs("warning" if images else "note", "duplicate", section, sentence, pairs[~differ], dataset, dataset)
        if images and len(dataset) <= MAX_NEAR:
            alike = _without(near(dataset.inputs), pairs)
            if len(alike):
                sentence = f"{plural(len(alike), noun)} of {section} nearly the same as another one."
                yield _about_pairs("warning", "near-duplicate", section, sentence, alike, dataset, dataset)
    pairs = same(keys["train"], keys[measured])
    if len(pairs):
        sentence = f"{plural(len(pairs), noun)} of {measured} also in train: what is measured on them says nothing."
        level = _at_least("warning", len(pairs), len(test), MUCH_OVERLAP) if images else "warning"
        yield _about_pairs(level, "overlap", measured, sentence, pairs, test, train)
    if images and max(len(train), len(test)) <= MAX_NEAR:
        alike = _without(near(train.inputs, test.inputs), pairs)
        if len(alike):
            sentence = f"{plural(len(alike), noun)} of {measured} nearly the same as one in train."
            yield _about_pairs("warning", "near-overlap", measured, sentence, alike, test, train)


def _without(pairs: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return pairs[~np.isin(pairs[:, 0], others[:, 0])]


def _about_pairs(
    level: Level, code: str, section: str, sentence: str, pairs: npt.NDArray[np.int64], dataset: Dataset, others: Dataset
) -> Finding:
    shown = [Example(dataset.names[row], others.names[like]) for row, like in pairs[:EXAMPLES].tolist()]
    return Finding(level=level, code=code, section=section, sentence=sentence, count=len(pairs), examples=shown)


def _of_groups(train: Dataset, test: Dataset, schema: Schema, measured: str) -> Iterator[Finding]:
    """A finding about groups that are both trained on and measured on."""
    if schema.group is None:
        return
    trained = set(train.columns.get(schema.group, ())) - {""}
    rows = [row for row, value in enumerate(test.columns.get(schema.group, ())) if value in trained]
    if rows:
        groups = sorted({test.columns[schema.group][row] for row in rows})
        level = _at_least("warning", len(rows), len(test), MUCH_OVERLAP)
        what = (
            f"{plural(len(groups), 'value')} of {schema.group!r} both in train and {measured}, in {plural(len(rows), 'row')} of {measured}."
        )
        shown = [Example(group) for group in groups[:EXAMPLES]]
        yield Finding(level=level, code="group-overlap", section=measured, sentence=what, count=len(rows), examples=shown)


def _of_drift(name: str, distances: Mapping[str, float], rows: int, others: int) -> Iterator[Finding]:
    """A finding about features that are distributed otherwise. Between a client and its vendor that is what one expects: a note."""
    if not distances or not rows or not others:
        return
    limit = max(DRIFT, math.sqrt(math.log(2 * len(distances) / ALPHA) / 2 * (1 / rows + 1 / others)))
    if over := {feature: distance for feature, distance in distances.items() if distance > limit}:
        these, _, those = name.split()
        listed = ", ".join(f"{feature} ({distance:.2f})" for feature, distance in sorted(over.items(), key=lambda item: -item[1])[:5])
        sentence = f"{these} is unlike {those} in {plural(len(over), 'feature')}: {listed}."
        shown = [Example(feature) for feature in over][:EXAMPLES]
        yield Finding(
            level="note" if those == "reference" else "warning",
            code="drift",
            section=these,
            sentence=sentence,
            count=len(over),
            examples=shown,
        )


def _at_least(level: Level, count: int, of: int, share: float) -> Level:
    return "error" if count > share * max(of, 1) else level


def _examples(dataset: Dataset, rows: Iterable[int]) -> list[Example]:
    return [Example(dataset.names[row]) for row in list(rows)[:EXAMPLES]]


def _counts(dataset: Dataset, schema: Schema) -> Counts:
    return Counts(
        rows=len(dataset),
        unlabelled=int((dataset.labels == UNKNOWN).sum()),
        negatives=int((dataset.labels == 0).sum()),
        positives=int((dataset.labels == 1).sum()),
        slices={name: _slice_counts(dataset, name) for name in schema.slices},
    )


def _slice_counts(dataset: Dataset, name: str) -> dict[str, tuple[int, int, int]]:
    """By value of the column: how many negatives, positives, and rows without a label."""
    found = Counter(zip(dataset.columns.get(name, ()), dataset.labels.tolist(), strict=False))
    return {value: (found[value, 0], found[value, 1], found[value, UNKNOWN]) for value in sorted({value for value, _ in found})}


# Distributions


def features(dataset: Dataset, schema: Schema) -> dict[str, Floats]:
    """float64 (n,) each: of images brightness, contrast and sharpness (mean step to the right), in 0 to 1; of tables the columns."""
    x = dataset.inputs
    if schema.kind == "table":
        return {name: x[:, column].astype(np.float64) for column, name in enumerate(schema.columns)}
    found = np.zeros((len(x), 3))
    for start in range(0, len(x), 512):
        grey = x[start : start + 512].mean(axis=3, dtype=np.float32) / 255
        steps = np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2)) if grey.shape[2] > 1 else np.zeros(len(grey))
        found[start : start + 512] = np.stack([grey.mean(axis=(1, 2)), grey.std(axis=(1, 2)), steps], axis=1)
    return {name: found[:, column] for column, name in enumerate(("brightness", "contrast", "sharpness"))}


def profile(dataset: Dataset, schema: Schema) -> Profile:
    """What another party needs to say how unlike its data is. Few rows show through: see LEVELS; do not give one of fewer than 200."""
    quantiles = {name: np.quantile(values, LEVELS).tolist() for name, values in features(dataset, schema).items() if len(values)}
    return Profile(len(dataset), quantiles)


def read_profile(path: Path) -> Profile:
    """Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} is no profile of data: {error}", hint=f"`hanse finetune check` writes one, reports/{PROFILE}."
        ) from error


def _distances(these: Mapping[str, Floats], those: Mapping[str, Floats]) -> dict[str, float]:
    return {name: distance(values, those[name]) for name, values in these.items() if len(values) and len(those.get(name, ()))}


def distance(a: Floats, b: Floats) -> float:
    """The largest difference of two samples' distribution functions: the statistic of Kolmogorov and Smirnov."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    return float(np.abs(np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)).max())


# What a person reads


def as_text(check: DataCheck) -> str:
    """The check for a terminal."""
    lines = [_sentence(check)]
    for name, counts in check.sections.items():
        classes = f"{counts.negatives:,} negatives, {counts.positives:,} positives"
        lines.append(f"  {name}: {plural(counts.rows, 'row')}, {classes}, {counts.unlabelled:,} without a label")
    for finding in check.findings:
        lines += ["", f"{finding.level}: {printable(finding.sentence)}"]
        lines += [f"  {_in_words(example)}" for example in finding.examples[:5]]
        lines += [f"  and {finding.count - 5:,} more"] if finding.count > 5 and len(finding.examples) >= 5 else []
    return "\n".join(lines)


def _in_words(example: Example) -> str:
    return one_line(f"{example.name} is like {example.like}" if example.like else example.name, 200)


def _sentence(check: DataCheck) -> str:
    said = {
        "ok": "Nothing is wrong with this data.",
        "warnings": "This data can be used. Look at the warnings first.",
        "failed": "This data cannot be used as it is.",
    }
    return said[check.outcome]


def write_report(check: DataCheck, path: Path, datasets: Mapping[str, Dataset] | None = None) -> Path:
    """Write the check as one page, whole or not at all. It shows names of rows and, of `datasets` by section, small pictures.

    Raises: NotInstalled without Jinja2.
    """
    when = time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()).lstrip("0")
    words = {"sentence": _sentence(check), "when": when, "pictures": _pictures(check, datasets or {}), "examples": EXAMPLES}
    return write_page(path, "check.html.j2", check=check, quantity=quantity, printable=printable, **words)


def _pictures(check: DataCheck, datasets: Mapping[str, Dataset]) -> dict[tuple[str, str], str]:
    """A data URL for each example that is an image, by section and name."""
    wanted = {(finding.section, example.name) for finding in check.findings for example in finding.examples}
    for finding in check.findings:
        other = "train" if finding.code.endswith("overlap") else finding.section
        wanted |= {(other, example.like) for example in finding.examples if example.like}
    found: dict[tuple[str, str], str] = {}
    for section, dataset in datasets.items():
        if dataset.inputs.ndim == 4:
            rows = {name: row for row, name in enumerate(dataset.names) if (section, name) in wanted}
            found |= {(section, name): _thumbnail(dataset.inputs[row]) for name, row in rows.items()}
    return found


def _thumbnail(pixels: npt.NDArray[np.uint8]) -> str:
    """A PNG of at most 96 pixels a side as a data URL; empty without Pillow, or for channels that no picture has."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        return ""
    if pixels.shape[2] not in (1, 3, 4):
        return ""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((96, 96))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
