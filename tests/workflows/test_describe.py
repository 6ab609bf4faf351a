from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hanse.analytics import table_app
from hanse.app import App, Site
from hanse.errors import ConfigError, TooFewUpdates
from hanse.messages.flmodel import FLModel
from hanse.statistics.disclosure import Disclosure
from hanse.workflows.describe import describe

OPEN = Disclosure(min_count=1, max_bins_share=1.0, extremes=True)


def rows(rank: int) -> dict[str, np.ndarray]:
    """100, 200 … rows; the third site has no heights."""
    rng = np.random.default_rng(rank)
    table = {"age": rng.integers(18, 90, 100 * (rank + 1)).astype(float)}
    table["age"][:rank] = np.nan
    return table | ({} if rank == 2 else {"height": rng.normal(170, 10, 100 * (rank + 1))})


def load(site: Site) -> dict[str, np.ndarray]:
    return rows(site.rank)


async def described(federate: Any, code: App, *, sites: Any = 4, **settings: Any) -> tuple[dict[str, Any], Any]:
    async with federate(code, sites=sites) as federation:
        model = await describe(federation.cohort, FLModel({"w": np.ones(1)}), **settings)
        assert model.params["w"].tolist() == [1.0]
        [event] = federation.noted("statistics")
        return event["columns"], federation


async def test_it_is_what_numpy_says_of_the_pooled_rows(federate: Any) -> None:
    columns, _ = await described(federate, table_app(load, disclosure=OPEN), bins=16, quantiles=(0.1, 0.5))
    for column, missing in (("age", 0 + 1 + 2 + 3), ("height", 0)):
        tables = [rows(rank) for rank in range(4)]
        pooled = np.concatenate([table[column] for table in tables if column in table])
        pooled = pooled[~np.isnan(pooled)]
        whole = columns[column]["groups"][""]
        assert (whole["count"], whole["missing"], whole["sites"]) == (pooled.size, missing, 4 if column == "age" else 3)
        assert (whole["min"], whole["max"]) == (pooled.min(), pooled.max())
        assert_allclose([whole["sum"], whole["mean"], whole["variance"]], [pooled.sum(), pooled.mean(), pooled.var(ddof=1)], rtol=1e-13)
        edges = np.array(columns[column]["edges"])
        assert edges[0] <= pooled.min() <= pooled.max() <= edges[-1]
        assert_array_equal(whole["histogram"]["counts"], np.histogram(pooled, edges)[0])
        assert (whole["histogram"]["below"], whole["histogram"]["above"], whole["histogram"]["hidden"]) == (0, 0, 0)
        for found, q in zip(whole["quantiles"], (0.1, 0.5), strict=True):
            true = np.quantile(pooled, q, method="inverted_cdf")
            assert found["low"] <= true <= found["high"]
            assert found["high"] - found["low"] == pytest.approx(edges[1] - edges[0])
            assert abs(found["value"] - true) <= edges[1] - edges[0]


async def test_groups_of_sites_at_every_level(federate: Any) -> None:
    groups = {"site-1": "eu/de", "site-2": "eu/de", "site-3": "eu/fr", "site-4": "us"}
    columns, _ = await described(federate, table_app(load, disclosure=OPEN), groups=groups, bins=None)
    counts = {group: summary["count"] for group, summary in columns["age"]["groups"].items()}
    assert counts == {"": 994, "eu": 597, "eu/de": 299, "eu/fr": 298, "us": 397 - 0}
    assert {site: summary["count"] for site, summary in columns["age"]["sites"].items()} == {
        "site-1": 100,
        "site-2": 199,
        "site-3": 298,
        "site-4": 397,
    }
    eu = np.concatenate([rows(rank)["age"] for rank in range(3)])
    assert columns["age"]["groups"]["eu"]["variance"] == pytest.approx(np.nanvar(eu, ddof=1), rel=1e-13)
    assert columns["height"]["groups"]["eu/fr"] == {
        "sites": 0, "count": 0, "missing": 0, "sum": 0.0, "mean": None, "variance": None, "min": None, "max": None,
    }  # fmt: skip
    assert columns["age"]["edges"] is None


