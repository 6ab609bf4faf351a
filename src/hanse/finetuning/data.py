"""A party's own data: where it is (`data.yaml`), and how it becomes arrays. None of it leaves the party.

n = rows, h, w, c = height, width and channels of an image, f = columns of a table.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import msgspec
import numpy as np
import numpy.typing as npt
import yaml

from hanse.errors import ConfigError, HanseError, NotInstalled
from hanse.finetuning.contract import Count, Schema
from hanse.jobs.bundle import CodeName, import_name

DATA = "data.yaml"
UNKNOWN = -1
"""The label of a row that nobody has labelled."""

MAX_PIXELS = 64_000_000  # of one image; more is taken for a decompression bomb
LONG = 2_000  # images from which loading shows a bar
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
FORMATS = ("PNG", "JPEG", "BMP")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by number of channels

Array = npt.NDArray[Any]
Report = Callable[["Problem"], None]
Code = Literal["unreadable", "link", "size", "missing-file", "listed-twice", "label", "cell"]


class _Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """rows: only those from the first to before the second, counted from 0. limit: at most so many of them, spread evenly."""

    rows: tuple[Annotated[int, msgspec.Meta(ge=0)], Count] | None = None
    limit: Count | None = None

    def __post_init__(self) -> None:
        if self.rows and self.rows[0] >= self.rows[1]:
            raise ValueError(f"rows {list(self.rows)} are none: the second number must be above the first")


class Images(_Spec, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag="images"):
    """PNG, JPEG and BMP files in a folder and all below it.

    labels: a CSV file in the folder with the columns file, label and those that the schema names. Default: labels.csv if it is there, else
    the subfolders named by the two classes (or 0 and 1) are the labels. resize: scale images of another size, convert other channels.
    """

    folder: str
    labels: str | None = None
    resize: bool = False


class Table(_Spec, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag="table"):
    """A CSV or Parquet file. label: its column of labels; None: it has none. names: its column of row names; None: their numbers."""

    file: str
    label: str | None = None
    names: str | None = None


class Python(_Spec, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag="python"):
    """A function of the party's own: a file beside data.yaml, and the function's name. It takes nothing.

    It returns a Dataset, a pair of inputs and labels, a dictionary with inputs, labels, names and columns, or a sequence of (input, label).
    """

    file: str
    name: str = "load"


class Arrays(_Spec, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag="arrays"):
    """An .npz file with inputs, labels if there are any, names if there are any, and one array for each column that the schema names."""

    file: str


DataSpec = Images | Table | Python | Arrays


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """data.yaml: what this party trains on, and what it measures on: the vendor its holdout, a client its test."""

    train: DataSpec | None = None
    holdout: DataSpec | None = None
    test: DataSpec | None = None

    def __post_init__(self) -> None:
        if self.holdout and self.test:
            raise ValueError("it has both a holdout (the vendor's) and a test (a client's)")

    @property
    def sections(self) -> dict[str, DataSpec]:
        """Those that are there, by name."""
        named = {"train": self.train, "holdout": self.holdout, "test": self.test}
        return {name: spec for name, spec in named.items() if spec is not None}

    @property
    def measured(self) -> Literal["holdout", "test"]:
        """The name of the section that this party measures on."""
        return "holdout" if self.holdout else "test"


class Problem(msgspec.Struct, frozen=True):
    """A row that was left out, or an entry that means nothing. where: a file, line or row, and column."""

    code: Code
    where: str
    what: str


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """inputs: images uint8 (n, h, w, c), or rows of a table float32 (n, f). labels: int64 (n,): 0, 1 or UNKNOWN.

    names: of the rows, for people. columns: for each slice and the group of the schema, what each row says there; "" where it says nothing.
    """

    inputs: Array
    labels: npt.NDArray[np.int64]
    names: list[str]
    columns: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {"labels": len(self.labels), "names": len(self.names)} | {name: len(column) for name, column in self.columns.items()}
        if wrong := {name: length for name, length in lengths.items() if length != len(self.inputs)}:
            raise ConfigError(f"{len(self.inputs)} inputs, but " + ", ".join(f"{length} {name}" for name, length in wrong.items()))

    def __len__(self) -> int:
        return len(self.names)

    def select(self, indices: Array | Sequence[int]) -> Dataset:
        """These rows, in this order; a boolean mask works too."""
        chosen = np.arange(len(self))[np.asarray(indices, None if len(indices) else np.int64)].tolist()
        columns = {name: [column[row] for row in chosen] for name, column in self.columns.items()}
        return Dataset(self.inputs[chosen], self.labels[chosen], [self.names[row] for row in chosen], columns)

    @property
    def labelled(self) -> Dataset:
        """The rows whose label is known."""
        return self.select(self.labels != UNKNOWN)


def read_data(folder: Path) -> Data:
    """What data.yaml in a project folder says. Raises ConfigError that names the file and the place in it."""
    path = folder / DATA
    try:
        return msgspec.convert(cast(Any, yaml.safe_load(path.read_text("utf-8"))) or {}, Data)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no {DATA}, which says where this party's data is") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from error


def load(spec: DataSpec, schema: Schema, base: Path, *, problems: list[Problem] | None = None) -> Dataset:
    """The rows that `spec` names, as the schema wants them. base: the folder of data.yaml, which its paths start from.

    problems: gets what cannot be used, and those rows are left out; without it, the first is an error.
    Raises: ConfigError, naming the file and place; NotInstalled without Pillow or pyarrow where they are needed.
    """
    report = _fail if problems is None else problems.append
    kind = {Images: "image", Table: "table"}.get(type(spec), schema.kind)
    if kind != schema.kind:
        raise ConfigError(f"{base / DATA} describes data of kind {kind!r}, and the project's schema is of kind {schema.kind!r}")
    if isinstance(spec, Images):
        return _load_images(spec, schema, base / spec.folder, report)
    if isinstance(spec, Table):
        return _load_table(spec, schema, base / spec.file, report)
    return _load_arrays(spec, schema, base, report)


def prepared(dataset: Dataset, schema: Schema) -> npt.NDArray[np.float32]:
    """What the model gets: images (x / 255 − mean) / std, float32 (n, c, h, w); rows of tables (x − mean) / std, float32 (n, f)."""
    x = dataset.inputs
    if schema.kind == "image":
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    mean, std = (_for_each(values, x, name) for values, name in ((schema.mean, "mean"), (schema.std, "std")))
    return cast("npt.NDArray[np.float32]", (x - mean) / std)


def _fail(problem: Problem) -> None:
    raise ConfigError(f"{problem.where}: {problem.what}")


def _for_each(values: Sequence[float], x: Array, name: str) -> npt.NDArray[np.float32]:
    if len(values) not in (1, x.shape[1]):
        raise ConfigError(f"the schema's {name} has {len(values)} numbers: it needs one, or {x.shape[1]}, one for each channel or column")
    return np.array(values, np.float32).reshape(-1, *(1,) * (x.ndim - 2))


# Images


def _load_images(spec: Images, schema: Schema, folder: Path, report: Report) -> Dataset:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: {DATA} names it as one of images")
    files = image_files(folder, report)
    rows = labelled_files(folder, spec.labels, files, schema, report)
    chosen = [files[row] for row in _chosen(len(files), spec)]
    pixels, read = _read_images(folder, chosen, schema, resize=spec.resize, report=report)
    columns = {name: [rows[file].columns.get(name, "") for file in read] for name in told_apart(schema)}
    return Dataset(pixels, np.array([rows[file].label for file in read], np.int64), read, columns)


def image_files(folder: Path, report: Report) -> list[str]:
    """The images in a folder and below, as paths from it with /, sorted. None is hidden, or reached by a link out of the folder."""
    found, root = [], folder.resolve()
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in files if os.path.splitext(name)[1].lower() in _SUFFIXES and not name.startswith(".")]
        where = "" if place == str(folder) else os.path.relpath(place, folder).replace(os.sep, "/") + "/"
        for name, is_image in [*((name, True) for name in images), *((name, False) for name in folders)]:
            path, relative = os.path.join(place, name), where + name
            shown = f"{folder.name}/{relative}".encode("utf-8", "backslashreplace").decode()
            if os.path.islink(path) and not (is_image and Path(path).resolve().is_relative_to(root)):
                report(Problem("link", shown, "is a link to elsewhere, and such links are not followed"))
            elif not shown.endswith(f"/{relative}"):
                report(Problem("unreadable", shown, "has a name that is not UTF-8"))
            elif is_image and not os.path.isfile(path):
                report(Problem("unreadable", shown, "is no plain file"))
            elif is_image:
                found.append(relative)
    return sorted(found)


class Said(NamedTuple):
    """What labels.csv, or the name of a folder, says of a file."""

    label: int = UNKNOWN
    columns: Mapping[str, str] = {}


def labelled_files(folder: Path, labels: str | None, files: Sequence[str], schema: Schema, report: Report) -> dict[str, Said]:
    """What is said of each file."""
    path = folder / (labels or "labels.csv")
    if labels or path.is_file():
        return dict.fromkeys(files, Said()) | _read_labels(path, set(files), schema, report)
    meanings = meanings_of(schema)
    return {file: Said(meanings.get(file.split("/")[0], UNKNOWN)) for file in files}


def _read_labels(path: Path, files: set[str], schema: Schema, report: Report) -> dict[str, Said]:
    """What labels.csv says of those of its files that are there. Of two lines for one file, neither's label counts if they differ."""
    place = f"{path.parent.name}/{path.name}"
    lines, cells = _read_csv(path, place, report)
    for name in ("file", "label"):
        if name not in cells:
            raise ConfigError(f"{path} has no column {name!r}: its first line names the columns, and file and label are needed")
    labels = _labels(cells["label"], lines, place, schema, report)
    kept = {name: cells[name] for name in told_apart(schema) if name in cells}
    said: dict[str, Said] = {}
    for row, (line, entry) in enumerate(zip(lines, cells["file"], strict=True)):
        file = posixpath.normpath(entry.strip().replace("\\", "/"))
        if file not in files:
            report(Problem("missing-file", f"{place}, {line}", f"{entry!r} is none of the PNG, JPEG and BMP files that can be read here"))
            continue
        now = Said(int(labels[row]), {name: column[row].strip() for name, column in kept.items()})
        if (before := said.setdefault(file, now)) is not now:
            if before.label == now.label:
                report(Problem("listed-twice", f"{place}, {line}", f"{file} stood in an earlier line already"))
            else:
                report(Problem("label", f"{place}, {line}", f"{file} has another label in an earlier line"))
                said[file] = Said(UNKNOWN, before.columns)
    return said


