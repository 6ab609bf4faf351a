"""What the fault tests start from."""

from __future__ import annotations

import asyncio

import pytest
from tests.end_to_end.faults import CODE, SITES, Ground, load_app, recipe_of
from tests.end_to_end.federation import make_template
from tests.finetuning.run.conftest import base_weights

from hanse.environments import SimEnv

__all__ = ["base_weights", "ground"]


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """A federation to copy, the job of the fault tests, and how it ends undisturbed, simulated."""
    folder = tmp_path_factory.mktemp("faults")
    recipe = recipe_of(load_app(CODE, folder / "code"))
    recipe.export(folder / "job")
    undisturbed = recipe.execute(SimEnv(sites=SITES, workers=1, runs=folder / "runs", console="quiet"))
    return Ground(asyncio.run(make_template(folder / "template", SITES)), folder / "job", undisturbed)