async def test_what_a_site_may_not_tell_is_in_no_event(federate: Any) -> None:
    """site-1 has 100 rows: enough for moments, too few for 19 bins. The column that only 9 rows of it have is not told at all."""

    def few(site: Site) -> dict[str, np.ndarray]:
        rare = np.full(100 * (site.rank + 2), np.nan)
        rare[: 9 if site.rank == 0 else 15] = 7.0
        return {"age": rows(site.rank)["age"], "rare": rare}

    columns, federation = await described(federate, table_app(few, disclosure=Disclosure()), sites=2, bins=19)
    assert columns["rare"]["withheld"] == ["site-1", "site-2"]  # the second has 15 values: too few for 19 bins
    assert list(columns["rare"]["sites"]) == ["site-2"]
    assert columns["rare"]["groups"][""]["count"] == 15
    assert "histogram" not in columns["rare"]["groups"][""]
    assert columns["age"]["withheld"] == ["site-1"]
    assert columns["age"]["groups"][""]["histogram"]["sites"] == 1
    assert columns["age"]["groups"][""]["min"] is None
    cells = columns["age"]["groups"][""]["histogram"]
    assert all(count == 0 or count >= 10 for count in cells["counts"])
    assert sum(cells["counts"]) + cells["hidden"] == 199
    assert cells["hidden"] == 0 or cells["hidden"] >= 10
    assert federation.noted("failure") == []


async def test_given_ranges_are_kept_and_no_site_is_asked_for_them(federate: Any) -> None:
    columns, _ = await described(federate, table_app(load, disclosure=OPEN), columns=["age"], ranges={"age": [30, 60]}, bins=3)
    assert list(columns) == ["age"]
    assert columns["age"]["edges"] == [30, 40, 50, 60]
    pooled = np.concatenate([rows(rank)["age"] for rank in range(4)])
    histogram = columns["age"]["groups"][""]["histogram"]
    assert (histogram["below"], histogram["above"]) == ((pooled < 30).sum(), (pooled > 60).sum())


async def test_a_site_that_sends_nonsense_is_left_out(federate: Any) -> None:
    def wrong(model: FLModel, site: Site) -> FLModel:
        return app.run("describe", model, site) if site.rank else FLModel({"age": {"moments": np.array([np.nan, 0, 0, 0])}})

    def wrong_counts(model: FLModel, site: Site) -> FLModel:
        told = app.run("histogram", model, site)
        return told if site.rank < 3 else FLModel({"age": {"histogram": np.array([-1, 2])}})

    app, broken = table_app(load, disclosure=OPEN), App()
    broken.task("describe")(wrong)
    broken.task("histogram")(wrong_counts)
    columns, federation = await described(federate, broken)
    assert list(columns["age"]["sites"]) == ["site-2", "site-3", "site-4"]
    assert columns["age"]["groups"][""]["histogram"]["sites"] == 2
    texts = [event["text"] for event in federation.noted("message")]
    assert [text.partition(":")[0] for text in texts] == ["site 'site-1' sent no statistics", "site 'site-4' sent no statistics"]


async def test_a_site_that_fails(federate: Any) -> None:
    def broken(site: Site) -> dict[str, np.ndarray]:
        if site.rank == 1:
            raise ValueError("no table")
        return rows(site.rank)

    with pytest.raises(TooFewUpdates, match="no table"):
        await described(federate, table_app(broken))
    columns, _ = await described(federate, table_app(broken), min_updates=3)
    assert columns["age"]["groups"][""]["sites"] == 3
    with pytest.raises(ConfigError, match="groups names site 'berlin', which is not in the job"):
        await described(federate, table_app(load), groups={"berlin": "eu"})