class Unfit(Exception):
    """An image that is whole, but not as the schema wants it."""


def _read_images(
    folder: Path, files: Sequence[str], schema: Schema, *, resize: bool, report: Report
) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """The pixels of those files that can be used, uint8 (n, h, w, c), and which these are."""
    try:
        import PIL.Image as pillow
    except ModuleNotFoundError as error:
        raise NotInstalled("images need the package pillow", hint="Install it with: pip install 'hanse[finetuning]'") from error
    height, width, channels = (*schema.shape, 1)[:3]
    if channels not in _MODES:
        raise ConfigError(f"the schema wants {channels} channels: files of images have 1, 3 or 4; use data of kind python or arrays")
    pixels = np.empty((len(files), height, width, channels), np.uint8)
    read: list[str] = []
    for file in _with_bar(files, "reading images"):
        try:
            with pillow.open(folder / file, formats=FORMATS) as image:
                pixels[len(read)] = fitted(image, (width, height), channels, resize=resize)
        except Unfit as error:
            report(Problem("size", f"{folder.name}/{file}", str(error)))
        except MemoryError:
            raise
        except Exception as error:  # decoders raise errors of many kinds on broken files
            report(Problem("unreadable", f"{folder.name}/{file}", f"cannot be read: {str(error).replace(str(folder / file), 'it')}"))
        else:
            read.append(file)
    return pixels[: len(read)], read


