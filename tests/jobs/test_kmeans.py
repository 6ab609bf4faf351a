from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hanse.analytics import table_app
from hanse.app import App
from hanse.errors import ConfigError
from hanse.jobs.kmeans import KMeansRecipe


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"app": App()}, "needs an app with a function for 'assign'"),
        ({"clusters": 0}, "clusters=0"),
        ({"columns": ()}, r"columns=\(\): give a list"),
        ({"rounds": 0}, "rounds=0"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"within_s": -1}, "within_s=-1"),
        ({"min_updates": 0}, "min_updates=0"),
        ({"model": {"w": np.ones(2)}}, "has a model without 3 centroids"),
        ({"model": {"centroids": np.ones((2, 1))}}, "has a model without 3 centroids"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_wrong_arguments(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        KMeansRecipe(**{"name": "a", "app": table_app(lambda site: {}), "clusters": 3, "columns": ["x"]} | wrong)


def test_with_a_first_model_no_site_has_to_propose() -> None:
    app = App()
    app.task("assign")(lambda model, site: model)
    assert KMeansRecipe(name="a", app=app, clusters=1, columns=["x"], model={"centroids": np.ones((1, 1))}).total_rounds() == 50
    with pytest.raises(ConfigError, match="propose_centroids"):
        KMeansRecipe(name="a", app=app, clusters=1, columns=["x"])
