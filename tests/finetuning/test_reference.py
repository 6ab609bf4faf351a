from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hanse.errors import ConfigError
from hanse.finetuning.reference import Reference, read_reference, reference
from hanse.messages.codec import read, write


def holdout(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A third positive."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 3 == 0).astype(np.int64)
    scores = 1 / (1 + np.exp(-rng.normal(np.where(labels == 1, 3, -3), 2)))
    return scores, labels, rng.normal(labels[:, None], 1, size=(n, 4)).astype(np.float32)


def make(n: int = 600, **arguments: object) -> Reference:
    scores, labels, embeddings = holdout(n)
    settings = {"seed": 1, "sizes": (50, 100), "resamples": 100} | arguments
    return reference(scores, labels, settings.pop("embeddings", embeddings), 0.5, **settings)  # type: ignore[arg-type]


def test_it_is_what_the_holdout_comes_to() -> None:
    scores, labels, _ = holdout()
    made = make()
    assert made.positives == pytest.approx(1 / 3)
    (wrong, negatives), (missed, positives) = made.errors
    assert (negatives, positives) == (400, 200)
    assert (wrong, missed) == (int((scores[labels == 0] >= 0.5).sum()), int((scores[labels == 1] < 0.5).sum()))
    whole = made.mixture(made.scores)
    for place in (0, 60, 199):  # on the cell of a point, the distribution function there
        assert whole[2 * place + 1] == pytest.approx((scores <= made.sketch[place]).mean())
    assert_allclose(made.mixture(made.scores, 1.0), made.scores[1])
    assert (made.embeddings.shape, made.dimension) == ((2, 512), 4)


def test_it_survives_a_file(tmp_path: Path) -> None:
    made = make(slices={"device": ["a", "b"] * 300}, model="blake3:" + "0" * 64)
    made.write(tmp_path / "of" / "version.safetensors")
    found = read_reference(tmp_path / "of" / "version.safetensors")
    assert found.digest == made.digest
    assert (found.model, found.confusion, found.sizes) == (made.model, made.confusion, made.sizes)
    assert_array_equal(found.slices["device"]["b"], made.slices["device"]["b"])
    assert_array_equal(found.frequencies, made.frequencies)


def test_it_does_not_grow_with_the_holdout() -> None:
    small, large = make(), make(12_000)
    assert sum(map(sum, large.confusion)) == 10_000
    numbers = [sum(np.size(getattr(each, name)) for name in ("sketch", "scores", "embeddings", "ks", "mmd")) for each in (small, large)]
    assert numbers == [2 * 2 * 6 + 200 + 2 * 401 + 2 * 512] * 2


def test_the_seed_decides_its_bits() -> None:
    assert make().digest == make().digest != make(seed=2).digest


def test_without_embeddings() -> None:
    made = make(embeddings=None)
    assert (made.dimension, made.embeddings.shape) == (0, (2, 0))
    assert_array_equal(made.mmd, np.zeros((2, 6)))


def test_a_slice_of_few_rows_is_left_out() -> None:
    made = make(slices={"device": ["few"] * 99 + ["many"] * 501})
    assert list(made.slices["device"]) == ["many"]


def test_what_gives_no_reference() -> None:
    scores, labels, embeddings = holdout()
    with pytest.raises(ConfigError, match="99 rows of the holdout have the label 1"):
        reference(scores[:297], labels[:297], None, 0.5, seed=0)
    with pytest.raises(ConfigError, match="does not tell the holdout's classes apart"):
        reference(scores, labels, None, 0.0, seed=0)
    with pytest.raises(ConfigError, match="not in 0…1"):
        reference(np.where(scores > 0.9, np.nan, scores), labels, None, 0.5, seed=0)
    with pytest.raises(ConfigError, match="not as many labels"):
        reference(scores, labels[1:], None, 0.5, seed=0)
    with pytest.raises(ConfigError, match="embeddings are not"):
        reference(scores, labels, embeddings * np.inf, 0.5, seed=0)


def test_another_file_is_no_reference(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(ConfigError, match=r"cannot be read.*watch-reference"):
        read_reference(path)
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="is no reference"):
        read_reference(path)
    make().write(path)
    model, fields = read(path)
    model.params["scores"] = model.params["scores"][:, 1:]
    write(path, model, fields)
    with pytest.raises(ConfigError, match="scores has the shape"):
        read_reference(path)
    model.params["scores"] = model.params["sketch"].tolist()
    write(path, model, fields)
    with pytest.raises(ConfigError, match="is no reference"):
        read_reference(path)
