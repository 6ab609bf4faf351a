from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hanse.analytics import table_app
from hanse.app import App
from hanse.errors import ConfigError
from hanse.jobs.newton import LogisticNewtonRecipe


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"app": App()}, "needs an app with a function for 'derivatives'"),
        ({"features": []}, r"features=\[\]: give a list"),
        ({"target": ""}, r"target=\[''\]: give a list"),
        ({"target": "x"}, "has target 'x' among its features"),
        ({"ridge": -1}, "ridge=-1"),
        ({"rounds": None}, "rounds=None"),
        ({"tolerance": -1}, "tolerance=-1"),
        ({"within_s": 0}, "within_s=0"),
        ({"model": {"coef_": np.ones((1, 1))}}, "has a model without coef_ and intercept_"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_wrong_arguments(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LogisticNewtonRecipe(**{"name": "a", "app": table_app(lambda site: {}), "features": ["x"], "target": "y"} | wrong)