def fitted(image: Any, size: tuple[int, int], channels: int, *, resize: bool) -> npt.NDArray[np.uint8]:
    """The image as a person sees it (upright, in its palette's colours), uint8 (h, w, c). Raises Unfit if it does not fit the schema."""
    from PIL import Image, ImageOps

    if image.width * image.height > MAX_PIXELS:
        raise Unfit(f"has {image.width} × {image.height} pixels, more than an image may have")
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if not resize and image.size != size:
        raise Unfit(f"is {image.height} × {image.width} pixels high and wide; the schema wants {size[1]} × {size[0]}")
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    if image.mode != _MODES[channels]:
        if not resize:
            raise Unfit(f"has the channels {image.mode!r}; the schema wants {_MODES[channels]!r}")
        if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would cut what is above 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert(_MODES[channels])
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size[1], size[0], channels)


def _with_bar(files: Sequence[str], title: str) -> Iterable[str]:
    """The files, with a bar on the terminal if there is one and it takes long."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = console.is_terminal and len(files) >= LONG
    return track(files, title, console=console, transient=True) if shown else files


# Tables


def _load_table(spec: Table, schema: Schema, path: Path, report: Report) -> Dataset:
    if path.suffix.lower() in (".parquet", ".pq"):
        wanted = [*schema.columns, *told_apart(schema), *filter(None, (spec.label, spec.names))]
        where, cells = _read_parquet(path, set(wanted))
    else:
        where, cells = _read_csv(path, path.name, report)
    if missing := [name for name in (*schema.columns, *filter(None, (spec.label, spec.names))) if name not in cells]:
        raise ConfigError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(cells)}")
    chosen = _chosen(len(where), spec)
    where = [where[row] for row in chosen]
    cells = {name: [column[row] for row in chosen] for name, column in cells.items()}
    inputs = np.stack([_numbers(cells[name], where, f"{path.name}, {{}}, column {name}", report) for name in schema.columns], axis=1)
    labels = _labels(cells[spec.label], where, path.name, schema, report) if spec.label else np.full(len(where), UNKNOWN, np.int64)
    columns = {name: [cell.strip() for cell in cells.get(name, [""] * len(where))] for name in told_apart(schema)}
    dataset = Dataset(inputs, labels, cells[spec.names] if spec.names else where, columns)
    return dataset.select(np.flatnonzero(np.isfinite(inputs).all(axis=1)))


def _numbers(cells: Sequence[str], where: Sequence[str], place: str, report: Report) -> npt.NDArray[np.float32]:
    """float32 (n,): a column's numbers, and NaN, reported, where there is none or it is too large."""
    try:
        numbers = np.array(cells, np.float64)
    except ValueError:
        numbers = np.array([_number(cell) for cell in cells], np.float64)
    with np.errstate(over="ignore"):
        found = numbers.astype(np.float32)
    for row in np.flatnonzero(~np.isfinite(found)).tolist():
        cell = cells[row].strip()
        report(Problem("cell", place.format(where[row]), f"{cell!r} is no number that can be used" if cell else "is empty"))
    return found


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


