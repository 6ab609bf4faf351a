from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from hanse.errors import ConfigError
from hanse.finetuning.contract import Schema
from hanse.finetuning.data import UNKNOWN, Arrays, Dataset, DataSpec, Images, Problem, Python, Table, load, prepared, read_data

GREY = Schema(shape=[4, 6, 1], slices=["device"], group="patient")
COLOUR = Schema(shape=[4, 6, 3])
TABLE = Schema(kind="table", columns=["age", "dose"], slices=["device"], group="patient")


def picture(seed: int = 0, shape: tuple[int, ...] = (4, 6)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray[Any, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def save_csv(path: Path, *rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def found(spec: DataSpec, schema: Schema, base: Path) -> tuple[Dataset, list[tuple[str, str]]]:
    """The data set, and the code and place of each problem."""
    problems: list[Problem] = []
    dataset = load(spec, schema, base, problems=problems)
    return dataset, [(problem.code, problem.where) for problem in problems]


# data.yaml


def test_data_yaml_names_the_sections(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("""
train: {kind: images, folder: train, limit: 50}
holdout: {kind: table, file: x.parquet, label: y, rows: [0, 10]}
""")
    data = read_data(tmp_path)
    assert data.sections == {"train": Images(folder="train", limit=50), "holdout": Table(file="x.parquet", label="y", rows=(0, 10))}
    assert data.measured == "holdout"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {kind: pickle, file: x}", "pickle"),
        ("train: {kind: images, folder: a, colour: red}", "colour"),
        ("train: {kind: images, folder: a, limit: 0}", "limit"),
        ("train: {kind: arrays, file: a, rows: [5, 5]}", "rows"),
        ("holdout: {kind: arrays, file: a}\ntest: {kind: arrays, file: b}", "both"),
        ("{", "data.yaml"),
        ("[1]", "object"),
        ("train: !!python/object/apply:os.system [ls]", "python/object"),
    ],
)
def test_a_wrong_data_yaml_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_data(tmp_path)


def test_no_data_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.yaml"):
        read_data(tmp_path)


# Images


def test_images_with_labels_csv(tmp_path: Path) -> None:
    for index, name in enumerate(["b.png", "deep/er/a.PNG", "c.bmp", "unlisted.png", ".hidden.png", ".git/x.png", "notes.txt.gz"]):
        path = tmp_path / "train" / name
        save(path, picture(index), format="BMP" if name.endswith("bmp") else "PNG")
    save_csv(
        tmp_path / "train" / "labels.csv",
        ["file", "label", "device", "patient", "secret"],
        ["b.png", "anomaly", "cam 1", "p1", "x"],
        ["./deep\\er/a.PNG", 0, "cam 2", "p2", "x"],
        ["c.bmp", "", "", "p1", "x"],
    )
    dataset, problems = found(Images(folder="train"), GREY, tmp_path)
    assert dataset.names == ["b.png", "c.bmp", "deep/er/a.PNG", "unlisted.png"]
    assert dataset.labels.tolist() == [1, UNKNOWN, 0, UNKNOWN]
    assert dataset.columns == {"device": ["cam 1", "", "cam 2", ""], "patient": ["p1", "p1", "p2", ""]}
    assert dataset.inputs.shape == (4, 4, 6, 1)
    assert dataset.inputs.dtype == np.uint8
    np.testing.assert_array_equal(dataset.inputs[:3, :, :, 0], [picture(0), picture(2), picture(1)])
    assert problems == []
    assert dataset.labelled.names == ["b.png", "deep/er/a.PNG"]


def test_folders_named_by_the_classes_are_labels(tmp_path: Path) -> None:
    for index, name in enumerate(["normal/a.png", "anomaly/cam1/a.png", "1/b.png", "other/c.png", "d.png"]):
        save(tmp_path / "x" / name, picture(index))
    dataset = load(Images(folder="x"), GREY, tmp_path)
    expected = {"1/b.png": 1, "anomaly/cam1/a.png": 1, "d.png": UNKNOWN, "normal/a.png": 0, "other/c.png": UNKNOWN}
    assert dict(zip(dataset.names, dataset.labels.tolist(), strict=True)) == expected


def test_what_is_wrong_with_labels_csv(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / "x" / name, picture())
    save(tmp_path / "outside.png", picture())
    save_csv(
        tmp_path / "x" / "labels.csv",
        ["file", "label"],
        ["a.png", 1],
        ["a.png", 1],
        ["b.png", 1],
        ["b.png", 0],
        ["c.png", "cat"],
        ["gone.png", 1],
        ["../outside.png", 1],
        ["c.png"],
    )
    dataset, problems = found(Images(folder="x"), GREY, tmp_path)
    assert dataset.labels.tolist() == [1, UNKNOWN, UNKNOWN]
    assert problems == [
        ("cell", "x/labels.csv, line 9"),
        ("label", "x/labels.csv, line 6"),
        ("listed-twice", "x/labels.csv, line 3"),
        ("label", "x/labels.csv, line 5"),
        ("missing-file", "x/labels.csv, line 7"),
        ("missing-file", "x/labels.csv, line 8"),
    ]
    with pytest.raises(ConfigError, match="line 9"):
        load(Images(folder="x"), GREY, tmp_path)


def test_a_labels_csv_without_its_columns(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture())
    save_csv(tmp_path / "labels.csv", ["name", "label"])
    with pytest.raises(ConfigError, match="'file'"):
        load(Images(folder="."), GREY, tmp_path)
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(ConfigError, match="'file'"):
        load(Images(folder="."), GREY, tmp_path)
    with pytest.raises(ConfigError, match=r"gone\.csv"):
        load(Images(folder=".", labels="gone.csv"), GREY, tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        load(Images(folder="gone"), GREY, tmp_path)


def test_files_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    noise = picture(1, (4, 6))
    save(tmp_path / "x" / "good.jpg", noise)
    (tmp_path / "x" / "truncated.jpg").write_bytes((tmp_path / "x" / "good.jpg").read_bytes()[:-60])
    (tmp_path / "x" / "empty.png").touch()
    (tmp_path / "x" / "text.png").write_text("hello")
    save(tmp_path / "x" / "gif.png", noise, format="GIF")
    whole = tmp_path / "x" / "broken.png"
    save(whole, noise)
    data = bytearray(whole.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255
    whole.write_bytes(data)
    dataset, problems = found(Images(folder="x"), GREY, tmp_path)
    assert dataset.names == ["good.jpg"]
    assert problems == [("unreadable", f"x/{name}") for name in ("broken.png", "empty.png", "gif.png", "text.png", "truncated.jpg")]
    with pytest.raises(ConfigError, match=r"broken\.png"):
        load(Images(folder="x"), GREY, tmp_path)


def test_images_of_another_form_break_the_schema(tmp_path: Path) -> None:
    forms = {
        "rgba.png": picture(0, (4, 6, 4)),
        "rgb.png": picture(0, (4, 6, 3)),
        "la.png": picture(0, (4, 6, 2)),
        "large.png": picture(0, (8, 12)),
        "turned.png": picture(0, (6, 4)),
        "deep.png": picture().astype(np.uint16) * 257,
    }
    for name, pixels in forms.items():
        save(tmp_path / "x" / name, pixels)
    dataset, problems = found(Images(folder="x"), GREY, tmp_path)
    assert len(dataset) == 0
    assert problems == [("size", f"x/{name}") for name in sorted(forms)]
    scaled = load(Images(folder="x", resize=True), GREY, tmp_path)
    assert scaled.names == sorted(forms)
    assert scaled.inputs.shape == (6, 4, 6, 1)
    np.testing.assert_array_equal(scaled.inputs[0, :, :, 0], picture())  # 16 bits down to 8


def test_colours_channels_and_palettes(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = [255, 0, 0]
    save(tmp_path / "x" / "rgb.png", pixels)
    Image.fromarray(pixels).convert("P").save(tmp_path / "x" / "palette.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "x" / "grey.png")
    dataset, problems = found(Images(folder="x"), COLOUR, tmp_path)
    assert dataset.names == ["palette.png", "rgb.png"]
    assert problems == [("size", "x/grey.png")]
    np.testing.assert_array_equal(dataset.inputs, [pixels, pixels])
    assert len(load(Images(folder="x", resize=True), COLOUR, tmp_path)) == 3
    Image.fromarray(pixels[..., 0]).convert("1").save(tmp_path / "y.png")
    np.testing.assert_array_equal(load(Images(folder="."), GREY, tmp_path, problems=[]).inputs[-1, :, :, 0], pixels[..., 0])


def test_an_image_is_read_upright(tmp_path: Path) -> None:
    wide = np.repeat(np.arange(6, dtype=np.uint8)[None] * 40, 4, axis=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    save(tmp_path / "x" / "a.jpg", np.rot90(wide), exif=exif, quality=100)
    dataset = load(Images(folder="x"), GREY, tmp_path)
    np.testing.assert_allclose(dataset.inputs[0, :, :, 0], wide, atol=4)


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path) -> None:
    for name, side in (("large.png", 8_200), ("bomb.png", 14_000)):
        Image.new("1", (side, side)).save(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 50_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset, problems = found(Images(folder=".", resize=True), GREY, tmp_path)
    assert len(dataset) == 0
    assert [where.rpartition("/")[2] for _, where in problems] == ["bomb.png", "large.png"]


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", picture())
    save(tmp_path / "secret" / "b.png", picture())
    (tmp_path / "x" / "inside.png").symlink_to("a.png")
    (tmp_path / "x" / "out.png").symlink_to(tmp_path / "secret" / "b.png")
    (tmp_path / "x" / "folder").symlink_to(tmp_path / "secret")
    (tmp_path / "x" / "dangling.png").symlink_to(tmp_path / "gone.png")
    dataset, problems = found(Images(folder="x"), GREY, tmp_path)
    assert dataset.names == ["a.png", "inside.png"]
    assert sorted(problems) == [("link", "x/dangling.png"), ("link", "x/folder"), ("link", "x/out.png")]


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", picture())
    os.mkfifo(tmp_path / "x" / "b.png")
    dataset, problems = found(Images(folder="x"), GREY, tmp_path)
    assert dataset.names == ["a.png"]
    assert problems == [("unreadable", "x/b.png")]


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", picture())
    try:
        (tmp_path / "x" / "a.png").rename(tmp_path / "x" / "\udcff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert found(Images(folder="x"), GREY, tmp_path)[1] == [("unreadable", "x/\\udcff.png")]


def test_limit_and_rows(tmp_path: Path) -> None:
    for index in range(10):
        save(tmp_path / "x" / f"{index}.png", picture(index))
    assert load(Images(folder="x", limit=4), GREY, tmp_path).names == ["0.png", "2.png", "5.png", "7.png"]
    assert load(Images(folder="x", rows=(7, 99)), GREY, tmp_path).names == ["7.png", "8.png", "9.png"]
    assert load(Images(folder="x", rows=(4, 8), limit=2), GREY, tmp_path).names == ["4.png", "6.png"]
    assert len(load(Images(folder="x", rows=(20, 30)), GREY, tmp_path)) == 0


def test_more_channels_than_image_files_have(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", picture())
    with pytest.raises(ConfigError, match="5 channels"):
        load(Images(folder="x"), Schema(shape=[4, 6, 5]), tmp_path)


# Tables


def test_a_csv_file(tmp_path: Path) -> None:
    save_csv(tmp_path / "x.csv", ["dose", "age", "y", "device", "id"], [0.5, 30, 1, "cam 1", "one"], ["1e3", " 40", "normal", "", "two"])
    spec = Table(file="x.csv", label="y")
    dataset = load(spec, TABLE, tmp_path)
    np.testing.assert_array_equal(dataset.inputs, np.array([[30, 0.5], [40, 1000]], np.float32))
    assert dataset.inputs.dtype == np.float32
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.names == ["line 2", "line 3"]
    assert dataset.columns == {"device": ["cam 1", ""], "patient": ["", ""]}
    assert load(Table(file="x.csv", names="id"), TABLE, tmp_path).names == ["one", "two"]
    assert load(Table(file="x.csv"), TABLE, tmp_path).labels.tolist() == [UNKNOWN, UNKNOWN]


def test_a_csv_file_from_a_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes('\ufeffage;dose;y\r\n30;0.5;1\r\n\r\n"40";1;0\r\n'.encode())
    dataset = load(Table(file="x.csv", label="y"), TABLE, tmp_path)
    assert dataset.inputs.tolist() == [[30, 0.5], [40, 1]]
    assert dataset.names == ["line 2", "line 4"]


def test_cells_that_are_no_numbers(tmp_path: Path) -> None:
    rows = [[30, 1, 1], ["", 1, 1], ["old", 1, 1], [30, "nan", 1], [30, "1e99", 0], [31, 2, 0], [1, 2]]
    save_csv(tmp_path / "x.csv", ["age", "dose", "y"], *rows)
    dataset, problems = found(Table(file="x.csv", label="y"), TABLE, tmp_path)
    assert dataset.names == ["line 2", "line 7"]
    assert problems == [
        ("cell", "x.csv, line 8"),
        ("cell", "x.csv, line 3, column age"),
        ("cell", "x.csv, line 4, column age"),
        ("cell", "x.csv, line 5, column dose"),
        ("cell", "x.csv, line 6, column dose"),
    ]
    with pytest.raises(ConfigError, match=r"x\.csv, line 8"):
        load(Table(file="x.csv", label="y"), TABLE, tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "lacks the columns age, dose, y"),
        (b"age,y\n1,2\n", "lacks the columns dose"),
        (b"age,dose,age\n", "two columns called 'age'"),
        ("age,dose,y\nÄ,1,1\n".encode("latin-1"), "UTF-8"),
        (b'age,dose,y\n1,"2\n', "cannot be read as CSV"),
    ],
)
def test_a_csv_file_that_is_none(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load(Table(file="x.csv", label="y"), TABLE, tmp_path)


def test_a_csv_file_of_no_rows(tmp_path: Path) -> None:
    save_csv(tmp_path / "x.csv", ["age", "dose", "y"])
    assert load(Table(file="x.csv", label="y"), TABLE, tmp_path).inputs.shape == (0, 2)


def test_a_parquet_file(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "age": [30, 40, None, 50],
        "dose": [0.5, 1.0, 2.0, float("nan")],
        "y": [True, False, True, True],
        "device": ["a", None, "b", "b"],
        "patient": [1, 2, 3, 4],
        "blob": [b"\xff"] * 4,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    dataset, problems = found(Table(file="x.parquet", label="y"), TABLE, tmp_path)
    assert dataset.inputs.tolist() == [[30, 0.5], [40, 1]]
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.columns == {"device": ["a", ""], "patient": ["1", "2"]}
    assert problems == [("cell", "x.parquet, row 3, column age"), ("cell", "x.parquet, row 4, column dose")]


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("PAR1")
    with pytest.raises(ConfigError, match="Parquet"):
        load(Table(file="x.parquet"), TABLE, tmp_path)
    with pytest.raises(ConfigError, match="Parquet"):
        load(Table(file="gone.parquet"), TABLE, tmp_path)


def test_data_of_another_kind_than_the_schema(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'table'"):
        load(Table(file="x.csv"), GREY, tmp_path)
    with pytest.raises(ConfigError, match="'image'"):
        load(Images(folder="x"), TABLE, tmp_path)


# Arrays and code


def test_arrays(tmp_path: Path) -> None:
    images = np.stack([picture(index) for index in range(5)])
    np.savez(tmp_path / "x.npz", inputs=images, labels=[0, 1, -1, 1, 0], names=list("abcde"), device=["x", "y", "x", "y", "x"])
    dataset = load(Arrays(file="x.npz", rows=(1, 4)), GREY, tmp_path)
    np.testing.assert_array_equal(dataset.inputs[..., 0], images[1:4])
    assert dataset.labels.tolist() == [1, UNKNOWN, 1]
    assert dataset.names == ["b", "c", "d"]
    assert dataset.columns == {"device": ["y", "x", "y"], "patient": ["", "", ""]}


def test_arrays_of_another_form(tmp_path: Path) -> None:
    good = np.zeros((2, 4, 6, 1))
    for inputs in (good, good.astype(np.uint8)[:, :3], good.astype(int) + 256, good.astype(int) - 1):
        np.savez(tmp_path / "x.npz", inputs=inputs)
        with pytest.raises(ConfigError, match="bytes"):
            load(Arrays(file="x.npz"), GREY, tmp_path)
    np.savez(tmp_path / "x.npz", inputs=good.astype(int), labels=[1])
    with pytest.raises(ConfigError, match="2 inputs, but 1 labels"):
        load(Arrays(file="x.npz"), GREY, tmp_path)
    np.savez(tmp_path / "x.npz", labels=[1])
    with pytest.raises(ConfigError, match="no inputs"):
        load(Arrays(file="x.npz"), GREY, tmp_path)
    np.savez(tmp_path / "x.npz", inputs=np.zeros((2, 3)))
    with pytest.raises(ConfigError, match=r"\(n, 2\)"):
        load(Arrays(file="x.npz"), TABLE, tmp_path)


def test_arrays_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", inputs=np.array([{"a": 1}], object))
    with pytest.raises(ConfigError, match=r"cannot be read as \.npz"):
        load(Arrays(file="x.npz"), GREY, tmp_path)
    for content in (b"", b"PK\x03\x04 no zip", b"\x93NUMPY"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"cannot be read as \.npz"):
            load(Arrays(file="x.npz"), GREY, tmp_path)


def test_a_row_with_a_value_that_is_not_finite(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", inputs=[[1, 2], [np.nan, 2], [3, np.inf], [4, 5]], labels=[0, 1, 0, 1])
    dataset, problems = found(Arrays(file="x.npz"), TABLE, tmp_path)
    assert dataset.labels.tolist() == [0, 1]
    assert problems == [("cell", "row 2"), ("cell", "row 3")]


CODE = """
import numpy as np
from hanse.finetuning.data import Dataset

X = np.arange(6.0).reshape(3, 2)
Y = [0, 1, 1]

def pair(): return X, Y
def mapping(): return {"inputs": X, "labels": Y, "names": ["a", "b", "c"], "columns": {"device": ["x", "y", "x"]}}
def dataset(): return Dataset(X.astype("f4"), np.array(Y), ["a", "b", "c"], {"device": ["x", "y", "x"]})
def items(): return list(zip(X, Y))
def wrong(): return 3
def none(): return None
def fails(): raise RuntimeError("no disk")
"""


@pytest.mark.parametrize("name", ["pair", "mapping", "dataset", "items"])
def test_a_function_of_the_partys_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "own.py").write_text(CODE)
    dataset = load(Python(file="own.py", name=name), TABLE, tmp_path)
    assert dataset.inputs.dtype == np.float32
    assert dataset.inputs.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert dataset.labels.tolist() == [0, 1, 1]
    if name in ("mapping", "dataset"):
        assert dataset.names == ["a", "b", "c"]
        assert dataset.columns["device"] == ["x", "y", "x"]


@pytest.mark.parametrize(("name", "says"), [("wrong", "gave int"), ("none", "gave NoneType"), ("fails", "no disk"), ("gone", "'gone'")])
def test_a_function_that_gives_no_data(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "own.py").write_text(CODE)
    with pytest.raises(ConfigError, match=says):
        load(Python(file="own.py", name=name), TABLE, tmp_path)


def test_code_outside_the_project_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit")
    (tmp_path / "project").mkdir()
    with pytest.raises(ConfigError, match="outside"):
        load(Python(file="../own.py"), TABLE, tmp_path / "project")


# What the model gets


def test_prepared_images() -> None:
    schema = Schema(shape=[1, 2, 3], mean=[0.5, 0.0, 1.0], std=[0.5, 1.0, 2.0])
    inputs = np.array([[[[255, 0, 51], [0, 255, 255]]]], np.uint8)  # one image, one row of two pixels
    x = prepared(Dataset(inputs, np.array([0]), ["a"]), schema)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, [[[[1, -1]], [[0, 1]], [[-0.4, 0]]]], atol=1e-7)
    assert prepared(Dataset(inputs[:0], np.zeros(0, np.int64), []), schema).shape == (0, 3, 1, 2)


def test_prepared_tables() -> None:
    schema = Schema(kind="table", columns=["a", "b"], mean=[1, 2], std=[2])
    x = prepared(Dataset(np.array([[1, 2], [3, 0]], np.float32), np.array([0, 1]), ["r", "s"]), schema)
    assert x.dtype == np.float32
    assert x.tolist() == [[0, 0], [1, -1]]
    wrong = Schema(kind="table", columns=["a", "b"], mean=[1, 2, 3])
    with pytest.raises(ConfigError, match="mean has 3 numbers"):
        prepared(Dataset(np.zeros((1, 2), np.float32), np.array([0]), ["r"]), wrong)


def test_select_keeps_rows_together() -> None:
    dataset = Dataset(np.arange(4)[:, None], np.array([0, 1, -1, 1]), list("abcd"), {"device": list("wxyz")})
    for chosen in ([3, 1], np.array([3, 1])):
        part = dataset.select(chosen)
        assert (part.inputs[:, 0].tolist(), part.labels.tolist(), part.names, part.columns["device"]) == (
            [3, 1],
            [1, 1],
            ["d", "b"],
            ["z", "x"],
        )
    assert len(dataset.select([])) == 0
    assert dataset.labelled.names == ["a", "b", "d"]
