from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp

from hanse.errors import ConfigError
from hanse.finetuning.check import (
    EXAMPLES,
    DataCheck,
    Finding,
    as_text,
    check,
    check_folder,
    distance,
    features,
    profile,
    read_profile,
    write_report,
)  # fmt: skip
from hanse.finetuning.contract import Gate, Party, Project, Schema, write_project
from hanse.finetuning.data import UNKNOWN, Dataset, Problem

IMAGE = Schema(shape=[8, 8, 1])
TABLE = Schema(kind="table", columns=["age", "dose"])


def images(rows: int = 200, seed: int = 0, columns: dict[str, list[str]] | None = None) -> Dataset:
    """Noise, every second row positive."""
    inputs = np.random.default_rng(seed).integers(0, 256, (rows, 8, 8, 1), np.uint8)
    return Dataset(inputs, np.arange(rows) % 2, [f"{seed}-{row}.png" for row in range(rows)], columns or {})


def table(rows: int = 200, seed: int = 0) -> Dataset:
    inputs = np.random.default_rng(seed).normal(size=(rows, 2)).astype(np.float32)
    return Dataset(inputs, np.arange(rows) % 2, [f"line {row}" for row in range(rows)])


def changed(dataset: Dataset, **parts: Any) -> Dataset:
    return Dataset(**{"inputs": dataset.inputs, "labels": dataset.labels, "names": dataset.names, "columns": dataset.columns} | parts)


def finding(found: DataCheck, code: str, section: str | None = None) -> Finding:
    matching = [each for each in found.findings if each.code == code and section in (None, each.section)]
    assert len(matching) == 1, [each.code for each in found.findings]
    return matching[0]


def codes(found: DataCheck) -> set[str]:
    return {each.code for each in found.findings}


@pytest.mark.parametrize(("make", "schema"), [(images, IMAGE), (table, TABLE)])
def test_good_data(make: Any, schema: Schema) -> None:
    found = check(make(seed=0), make(seed=1), schema)
    assert found.outcome == "ok"
    assert found.findings == []
    assert found.sections["train"].negatives == found.sections["test"].positives == 100
    assert "Nothing is wrong" in as_text(found)


# Labels


def test_no_rows() -> None:
    for train, test, section in ((images(0), images(), "train"), (images(), images(0), "test")):
        found = check(train, test, IMAGE)
        assert found.outcome == "failed"
        assert finding(found, "empty").section == section
    assert check(table(0), table(0), TABLE).outcome == "failed"


def test_one_class_only() -> None:
    found = check(images(), changed(images(seed=1), labels=np.zeros(200, np.int64)), IMAGE)
    assert found.outcome == "failed"
    assert finding(found, "one-class").sentence == "test has no row of class 'anomaly'."


def test_rows_without_labels() -> None:
    labels = np.arange(200) % 2
    labels[:30] = UNKNOWN
    found = check(changed(images(), labels=labels), images(seed=1), IMAGE)
    assert found.outcome == "ok"
    assert (finding(found, "unlabelled").level, finding(found, "unlabelled").count) == ("note", 30)
    found = check(changed(images(), labels=np.full(200, UNKNOWN)), images(seed=1), IMAGE)
    assert (found.outcome, finding(found, "unlabelled").level) == ("failed", "error")


def test_too_few_of_a_class() -> None:
    found = check(images(18), images(seed=1), IMAGE, measured="holdout", wanted=101)
    assert found.outcome == "warnings"
    assert {(each.section, each.count) for each in found.findings if each.code == "few"} == {("train", 9), ("holdout", 100)}
    assert codes(check(images(20), images(seed=1), IMAGE, wanted=100)) == set()


# Copies