def _read_csv(path: Path, place: str, report: Report) -> tuple[list[str], dict[str, list[str]]]:
    """Where each row is ("line 2"), and each column's cells. The separator is that of , ; and tab which the first line has most of."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            names = [name.strip() for name in next(reader, [])]
            read = [(f"line {reader.line_num}", row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        hint = "Save it as UTF-8." if isinstance(error, UnicodeDecodeError) else ""
        raise ConfigError(f"{path} cannot be read as CSV: {error}", hint=hint) from error
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path} has two columns called {min(twice)!r}")
    for line, row in read:
        if len(row) != len(names):
            report(Problem("cell", f"{place}, {line}", f"has {len(row)} cells; the first line has {len(names)}"))
    read = [(line, row) for line, row in read if len(row) == len(names)]
    columns = zip(*(row for _, row in read), strict=True) if read else ([] for _ in names)
    return [line for line, _ in read], {name: list(column) for name, column in zip(names, columns, strict=True)}


def _read_parquet(path: Path, wanted: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Where each row is ("row 1"), and the cells of each wanted column that is there, as text; "" for null."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise NotInstalled(f"{path.name} needs the package pyarrow", hint="Install it with: pip install 'hanse[parquet]'") from error
    try:
        there = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in there if name in wanted])
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from error
    cells = {name: [_text(value) for value in table[name].to_pylist()] for name in table.column_names}
    return [f"row {row + 1}" for row in range(table.num_rows)], cells


def _text(value: object) -> str:
    return "" if value is None else str(int(value) if isinstance(value, bool) else value)


# Arrays and code


def _load_arrays(spec: Python | Arrays, schema: Schema, base: Path, report: Report) -> Dataset:
    if isinstance(spec, Python):
        where, made = f"{spec.name}() in {base / spec.file}", _call(spec, base)
        if isinstance(made, Dataset):
            made = {"inputs": made.inputs, "labels": made.labels, "names": made.names, **made.columns}
        elif not isinstance(made, Mapping):
            made = _as_mapping(made, where)
    else:
        where, made = str(base / spec.file), _read_npz(base / spec.file)
    if "inputs" not in made:
        raise ConfigError(f"{where} gives no inputs; it gives {', '.join(map(str, made)) or 'nothing'}")
    made = {**made, **made.get("columns", {})} if isinstance(made.get("columns"), Mapping) else made
    inputs = _checked(np.asarray(made["inputs"]), schema, where)
    names = [str(name) for name in made.get("names", [f"row {row + 1}" for row in range(len(inputs))])]
    given = [_text(value) for value in np.asarray(made.get("labels", [UNKNOWN] * len(inputs))).tolist()]
    labels = _labels(given, names, where, schema, report)
    columns = {name: [_text(value) for value in made.get(name, [""] * len(inputs))] for name in told_apart(schema)}
    try:
        dataset = Dataset(inputs, labels, names, columns).select(_chosen(len(inputs), spec))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}") from error
    if schema.kind == "image":
        return dataset
    whole = np.isfinite(dataset.inputs).all(axis=1)
    for row in np.flatnonzero(~whole).tolist():
        report(Problem("cell", dataset.names[row], "has a value that is no finite number"))
    return dataset.select(np.flatnonzero(whole))


def _call(spec: Python, base: Path) -> Any:
    function = import_name(base, CodeName(spec.file, spec.name))
    try:
        return function()
    except HanseError:
        raise
    except Exception as error:
        raise ConfigError(f"{base / spec.file}: {spec.name}() raised {type(error).__name__}: {error}") from error


def _as_mapping(made: Any, where: str) -> dict[str, Any]:
    """inputs and labels, of a pair of them or of a sequence of pairs."""
    try:
        pair = made if isinstance(made, tuple) else tuple(zip(*(made[row] for row in range(len(made))), strict=True))
        inputs, labels = pair
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{where} gave {type(made).__name__}: a Dataset, inputs and labels, a dictionary or a sequence is wanted"
        ) from error
    return {"inputs": np.asarray(inputs), "labels": np.asarray(labels)}


def _read_npz(path: Path) -> dict[str, Any]:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array, not several")
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read as .npz: {error}") from error


def _checked(inputs: Array, schema: Schema, where: str) -> Array:
    """inputs in the schema's shape and type. Raises ConfigError if they are of another."""
    if schema.kind == "table":
        if inputs.ndim != 2 or inputs.shape[1] != len(schema.columns) or inputs.dtype.kind not in "fiub":
            raise ConfigError(f"{where}: inputs are {_form(inputs)}; the schema wants numbers of shape (n, {len(schema.columns)})")
        return inputs.astype(np.float32)
    shape = (*schema.shape, 1)[:3]
    if inputs.ndim == 3 and shape[2] == 1:
        inputs = inputs[..., None]
    if inputs.shape[1:] != shape or inputs.dtype.kind not in "iu" or (inputs.size and (inputs.min() < 0 or inputs.max() > 255)):
        raise ConfigError(f"{where}: inputs are {_form(inputs)}; the schema wants bytes, 0 to 255, of shape {('n', *shape)}")
    return inputs.astype(np.uint8)


