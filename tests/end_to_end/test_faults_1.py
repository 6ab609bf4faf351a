"""Seeded schedules of faults; the others are in test_faults_2.py, so that two workers share them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.end_to_end.faults import Ground, seeds, survive


@pytest.mark.parametrize("seed", seeds(0, 17))
async def test_the_result_has_the_same_bits(seed: int, ground: Ground, tmp_path: Path) -> None:
    await survive(seed, ground, tmp_path)
