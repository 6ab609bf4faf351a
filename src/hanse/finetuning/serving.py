"""Scores a folder of images or a table with the current version, row by row, and keeps what the drift watch and the comparison read."""

from __future__ import annotations

import contextlib
import csv
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from blake3 import blake3

from hanse.errors import ConfigError, NotInstalled, StorageFull, WireError
from hanse.finetuning.contract import Model, Schema, read_project
from hanse.finetuning.data import DATA, UNKNOWN, Images, image_files, labelled_files, meanings_of, read_data
from hanse.finetuning.disagreement import pairs_file
from hanse.finetuning.routing import Candidate, Pair, Router
from hanse.finetuning.scoring import Answer, Input, Item, Refusal, Scored, Scorer, as_input
from hanse.finetuning.version_file import CODE
from hanse.finetuning.versions import CURRENT, Versions

T = TypeVar("T")
BATCH = 256
FOLDER_ROWS, REQUEST_ROWS = 64, 8
"""So many rows the model computes at a time (see Scorer), for folders and for requests."""
_OWN = ("name", "score", "decision", "version", "time", "label", "error")
_PARQUET = {".parquet", ".pq"}
_TABLES = {".csv", ".tsv", *_PARQUET}


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What came of scoring a folder. refused: inputs without a score; the output says why. pairs: inputs that the candidate scored too."""

    out: str
    rows: int
    positive: int
    refused: int
    pairs: int
    version: str
    seconds: float


def open_router(folder: Path, *, shadow: str = "", canary: str = "", share: float = 0.05, rows: int = FOLDER_ROWS) -> Router:
    """The current version of a project folder, with a candidate beside it if one is named by the first digits of its digest.

    rows: that the model computes at a time, see Scorer.
    Raises ConfigError if nothing is deployed, no version begins like that, or both kinds of candidate are named.
    """
    if shadow and canary:
        raise ConfigError("a candidate is either a shadow or a canary", hint="Leave one of the two out.")
    project, versions = read_project(folder), Versions(folder)
    candidate = None
    if shadow or canary:
        candidate = Candidate(versions.get(shadow or canary).digest, None if shadow else share, project.seed)
    return Router(folder / CURRENT, lambda: _current(folder), lambda version: load_scorer(folder, version, rows), candidate)


def load_scorer(folder: Path, digest: str, rows: int = FOLDER_ROWS) -> Scorer:
    """The version of this digest, ready to score, with its own code, weights and schema. Raises WireError if a file of it was altered."""
    from hanse.finetuning.models import load_module, load_params

    versions = Versions(folder)
    version = versions.get(digest)
    place = versions.path(version)
    if f"blake3:{blake3((place / CODE).read_bytes()).hexdigest()}" != version.code:
        raise WireError(f"{place / CODE} was altered: it is not the code of this version", offset=0)
    module = load_module(place, Model(code=CODE, build=versions.project.model.build))
    load_params(module, versions.params(version))
    return Scorer(module=module, schema=version.schema, threshold=version.threshold, version=version.digest, rows=rows)


class Records:
    """Appends what was scored: the log, and pairs below scores/. Whole lines only; one process writes a file.

    log: in the form that `hanse finetune watch` reads: name, score, decision, version, time, the label if it is known, and each slice.
    Raises StorageFull if there is no room: then nothing of that batch is in the file.
    """

    def __init__(self, folder: Path, schema: Schema, log: Path | None = None) -> None:
        if taken := [name for name in schema.slices if name in _OWN]:
            raise ConfigError(f"the schema has a slice {taken[0]!r}, and the log has its own column of that name")
        self._folder, self._log = folder, log
        for path in [*([log] if log else []), *folder.joinpath("scores", "pairs").glob("*.jsonl")]:
            _cut_torn_line(path)

    def keep(self, inputs: Sequence[Input], answers: Sequence[Answer], pairs: Sequence[Pair]) -> None:
        if self._log is not None:
            lines = [_log_line(each.item, answer) for each, answer in zip(inputs, answers, strict=True) if isinstance(answer, Scored)]
            append_lines(self._log, lines)
        self.keep_pairs(pairs)

    def keep_pairs(self, pairs: Sequence[Pair]) -> None:
        for path in dict.fromkeys(pairs_file(self._folder, pair) for pair in pairs):
            append_lines(path, [pair for pair in pairs if pairs_file(self._folder, pair) == path])


def score_folder(
    folder: Path, source: Path, out: Path, *, router: Router, log: Path | None = None, step: Callable[[int], None] = lambda rows: None
) -> Summary:
    """Score the images in a folder and below, or the rows of a CSV or Parquet file or of those in a folder; write a line each to `out`.

    out: .csv or .jsonl, written whole or not at all. step: is told how many rows were scored after each batch of at most BATCH rows,
    which is all that is in memory of them. One version answers throughout.
    Raises ConfigError if there is nothing to score. An input that breaks the schema gets a line with the error in it.
    """
    if out.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"{out}: the output is a .csv or a .jsonl file")
    schema, started = router.current.schema, time.monotonic()
    records, resize = Records(folder, schema, log), resizes(folder)
    rows = positive = refused = compared = 0
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", newline="") as file:
            write = _csv_writer(file) if out.suffix == ".csv" else _json_writer(file)
            for items in _batches(items_in(source, schema), BATCH):
                answers, pairs = _scored(router, records, items, resize=resize)
                write(answers)
                rows, compared = rows + len(items), compared + pairs
                positive += sum(answer.decision for answer in answers if isinstance(answer, Scored))
                refused += sum(isinstance(answer, Refusal) for answer in answers)
                step(len(items))
        if not rows:
            raise ConfigError(f"{source} holds nothing to score: the model takes {_wanted(schema)}")
        part.replace(out)
    except OSError as error:
        raise StorageFull(f"{out} cannot be written: {error.strerror}", hint="Make room, then score again.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    seconds = time.monotonic() - started
    return Summary(
        out=str(out), rows=rows, positive=positive, refused=refused, pairs=compared, version=router.current.version, seconds=seconds
    )


def items_in(source: Path, schema: Schema) -> Iterator[Item]:
    """The images in a folder and below, by name, with what labels.csv says; or the rows of a table, or of the tables in a folder."""
    if schema.kind == "image":
        if not source.is_dir():
            raise ConfigError(f"{source} is no folder: the model takes {_wanted(schema)}")
        files = image_files(source, lambda problem: None)
        said = labelled_files(source, None, files, schema, lambda problem: None)
        for file in files:
            columns = {name: value for name, value in said[file].columns.items() if name in schema.slices}
            yield Item(file, source / file, columns, _known(said[file].label))
        return
    tables = [source] if source.is_file() else sorted(path for path in source.glob("*") if path.suffix.lower() in _TABLES)
    meanings = meanings_of(schema)
    for path in tables:
        for number, row in enumerate(_rows(path), 1):
            name = row.get("name") or (f"row {number}" if source.is_file() else f"{path.name} row {number}")
            columns = {column: str(row[column]) for column in schema.slices if row.get(column) is not None}
            yield Item(str(name), row, columns, _known(meanings.get(str(row.get("label", "")).strip(), UNKNOWN)))


def count_in(source: Path, schema: Schema) -> int | None:
    """How many images there are, for a progress bar; None for tables, which would have to be read."""
    return len(image_files(source, lambda problem: None)) if schema.kind == "image" and source.is_dir() else None


def resizes(folder: Path) -> bool:
    """Whether data.yaml of this party asks to scale images: what is scored has to be read as what was trained on."""
    if not (folder / DATA).is_file():
        return False
    return any(isinstance(spec, Images) and spec.resize for spec in read_data(folder).sections.values())


def append_lines(path: Path, rows: Sequence[Any]) -> None:
    """Append each as a line of JSON, all of them in one write, or none. Raises StorageFull."""
    if not rows:
        return
    data = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if (written := os.write(handle, data)) < len(data):
                os.ftruncate(handle, os.fstat(handle).st_size - written)
                raise StorageFull(f"{path} cannot be written: no space left", hint="Make room.")
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageFull(f"{path} cannot be written: {error.strerror}", hint="Make room, or name another file.") from error


def _current(folder: Path) -> str:
    if (version := Versions(folder).current) is None:
        raise ConfigError(f"no version is deployed in {folder}", hint="`hanse finetune versions deploy` does that.")
    return version.digest


def _scored(router: Router, records: Records, items: Sequence[Item], *, resize: bool) -> tuple[list[Answer], int]:
    read = [as_input(item, router.current.schema, resize=resize) for item in items]
    inputs = [each for each in read if isinstance(each, Input)]
    current, pairs = router.answer(inputs)
    pairs += router.shadow(inputs, current)
    records.keep(inputs, current, pairs)
    answers = iter(current)
    return [each if isinstance(each, Refusal) else next(answers) for each in read], len(pairs)


def _log_line(item: Item, answer: Scored) -> dict[str, Any]:
    own = {"name": item.name, "score": answer.score, "decision": answer.decision, "version": answer.version, "time": time.time()}
    return own | ({} if item.label is None else {"label": item.label}) | dict(item.columns)


def _csv_writer(file: Any) -> Callable[[Sequence[Answer]], None]:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["name", "score", "decision", "version", "error"])

    def write(answers: Sequence[Answer]) -> None:
        for each in answers:
            if isinstance(each, Scored):
                rows.writerow([each.name, repr(each.score), each.decision, each.version, ""])
            else:
                rows.writerow([each.name, "", "", "", each.error])

    return write


def _json_writer(file: Any) -> Callable[[Sequence[Answer]], None]:
    return lambda answers: file.writelines(msgspec.json.encode(each).decode() + "\n" for each in answers)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """A table's rows one by one: column names to cells."""
    if path.suffix.lower() in _PARQUET:
        yield from _parquet_rows(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            yield from csv.DictReader(file, delimiter=max(",;\t", key=first.count), strict=True)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise NotInstalled(f"{path.name} needs the package pyarrow", hint="Install it with: pip install 'hanse[parquet]'") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from error


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def _known(label: int) -> int | None:
    return None if label == UNKNOWN else label


def _wanted(schema: Schema) -> str:
    return "a folder of PNG, JPEG or BMP images" if schema.kind == "image" else f"CSV or Parquet tables with {', '.join(schema.columns)}"


def _cut_torn_line(path: Path) -> None:
    """Remove what a crash left of a last line."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end and not (block := _block(file, end)).endswith(b"\n"):
            end -= len(block) - (block.rfind(b"\n") + 1)
        if end < size:
            file.truncate(end)


def _block(file: Any, end: int) -> bytes:
    """At most 64 KiB before `end`."""
    file.seek(max(0, end - (1 << 16)))
    return bytes(file.read(min(end, 1 << 16)))
