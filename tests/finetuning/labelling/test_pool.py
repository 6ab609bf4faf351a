from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hanse.errors import ConfigError
from hanse.finetuning.contract import Model, Party, Project, Schema, write_project
from hanse.finetuning.labelling.pool import read_pool
from hanse.finetuning.versions import CURRENT, Versions

MODEL = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A client's project whose current version's embedding is (mean brightness, 0) and score sigmoid(8 · mean - 4)."""
    folder = tmp_path / "project"
    party = Party(site="client", organisation="Client")
    schema = Schema(shape=[4, 4, 1], slices=["device"])
    write_project(folder, Project(name="p", vendor=Party(site="vendor", organisation="V"), clients=[party], model=Model(), schema=schema))
    (folder / "model.py").write_text(MODEL)
    first = np.vstack([np.full(16, 1 / 16), np.zeros(16)]).astype("f4")
    params = {"1.weight": first, "1.bias": np.zeros(2, "f4"), "3.weight": np.array([[8, 0]], "f4"), "3.bias": np.array([-4], "f4")}
    version = Versions(folder).add(params, threshold=0.5)
    (folder / CURRENT).write_text(version.digest)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "day-1"
    (folder / "sub").mkdir(parents=True)
    for name, brightness in (("a.png", 0), ("sub/b.png", 255), ("c.png", 51), ("known.png", 7)):
        Image.fromarray(np.full((4, 4), brightness, np.uint8)).save(folder / name)
    (folder / "labels.csv").write_text("file,label,device\na.png,,phone\nknown.png,0,phone\n")
    return folder


def test_a_folder_is_scored_by_the_current_version(project: Path, images: Path) -> None:
    pool = read_pool(images, project)
    assert list(pool.names) == ["a.png", "c.png", "sub/b.png"]  # not the one whose label is known
    np.testing.assert_allclose(pool.scores, 1 / (1 + np.exp(4 - 8 * np.array([0, 0.2, 1]))), rtol=1e-6)
    assert pool.embeddings is not None
    np.testing.assert_allclose(pool.embeddings, [[0, 0], [0.2, 0], [1, 0]], rtol=1e-6)
    assert (pool.of(0), pool.images) == ({"device": "phone"}, [images / name for name in pool.names])


def test_unreadable_images_are_told(project: Path, images: Path) -> None:
    (images / "broken.png").write_bytes(b"no image")
    problems: list[object] = []
    assert len(read_pool(images, project, problems).names) == 3  # type: ignore[arg-type]
    assert len(problems) == 1
    with pytest.raises(ConfigError, match=r"broken\.png"):
        read_pool(images, project)


def test_a_project_without_a_version_cannot_score(project: Path, images: Path) -> None:
    (project / CURRENT).unlink()
    with pytest.raises(ConfigError, match="no current version"):
        read_pool(images, project)


def test_an_npz_file_has_all(tmp_path: Path) -> None:
    path = tmp_path / "day-1.npz"
    parts = {
        "scores": np.array([0.5, 0.25], "f4"),
        "images": np.zeros((2, 4, 4), np.uint8),
        "device": np.array(["x", "y"]),
        "year": np.arange(2),
    }
    np.savez(path, **parts)  # type: ignore[arg-type]
    pool = read_pool(path, tmp_path)
    assert (list(pool.names), pool.scores.tolist(), pool.of(1)) == (["day-1/000000", "day-1/000001"], [0.5, 0.25], {"device": "y"})
    assert isinstance(pool.images, np.ndarray)
    assert (pool.images.shape, pool.embeddings) == ((2, 4, 4, 1), None)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"names": np.array(["a"])}, "no array `scores`"),
        ({"scores": np.zeros(1), "images": np.zeros((1, 4, 4))}, "must be uint8"),
        ({"scores": np.zeros(1), "names": np.array([None])}, "cannot be read"),  # an array of objects: pickled
    ],
)
def test_a_wrong_npz_file_is_told_so(tmp_path: Path, parts: dict[str, np.ndarray], says: str) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, **parts)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=says):
        read_pool(path, tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pool(path, tmp_path)