def _form(inputs: Array) -> str:
    return f"{inputs.dtype} of shape {inputs.shape}"


# What all kinds share


def told_apart(schema: Schema) -> list[str]:
    """The columns that a schema names besides inputs: its slices and its group."""
    return list(dict.fromkeys([*schema.slices, *filter(None, [schema.group])]))


def meanings_of(schema: Schema) -> dict[str, int]:
    """Labels by what is written for them. Names of classes go before numbers."""
    return {"": UNKNOWN, "-1": UNKNOWN, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "-1.0": UNKNOWN} | {
        name: label for label, name in enumerate(schema.classes)
    }


def _labels(cells: Sequence[str], where: Sequence[str], source: str, schema: Schema, report: Report) -> npt.NDArray[np.int64]:
    """int64 (n,): 0, 1, or UNKNOWN where the cell is empty or, reported, says something else."""
    meanings, labels = meanings_of(schema), np.full(len(cells), UNKNOWN, np.int64)
    for row, cell in enumerate(cells):
        if (label := meanings.get(cell.strip())) is None:
            report(Problem("label", f"{source}, {where[row]}", f"the label {cell!r} is none of 0, 1, {', '.join(schema.classes)}"))
        else:
            labels[row] = label
    return labels


def _chosen(rows: int, spec: DataSpec) -> range | list[int]:
    """Which of so many rows a spec wants."""
    chosen = range(*spec.rows)[: max(0, rows - spec.rows[0])] if spec.rows else range(rows)
    if spec.limit is None or len(chosen) <= spec.limit:
        return chosen
    return [chosen[index * len(chosen) // spec.limit] for index in range(spec.limit)]