def test_the_same_image_twice() -> None:
    train = images()
    inputs = train.inputs.copy()
    inputs[[4, 6]] = inputs[2]
    found = check(changed(train, inputs=inputs), images(seed=1), IMAGE)
    assert found.outcome == "warnings"
    duplicate = finding(found, "duplicate")
    assert (duplicate.section, duplicate.count) == ("train", 2)
    assert [(each.name, each.like) for each in duplicate.examples] == [("0-4.png", "0-2.png"), ("0-6.png", "0-2.png")]


def test_the_same_image_with_two_labels() -> None:
    train = images()
    inputs = train.inputs.copy()
    inputs[3] = inputs[2]
    found = check(changed(train, inputs=inputs), images(seed=1), IMAGE)
    assert (found.outcome, finding(found, "conflict").count) == ("failed", 1)
    assert "duplicate" not in codes(found)


def test_rows_of_a_table_may_be_equal() -> None:
    train = table()
    inputs = np.round(train.inputs)
    found = check(changed(train, inputs=inputs), changed(table(seed=1), inputs=np.round(table(seed=1).inputs)), TABLE)
    assert found.outcome == "warnings"
    assert {"duplicate", "conflict", "overlap"} <= codes(found)


def test_images_measured_on_that_were_trained_on() -> None:
    test = images(300, seed=1)
    inputs = test.inputs.copy()
    inputs[:3] = images().inputs[:3]
    found = check(images(), changed(test, inputs=inputs), IMAGE)
    assert (finding(found, "overlap").level, finding(found, "overlap").count) == ("warning", 3)  # 1 %
    inputs[3] = images().inputs[3]
    found = check(images(), changed(test, inputs=inputs), IMAGE)
    assert (finding(found, "overlap").level, found.outcome) == ("error", "failed")
    assert found.summary()["overlap"] == 4
    unlabelled = changed(images(), labels=np.where(np.arange(200) < 4, UNKNOWN, images().labels))
    assert "overlap" not in codes(check(unlabelled, changed(test, inputs=inputs), IMAGE))


def test_images_that_are_nearly_the_same() -> None:
    train, test = images(), images(seed=1)
    inputs = test.inputs.copy()
    inputs[0] = train.inputs[5] // 2
    inputs[9] = 255 - (255 - inputs[8]) // 2
    inputs[11] = train.inputs[7]
    found = check(train, changed(test, inputs=inputs), IMAGE)
    assert [(each.name, each.like) for each in finding(found, "near-overlap").examples] == [("1-0.png", "0-5.png")]
    assert [(each.name, each.like) for each in finding(found, "near-duplicate").examples] == [("1-9.png", "1-8.png")]
    assert finding(found, "overlap").count == 1


# Slices and groups


def test_columns_that_say_nothing() -> None:
    schema = Schema(shape=[8, 8, 1], slices=["device"], group="patient")
    columns = {"device": ["a"] * 199 + [""], "patient": [f"p{row}" for row in range(200)]}
    found = check(images(columns=columns), images(seed=1, columns={"device": ["a"] * 200}), schema)
    assert finding(found, "column", "train").sentence == "1 row of train without 'device': they are in no slice."
    assert (finding(found, "column", "test").level, finding(found, "column", "test").count) == ("error", 200)


def test_groups_on_both_sides() -> None:
    schema = Schema(shape=[8, 8, 1], group="patient")
    train = images(columns={"patient": [f"p{row // 4}" for row in range(200)]})
    test = images(seed=1, columns={"patient": [f"q{row // 4}" for row in range(200)]})
    assert check(train, test, schema).outcome == "ok"
    test.columns["patient"][:3] = ["p1", "p1", "p2"]
    found = check(train, test, schema)
    assert (found.outcome, finding(found, "group-overlap").count) == ("failed", 3)
    assert [each.name for each in finding(found, "group-overlap").examples] == ["p1", "p2"]


