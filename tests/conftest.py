"""What every test may ask for: the folder of real data sets, which a bare checkout does not have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("HANSE_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets: HANSE_DATA, or shared/data beside the checkout."""
    if not DATA.is_dir():
        pytest.skip(f"no data sets at {DATA}; set HANSE_DATA")
    return DATA


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not DATA.is_dir():
        terminalreporter.write_line(f"no data sets at {DATA}: tests that need them were skipped; set HANSE_DATA to run them", yellow=True)
