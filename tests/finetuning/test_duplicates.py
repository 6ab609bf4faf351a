from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hanse.finetuning.duplicates import NEAR, digests, near, same

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def noise(count: int, shape: tuple[int, ...] = (12, 12, 1), seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def through_jpeg(image: Bytes, quality: int) -> Bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))[..., None]


@given(st.lists(st.integers(0, 3), max_size=12), st.none() | st.lists(st.integers(0, 3), max_size=12))
def test_same_finds_what_a_plain_search_finds(first: list[int], second: list[int] | None) -> None:
    expected = []
    for row, value in enumerate(first if second is None else second):
        equal = [other for other, before in enumerate(first) if before == value and (second is not None or other < row)]
        expected += [[row, equal[0]]] if equal else []
    rows = [digests(np.array(values, np.float32).reshape(-1, 1)) for values in (first, second) if values is not None]
    assert same(*rows).tolist() == expected


def test_near_is_the_best_correlation_above_the_limit() -> None:
    first = noise(40)
    rng = np.random.default_rng(1)
    second = np.concatenate([noise(5, seed=2), np.clip(first[[7, 3]] + rng.normal(0, 4, (2, 12, 12, 1)), 0, 255).astype(np.uint8)])
    assert near(first, second).tolist() == [[5, 7], [6, 3]]
    for row, like in [(5, 7), (6, 3)]:
        assert np.corrcoef(second[row].ravel(), first[like].ravel())[0, 1] >= NEAR
    assert near(np.concatenate([first, second[5:]])).tolist() == [[40, 7], [41, 3]]


def test_near_sees_through_exposure_and_compares_grey() -> None:
    first = noise(10, (9, 17, 3))
    second = (first[4:5] // 2 + 40).astype(np.uint8)
    assert near(first, second).tolist() == [[0, 4]]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 3, 1), (8, 9, 1), (33, 65, 3)])
def test_near_takes_any_size(shape: tuple[int, ...]) -> None:
    images = noise(5, shape)
    expected = [] if shape == (1, 1, 1) else [[row, row] for row in range(5)]
    assert near(images, images).tolist() == expected
    assert near(images[:0], images).tolist() == near(images, images[:0]).tolist() == near(images[:0]).tolist() == []
    assert near(images[:1]).tolist() == []


def test_images_of_one_colour_are_like_nothing() -> None:
    assert near(np.zeros((5, 8, 8, 1), np.uint8)).tolist() == []


def test_near_in_blocks() -> None:
    images = noise(1100, (8, 8, 1))
    assert near(np.concatenate([images, images[[0, 1050]]])).tolist() == [[1100, 0], [1101, 1050]]


def test_copies_of_real_images_are_found(data_folder: Path) -> None:
    images = np.load(data_folder / "fashion_mnist.npz")["x_test"][:1000, ..., None]
    copies = np.stack([through_jpeg(image, quality=90) for image in images[:100]])
    found = near(images, copies)
    assert len(found) == 100
    assert (found[:, 0] == found[:, 1]).all()
    assert len(near(images)) <= 5