def test_slices_are_counted() -> None:
    schema = Schema(shape=[8, 8, 1], slices=["device"])
    test = images(seed=1, columns={"device": ["a"] * 185 + ["b"] * 15})
    found = check(images(columns={"device": ["a"] * 200}), test, schema)
    assert found.sections["test"].slices == {"device": {"a": (93, 92, 0), "b": (7, 8, 0)}}
    assert [each.name for each in finding(found, "few-in-slice").examples] == ["b"]
    assert [each.name for each in finding(found, "new-slice").examples] == ["b"]
    assert found.outcome == "ok"


# Values


def test_images_of_one_colour_or_another_scale() -> None:
    train = images()
    inputs = train.inputs.copy()
    inputs[7] = 40
    assert [each.name for each in finding(check(changed(train, inputs=inputs), images(seed=1), IMAGE), "blank").examples] == ["0-7.png"]
    scaled = changed(train, inputs=(train.inputs > 127).astype(np.uint8))
    assert finding(check(scaled, images(seed=1), IMAGE), "range").section == "train"


def test_columns_of_a_table() -> None:
    train = table()
    inputs = train.inputs.copy()
    inputs[:, 0] = 3
    inputs[5, 1] = 1000
    found = check(changed(train, inputs=inputs), table(seed=1), TABLE)
    assert "'age' of train is 3.000 in every row" in finding(found, "constant").sentence
    assert [each.name for each in finding(found, "far").examples] == ["line 5"]


# What could not be loaded


def test_problems_of_loading() -> None:
    few = [Problem("unreadable", f"x/{row}.png", "cannot be read") for row in range(21)]
    found = check(images(), images(seed=1), IMAGE, problems=few)
    assert (found.outcome, finding(found, "unreadable").count) == ("warnings", 21)
    assert len(finding(found, "unreadable").examples) == EXAMPLES
    assert check(images(), images(seed=1), IMAGE, problems=few + few).outcome == "failed"
    found = check(
        images(), images(seed=1), IMAGE, problems=[Problem("size", "x/a.png", "is too large"), Problem("label", "line 2", "is odd")]
    )
    assert found.outcome == "failed"
    assert finding(found, "label").sentence == "1 row has a label that means nothing here, or two."
    assert "x/a.png: is too large" in as_text(found)


# Drift


def test_distance_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for a, b in ((rng.normal(size=50), rng.normal(0.3, 2, size=71)), (rng.integers(0, 3, 40), rng.integers(0, 4, 30)), ([1.0], [2.0])):
        assert distance(np.asarray(a, float), np.asarray(b, float)) == pytest.approx(ks_2samp(a, b).statistic, abs=1e-12)


def test_features_by_hand() -> None:
    one = np.array([[[0, 255], [255, 255]]], np.uint8)[..., None]
    found = features(Dataset(one, np.array([0]), ["a"]), Schema(shape=[2, 2, 1]))
    assert found["brightness"].tolist() == pytest.approx([0.75])
    assert found["contrast"].tolist() == pytest.approx([np.sqrt(3) / 4])
    assert found["sharpness"].tolist() == pytest.approx([0.5])


