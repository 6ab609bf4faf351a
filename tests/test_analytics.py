"""A site's answers, one by one: above all what is not in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hanse.analytics import table_app
from hanse.app import App, Site
from hanse.errors import ConfigError, PolicyRefused
from hanse.messages.flmodel import FLModel
from hanse.statistics.disclosure import SITE_RULES, Disclosure


def at_site(table: Any, task: str, config: dict[str, Any], model: FLModel | None = None, **rules: Any) -> FLModel:
    app = table_app(lambda site: table, disclosure=Disclosure(**rules) if rules else None)
    return app.run(task, model or FLModel(), Site("north", 0, 1, "job", config, {}, 0, ("site", "north")))


def describe(table: Any, columns: list[str] | None = None, known: tuple[str, ...] = (), **rules: Any) -> FLModel:
    return at_site(table, "describe", {"describe": {"columns": columns, "range": True, "known": list(known)}}, **rules)


def test_moments_and_a_range_and_no_single_value() -> None:
    ages = np.arange(18.0, 109.0)  # 91 of them
    told = describe({"age": ages})
    assert set(told.params["age"]) == {"moments", "range"}
    assert_allclose(told.params["age"]["moments"], [91, 0, ages.sum(), ages.var() * 91])
    assert_array_equal(told.params["age"]["range"], [16, 112])
    assert describe({"age": ages}, known=("age",)).params["age"].keys() == {"moments"}
    assert_array_equal(describe({"age": ages}, min_count=1, extremes=True).params["age"]["extremes"], [18, 108])


def test_of_few_values_nothing_is_said() -> None:
    table = {"rare": np.array([1.0] * 9 + [np.nan] * 91), "full": np.arange(100.0)}
    told = describe(table)
    assert told.params["rare"] == {"withheld": True}
    assert set(told.params["full"]) == {"moments", "range"}
    assert set(describe(table, min_count=9).params["rare"]) == {"moments", "range"}


def test_of_few_missing_values_nothing_is_said() -> None:
    for missing, said in ((9, 0), (10, 10)):
        told = describe({"x": np.array([np.nan] * missing + [1.0] * 50)})
        assert told.params["x"]["moments"].tolist()[:2] == [50, said]


def test_all_columns_of_numbers_or_those_named() -> None:
    table = {"n": np.arange(20), "flag": np.arange(20) % 2 == 0, "name": np.array(["x"] * 20), "list": [1.5] * 20}
    assert list(describe(table).params) == ["n", "flag", "list"]
    assert list(describe(table, ["flag", "absent"]).params) == ["flag"]
    with pytest.raises(ConfigError, match="the table has none of the columns absent; it has n, flag, name, list"):
        describe(table, ["absent"])
    with pytest.raises(ConfigError, match="column 'name' holds <U1: statistics need numbers"):
        describe(table, ["name"])
    with pytest.raises(ConfigError, match=r"column 'x' has shape \(20, 2\): it must have one value a row"):
        describe({"x": np.zeros((20, 2))})


def test_a_pandas_table_says_the_same() -> None:
    pandas = pytest.importorskip("pandas")
    columns = {"n": np.arange(30), "x": np.where(np.arange(30) < 12, np.nan, 2.0)}
    frame = pandas.DataFrame({**columns, "name": ["a"] * 30})
    frame["n"] = frame["n"].astype("Int64")
    frame.loc[0, "n"] = pandas.NA
    told, plain = describe(frame), describe({**columns, "n": np.where(np.arange(30) == 0, np.nan, columns["n"])})
    assert told.params.keys() == plain.params.keys() == {"n", "x"}
    for name in told.params:
        assert_array_equal(told.params[name]["moments"], plain.params[name]["moments"])


def test_a_histogram_hides_small_cells() -> None:
    """30 at 0.5, 4 at 1.5, 20 at 2.5. The 4 are hidden, and the 20 with them, or the total would tell."""
    x = np.repeat([0.5, 1.5, 2.5], [30, 4, 20])
    config = {"histogram": {"edges": {"x": [0.0, 3.0, 3], "absent": [0.0, 1.0, 3]}}}
    assert at_site({"x": x}, "histogram", config).params["x"]["histogram"].tolist() == [0, 30, 0, 0, 0]
    assert at_site({"x": x}, "histogram", config, min_count=1).params["x"]["histogram"].tolist() == [0, 30, 4, 20, 0]


@pytest.mark.parametrize(("values", "bins"), [(9, 1), (100, 11)])
def test_a_histogram_too_fine_for_its_values_is_withheld(values: int, bins: int) -> None:
    told = at_site({"x": np.arange(values)}, "histogram", {"histogram": {"edges": {"x": [0.0, 100.0, bins]}}})
    assert told.params == {"x": {"withheld": True}}


def test_noise_is_the_sites_own_and_comes_again() -> None:
    table = {"x": np.arange(1000.0)}
    noisy = [describe(table, count_noise=5.0, range_noise=0.2).params["x"] for _ in range(2)]
    exact = describe(table).params["x"]
    assert noisy[0]["moments"].tolist() == noisy[1]["moments"].tolist() != exact["moments"].tolist()
    assert noisy[0]["range"][0] < exact["range"][0] < exact["range"][1] < noisy[0]["range"][1]


def test_a_small_cluster_sends_neither_sum_nor_count() -> None:
    x = np.concatenate([np.zeros(40), np.full(3, 100.0), np.full(30, 200.0), np.full(25, 300.0)])
    model = FLModel({"centroids": np.array([[0.0], [100], [200], [300]]), "counts": np.zeros(4)})
    told = at_site({"x": x}, "assign", {"kmeans": {"columns": ["x"]}}, model)
    assert told.params["counts"].tolist() == [40, 0, 30, 0]  # the 3, and the 25 that would tell them apart
    assert told.params["centroids"].tolist() == [[0], [0], [6000], [0]]
    proposed = at_site({"x": x}, "propose_centroids", {"kmeans": {"columns": ["x"], "clusters": 4}})
    assert sorted(proposed.params["centroids"].ravel().tolist()) == [0, 200, 300]
    assert proposed.params["counts"].min() >= 10


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"x": np.zeros(9), "y": np.zeros(9)}, r"fewer than 10 rows without a missing value, .* \[min_count\]"),
        ({"x": np.zeros(99), "y": np.array([np.nan] * 90 + [1.0] * 9)}, r"fewer than 10 rows without a missing value"),
        ({"x": np.zeros(20)}, "the table has no column 'y'; it has x"),
        ({"x": np.zeros(20), "y": np.zeros(21)}, "columns differ in length: x 20, y 21"),
        ({"x": np.zeros(20), "y": np.full(20, 2)}, "column 'y' holds other values than 0 and 1"),
        ({"x": np.zeros((20, 3)), "y": np.zeros(20)}, "its features are 3 numbers a row, and the model has 1"),
        ({"x": np.array(["a"] * 20), "y": np.zeros(20)}, "column 'x' holds <U1"),
    ],
    ids=["few", "missing", "absent", "lengths", "labels", "weights", "texts"],
)
def test_a_table_that_cannot_be_fitted(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        at_site(table, "derivatives", {"newton": {"features": ["x"], "target": "y", "weights": [0.0, 0.0]}})


def test_a_sites_rules_stand_beside_the_jobs() -> None:
    """30 at 0.5, 12 at 1.5, 20 at 2.5: 15 is the site's least, and the 12 go with the 20, as if the job had said so."""
    x = np.repeat([0.5, 1.5, 2.5], [30, 12, 20])
    config = {"histogram": {"edges": {"x": [0.0, 3.0, 3]}}}
    site = {SITE_RULES: {"min_count": 15, "max_bins_share": 0.1, "extremes": False}}
    assert at_site({"x": x}, "histogram", config, min_count=1).params["x"]["histogram"].tolist() == [0, 30, 12, 20, 0]
    assert at_site({"x": x}, "histogram", config | site, min_count=1).params["x"]["histogram"].tolist() == [0, 30, 0, 0, 0]
    assert at_site({"x": x}, "histogram", config | site, min_count=31).params["x"]["histogram"].tolist() == [0, 0, 0, 0, 0]
    fewer = {SITE_RULES: {"min_count": 1, "max_bins_share": 0.01, "extremes": True}}
    assert at_site({"x": x}, "histogram", config | fewer).params == {"x": {"withheld": True}}
    asked = {"describe": {"columns": None, "range": True, "known": []}}
    assert "extremes" in at_site({"x": x}, "describe", asked | fewer, extremes=True).params["x"]
    assert "extremes" not in at_site({"x": x}, "describe", asked | site, extremes=True).params["x"]
    with pytest.raises(PolicyRefused, match=r"fewer than 15 rows .* \[statistics.min_count\]"):
        at_site({"x": x[:14]}, "assign", {"kmeans": {"columns": ["x"]}} | site, FLModel({"centroids": np.zeros((1, 1))}))


def test_the_file_that_reads_the_table_goes_into_the_job(load: Callable[[str], Any]) -> None:
    module = load("from hanse.analytics import table_app\ndef rows(site):\n    return {}\napp = table_app(rows)\n")
    assert module.app.module["__file__"] == module.__file__
    assert set(module.app.tasks) == {"describe", "histogram", "propose_centroids", "assign", "derivatives"}


def test_so_does_that_of_a_wrapped_function(load: Callable[[str], Any]) -> None:
    """Decorators from elsewhere used to hide where a function is defined."""
    module = load("""
from contextlib import ContextDecorator
from hanse import App
app = App()

class quiet(ContextDecorator):
    def __enter__(self): ...
    def __exit__(self, *error): ...

@app.train
@quiet()
def train(model, site):
    return model
""")
    app: App = module.app
    assert app.module["__file__"] == module.__file__
