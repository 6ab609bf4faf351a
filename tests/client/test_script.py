from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hanse.client.script import Script
from hanse.errors import ConfigError


def test_a_script_is_kept_by_its_whole_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    assert Script(Path("train.py"), ("--epochs", "2")) == Script(tmp_path / "train.py", ("--epochs", "2"))


@pytest.mark.parametrize(("path", "argv", "says"), [("nowhere.py", (), "no script"), (__file__, (1,), "argv is")])
def test_a_wrong_script_is_an_error_at_once(path: str, argv: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Script(Path(path), argv)