def test_drift_between_train_and_test_and_from_the_reference() -> None:
    train, darker = images(400), changed(images(400, seed=1), inputs=images(400, seed=1).inputs // 2)
    found = check(train, darker, IMAGE)
    assert (found.outcome, finding(found, "drift").level) == ("warnings", "warning")
    assert found.drift["test and train"]["brightness"] == 1.0
    found = check(darker, changed(images(400, seed=2), inputs=images(400, seed=2).inputs // 2), IMAGE, profile(train, IMAGE))
    assert (found.outcome, finding(found, "drift").level) == ("ok", "note")
    assert found.summary()["drift_reference"] == 1.0
    assert found.summary()["drift_train"] < 0.1


def test_a_profile_keeps_the_distribution() -> None:
    rows = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32)
    kept = profile(Dataset(rows, np.zeros(5000, np.int64), ["r"] * 5000), TABLE)
    assert [len(values) for values in kept.quantiles.values()] == [200, 200]
    assert distance(rows[:, 0].astype(float), np.array(kept.quantiles["age"])) < 0.004


# What comes of it


def test_the_summary_is_numbers_alone() -> None:
    schema = Schema(shape=[8, 8, 1], slices=["device"], group="patient")
    columns = {"device": ["secret"] * 200, "patient": ["Ada"] * 200}
    found = check(images(columns=columns), images(seed=1, columns=columns), schema, problems=[Problem("unreadable", "Ada.png", "broken")])
    numbers = found.summary()
    assert all(type(value) is float for value in numbers.values())
    assert numbers["group_overlap"] == 200
    assert numbers["train_positives"] == 100
    assert not any("secret" in name or "Ada" in name for name in numbers)


def test_the_check_is_json() -> None:
    found = check(images(), images(), IMAGE)
    assert msgspec.json.decode(msgspec.json.encode(found), type=DataCheck) == found


def test_the_report_shows_the_pictures_and_runs_nothing(tmp_path: Path) -> None:
    train = images()
    inputs = train.inputs.copy()
    inputs[4] = inputs[2]
    train = changed(train, inputs=inputs, names=["<script>alert(1)</script>\x1b[2J", *train.names[1:4], "<b>4", *train.names[5:]])
    found = check(train, images(seed=1), IMAGE, problems=[Problem("unreadable", "x/<img src=x>.png", "is broken")])
    page = write_report(found, tmp_path / "new" / "data-check.html", {"train": train}).read_text()
    assert "<script" not in page
    assert "<b>4" not in page
    assert "<img src=x>" not in page
    assert page.count("data:image/png;base64,") == 2
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data-check.html"]


def test_text_cannot_steer_the_terminal() -> None:
    found = check(images(), images(seed=1), IMAGE, problems=[Problem("unreadable", "\x1b[2J\n.png", "is broken")])
    assert "\x1b" not in as_text(found)


# A party's folder


def write_party(folder: Path, section: str, *, rows: int = 30) -> None:
    parties = {"vendor": Party(site="acme", organisation="Acme"), "clients": [Party(site="clinic", organisation="Clinic")]}
    write_project(folder, Project(name="demo", schema=IMAGE, gate=Gate(min_per_class=40), **parties))
    (folder / "data.yaml").write_text(f"train: {{kind: images, folder: train}}\n{section}: {{kind: images, folder: {section}}}\n")
    for seed, name in enumerate(("train", section)):
        dataset = images(2 * rows, seed)
        for row, pixels in enumerate(dataset.inputs[..., 0]):
            path = folder / name / ("normal", "anomaly")[row % 2] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def test_a_folder_is_checked(tmp_path: Path) -> None:
    write_party(tmp_path / "vendor", "holdout")
    write_party(tmp_path / "client", "test")
    vendor = check_folder(tmp_path / "vendor")
    assert (vendor.outcome, vendor.measured) == ("warnings", "holdout")
    assert [(each.code, each.section) for each in vendor.findings] == [("few", "holdout")] * 2  # for the gate
    written = tmp_path / "vendor" / "reports" / "data-profile.json"
    assert read_profile(written).rows == 60
    client = check_folder(tmp_path / "client", written)
    assert client.drift["train and reference"] == pytest.approx(dict.fromkeys(("brightness", "contrast", "sharpness"), 0), abs=0.03)
    assert (tmp_path / "client" / "reports" / "data-check.html").is_file()
    with pytest.raises(ConfigError, match="no profile"):
        check_folder(tmp_path / "client", tmp_path / "client" / "data.yaml")


def test_a_folder_without_a_section(tmp_path: Path) -> None:
    write_party(tmp_path, "test")
    (tmp_path / "data.yaml").write_text("train: {kind: images, folder: train}\n")
    with pytest.raises(ConfigError, match="no section 'test'"):
        check_folder(tmp_path)
