"""Scoring: against a hand-computed logit, refusals one by one, and the same pixels as the data that was trained on."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hanse.errors import ConfigError
from hanse.finetuning.contract import Schema
from hanse.finetuning.data import Images, load
from hanse.finetuning.scoring import Item, Refusal, Scored, Scorer, decode

VERSION = "blake3:" + "a" * 64
IMAGE = Schema(shape=[4, 6, 1], mean=[0.5], std=[0.25])
TABLE = Schema(kind="table", columns=["weight", "age"], mean=[10.0, 0.0], std=[2.0, 1.0])


def linear(weights: list[float], bias: float) -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(len(weights), 1))
    with torch.no_grad():
        module[1].weight[:] = torch.tensor([weights])
        module[1].bias[:] = bias
    return module


def table_scorer(threshold: float = 0.5) -> Scorer:
    return Scorer(module=linear([1.0, -2.0], 0.5), schema=TABLE, threshold=threshold, version=VERSION)


def png(pixels: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def test_a_score_is_the_probability_of_class_1():
    answer = table_scorer().answers([Item("a", [14.0, 1.0])])[0]  # (14 - 10) / 2 - 2·1 + 0.5 = 0.5
    assert answer == Scored(name="a", score=pytest.approx(1 / (1 + math.exp(-0.5))), decision=1, version=VERSION)


def test_the_threshold_itself_is_positive():
    score = table_scorer().answers([Item("a", [14.0, 1.0])])[0].score
    assert [table_scorer(t).answers([Item("a", [14.0, 1.0])])[0].decision for t in (score, math.nextafter(score, 1))] == [1, 0]


def test_columns_by_name_or_in_order_are_the_same():
    first, second = table_scorer().answers([Item("a", [14.0, 1.0]), Item("a", {"age": "1", "weight": "14", "colour": "red"})])
    assert first == second


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1.0], "1 numbers"),
        ([1.0, math.nan], "'age' is 'nan'"),
        ([math.inf, 1.0], "'weight' is 'inf'"),
        ([1e39, 1.0], "'weight'"),
        ([10**400, 1.0], "'weight'"),
        ([True, 1.0], "'weight' is 'True'"),
        ({"weight": 1.0}, "'age' is missing"),
        ({"weight": 1.0, "age": "old"}, "'age' is 'old'"),
        ({"weight": 1.0, "age": None}, "'age' is 'None'"),
        (b"\x89PNG", "takes rows of numbers"),
    ],
)
def test_rows_that_break_the_schema(row, said):
    good = Item("good", [14.0, 1.0])
    before, refused, after = table_scorer().answers([good, Item("bad", row), good])
    assert isinstance(refused, Refusal)
    assert refused.name == "bad"
    assert said in refused.error
    assert before == after
    assert isinstance(before, Scored)


def test_an_input_on_which_the_model_fails_spoils_no_other():
    rows = [Item("a", [14.0, 1.0]), Item("b", [3e38, -3e38]), Item("c", [12.0, 0.0])]
    first, failed, last = table_scorer().answers(rows)
    assert isinstance(failed, Refusal)
    assert "no probability" in failed.error
    assert [first.score, last.score] == [pytest.approx(table_scorer().answers([row])[0].score) for row in (rows[0], rows[2])]


def test_nothing_gives_nothing():
    assert table_scorer().answers([]) == []


def test_images_are_read_as_the_training_data_is(tmp_path: Path):
    rng = np.random.default_rng(1)
    for name, size, format in (("a.png", (4, 6), "PNG"), ("b.bmp", (4, 6), "BMP"), ("c.jpg", (9, 5), "JPEG")):
        (tmp_path / name).write_bytes(png(rng.integers(0, 256, size, np.uint8), format))
    dataset = load(Images(folder=".", resize=True), IMAGE, tmp_path)
    for name, expected in zip(dataset.names, dataset.inputs, strict=True):
        for content in (tmp_path / name, (tmp_path / name).read_bytes()):
            np.testing.assert_array_equal(decode(content, IMAGE, resize=True), expected)


def test_images_are_scored_after_their_preparation():
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    scorer = Scorer(module=linear([0.01] * 24, 0.0), schema=IMAGE, threshold=0.5, version=VERSION)
    logit = 0.01 * ((pixels / 255 - 0.5) / 0.25).sum()
    assert scorer.answers([Item("a", png(pixels))])[0].score == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no image"),
        (b"GIF89a" + bytes(50), "no image"),
        (png(np.zeros((4, 6), np.uint8))[:-20], "no image"),
        (png(np.zeros((6, 4), np.uint8)), "6 × 4"),
        (png(np.zeros((4, 6, 3), np.uint8)), "'RGB'"),
        (png(np.zeros((9000, 9000), np.uint8)), "pixels"),
        ([1.0, 2.0], "takes images"),
        (Path("/nowhere.png"), "no image"),
    ],
)
def test_images_that_break_the_schema(content, said):
    with pytest.raises(ConfigError, match=said):
        decode(content, IMAGE)
