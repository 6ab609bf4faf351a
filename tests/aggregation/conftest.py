"""Updates that differ in one vector, and their combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Update


def update(site: str, params: Any, **fields: Any) -> Update:
    return Update(site, TaskId("job", 0, 0, site), FLModel(params, **fields))


@pytest.fixture(scope="session")
def combine() -> Callable[..., FLModel]:
    """`combine(aggregator, rows, reference=None, **fields)`: a row is a site's vector "w", or its params; fields go into each FLModel."""

    def combined(aggregator: Any, rows: Sequence[Any], *, reference: Any = None, **fields: Any) -> FLModel:
        fresh = aggregator.fresh(None if reference is None else FLModel(_params(reference)))
        for number, row in enumerate(rows):
            fresh.add(update(f"site-{number:03}", _params(row), **fields))
        return fresh.result()

    return combined


def _params(row: Any) -> Any:
    return row if isinstance(row, dict) else {"w": np.asarray(row, np.float32)}
