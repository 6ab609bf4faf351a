"""Files in a folder that a job's code can write; the sandbox itself is tested with the site, `tests/site/test_sandbox.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hanse.sandbox import files_beneath, open_beneath, remove_links


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two plain files, and what leads out of it or holds up who opens it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "key.pem").write_text("secret")
    folder = tmp_path / "folder"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "a.log").write_text("a")
    (folder / "run.json").write_text("{}")
    (folder / "link").symlink_to(tmp_path / "outside" / "key.pem")
    (folder / "logs" / "gone").symlink_to(tmp_path / "gone")
    (folder / "way").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe")
    return folder


def test_plain_files_are_opened(folder: Path) -> None:
    with open(open_beneath(folder, "logs/a.log")) as file:
        assert file.read() == "a"
    with open(open_beneath(folder, Path("logs", "new.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a") as file:
        file.write("b")
    assert (folder / "logs" / "new.log").read_text() == "b"


@pytest.mark.parametrize("name", ["link", "way/key.pem", "pipe", "logs", "gone", "logs/gone"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_APPEND])
def test_links_pipes_and_folders_are_not(folder: Path, name: str, flags: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"."):
        open_beneath(folder, name, flags)
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_is_made_behind_a_link(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"."):
        open_beneath(folder, "logs/gone", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match=r"."):
        open_beneath(folder, "way/new", os.O_WRONLY | os.O_CREAT)
    assert not (tmp_path / "gone").exists()
    assert os.listdir(tmp_path / "outside") == ["key.pem"]


def test_plain_files_alone_are_listed_and_left(folder: Path, tmp_path: Path) -> None:
    assert sorted(files_beneath(folder)) == ["logs/a.log", "run.json"]
    remove_links(folder)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == ["logs", "logs/a.log", "run.json"]
    assert (tmp_path / "outside" / "key.pem").read_text() == "secret"
