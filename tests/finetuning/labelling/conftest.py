"""A small pool, what its images truly are, and a project's labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.finetuning.labelling.pools import make_pool

from hanse.finetuning.labelling.labels import Labels
from hanse.finetuning.labelling.queue import Pool


@pytest.fixture
def pool() -> Pool:
    return make_pool()[0]


@pytest.fixture
def truth() -> dict[str, int]:
    return make_pool()[1]


@pytest.fixture
def labels(tmp_path: Path) -> Iterator[Labels]:
    with Labels(tmp_path, by="ada") as labels:
        yield labels
