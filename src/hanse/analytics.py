"""A site's side of analytics without training: an `App` over a table, for statistics, k-means and logistic regression.

n = rows, d = columns, b = bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Any

import numpy as np

from hanse.app import App, Site
from hanse.errors import ConfigError, PolicyRefused
from hanse.messages.flmodel import FLModel
from hanse.messages.task import ASSIGN, DERIVATIVES, DESCRIBE, HISTOGRAM, PROPOSE_CENTROIDS
from hanse.statistics.clusters import assigned, clustered
from hanse.statistics.disclosure import SITE_RULES, Disclosure, hide_small
from hanse.statistics.histogram import bin_edges, cell_counts, coarse_range
from hanse.statistics.logistic import derivatives
from hanse.statistics.moments import Moments

Array = np.ndarray[Any, np.dtype[Any]]

WITHHELD = {"withheld": np.array(True)}
"""What is said of a column of which nothing may be said: as an array, for that is what a site's policy lets out and its audit log names."""


def table_app(load: Callable[[Site], Any], *, disclosure: Disclosure | None = None) -> App:
    """An app that answers `StatisticsRecipe`, `KMeansRecipe` and `LogisticNewtonRecipe` with sums over a site's table.

    load: gives the site's table: NumPy arrays of shape (n,) by name, or a pandas DataFrame. Numbers or booleans; NaN where a value is
        missing. For k-means and regression an array may have shape (n, m), and stands for m columns. It is called once a task, so keep the
        table if reading is slow. It has to be defined in a file, at module level.
    disclosure: what is taken out before anything leaves the site; default: `Disclosure()`. Where the site's policy has rules of its own,
        the stricter of both applies.
    """
    rules = disclosure or Disclosure()
    app = App()

    @app.task(DESCRIBE)
    def describe(model: FLModel, site: Site) -> FLModel:
        return _describe(load(site), site, _stricter(rules, site))

    @app.task(HISTOGRAM)
    def histogram(model: FLModel, site: Site) -> FLModel:
        return _histogram(load(site), site, _stricter(rules, site))

    @app.task(PROPOSE_CENTROIDS)
    def propose(model: FLModel, site: Site) -> FLModel:
        return _propose(load(site), site, _stricter(rules, site))

    @app.task(ASSIGN)
    def assign(model: FLModel, site: Site) -> FLModel:
        return _assign(load(site), model, site, _stricter(rules, site))

    @app.task(DERIVATIVES)
    def derive(model: FLModel, site: Site) -> FLModel:
        return _derive(load(site), site, _stricter(rules, site))

    for handler in (describe, histogram, propose, assign, derive):
        update_wrapper(handler, load)  # so that the file that defines `load` goes into the job
    return app


def _describe(table: Any, site: Site, rules: Disclosure) -> FLModel:
    """The moments of each column, and a range that holds it; or that it is withheld."""
    asked = site.config["describe"]
    params: dict[str, dict[str, Array]] = {}
    for name in _columns(table, asked["columns"]):
        values = _numbers(table[name], name, dimensions=1)
        moments = Moments.of(values)
        if moments.count < rules.min_count:
            params[name] = dict(WITHHELD)
            continue
        told = rules.noisy(moments, site.rng)
        missing = told.missing if told.missing >= rules.min_count else 0
        params[name] = {"moments": np.array([told.count, missing, told.total, told.m2])}
        if rules.extremes:
            finite = values[np.isfinite(values)]
            params[name]["extremes"] = np.array(rules.widened(float(finite.min()), float(finite.max()), site.rng))
        if asked["range"] and name not in asked["known"]:
            params[name]["range"] = np.array(rules.widened(*coarse_range(values), site.rng))
    return FLModel(params)


def _histogram(table: Any, site: Site, rules: Disclosure) -> FLModel:
    """How many values lie in each cell between the edges that the task brings; or that it is withheld."""
    params: dict[str, dict[str, Array]] = {}
    for name, (low, high, bins) in site.config["histogram"]["edges"].items():
        if name in table:
            values = _numbers(table[name], name, dimensions=1)
            count = Moments.of(values).count
            if count < rules.min_count or bins > rules.max_bins_share * count:
                params[name] = dict(WITHHELD)
            else:
                params[name] = {"histogram": rules.shown(cell_counts(values, bin_edges(low, high, bins)), site.rng)}
    return FLModel(params)


def _propose(table: Any, site: Site, rules: Disclosure) -> FLModel:
    """The means of the site's own clusters, and how many rows each has; small ones are left out."""
    asked = site.config["kmeans"]
    rows = _matrix(table, site, rules, asked["columns"])[0]
    clusters = min(asked["clusters"], len(np.unique(rows, axis=0)))
    centroids, counts = clustered(rows, clusters, rng=site.rng)
    large = counts >= rules.min_count
    return FLModel({"centroids": centroids[large], "counts": counts[large]})


def _assign(table: Any, model: FLModel, site: Site, rules: Disclosure) -> FLModel:
    """Under `centroids` the sum of each cluster's rows, under `counts` how many there are; both 0 for a small one."""
    rows = _matrix(table, site, rules, site.config["kmeans"]["columns"])[0]
    part = assigned(rows, np.asarray(model.params["centroids"], np.float64))
    counts = hide_small(part.counts_k.astype(np.int64), rules.min_count)
    sums = np.where((counts > 0)[:, None], part.sums_kd, 0.0)
    return FLModel({"centroids": sums, "counts": counts.astype(np.float64)}, metrics={"inertia": part.inertia, "rows": len(rows)})


def _derive(table: Any, site: Site, rules: Disclosure) -> FLModel:
    """Gradient and Hessian of the log loss at the weights that the task brings, summed over rows."""
    asked = site.config["newton"]
    rows, labels = _matrix(table, site, rules, asked["features"], asked["target"])
    if not np.isin(labels, (0, 1)).all():
        raise ConfigError(
            f"site {site.name!r}: column {asked['target']!r} holds other values than 0 and 1: it must be the label of two classes"
        )
    if rows.shape[1] + 1 != len(asked["weights"]) and asked["weights"]:
        raise ConfigError(
            f"site {site.name!r}: its features are {rows.shape[1]} numbers a row, and the model has {len(asked['weights']) - 1}"
        )
    weights = np.array(asked["weights"] or [0.0] * (rows.shape[1] + 1))
    loss, gradient, hessian = derivatives(rows, labels, weights)
    return FLModel({"gradient": gradient, "hessian": hessian}, metrics={"loss": loss, "rows": len(rows)})


def _columns(table: Any, wanted: Sequence[str] | None) -> list[str]:
    """The columns to describe: those wanted that the site has, or all of numbers. Raises ConfigError if it has none of those wanted."""
    if wanted is None:
        return [str(name) for name in table if _dtype(table[name]).kind in "iufb"]
    found = [name for name in wanted if name in table]
    if not found:
        raise ConfigError(f"the table has none of the columns {', '.join(wanted)}; it has {', '.join(map(str, table)) or 'none'}")
    return found


def _stricter(rules: Disclosure, site: Site) -> Disclosure:
    """The job's rules, or where the site's policy is stricter, the site's. The agent adds the noise that its policy asks for by itself."""
    told = site.config.get(SITE_RULES)
    return rules if told is None else rules.stricter(Disclosure(**told))


def _matrix(table: Any, site: Site, rules: Disclosure, columns: Sequence[str], target: str = "") -> tuple[Array, Array]:
    """The rows without a missing value, float64, shape (n, d), and the target's values in them.

    Raises ConfigError for a column that cannot be taken, and for too few rows; PolicyRefused for too few where the site's policy has rules.
    """
    names = [*columns, *([target] if target else [])]
    if lacking := [name for name in names if name not in table]:
        raise ConfigError(f"the table has no column {lacking[0]!r}; it has {', '.join(map(str, table)) or 'none'}")
    parts = [_numbers(table[name], name, dimensions=2 if name != target else 1) for name in names]
    if len({len(part) for part in parts}) != 1:
        raise ConfigError(
            f"the table's columns differ in length: {', '.join(f'{name} {len(part)}' for name, part in zip(names, parts, strict=True))}"
        )
    whole = np.column_stack(parts)
    whole = whole[np.isfinite(whole).all(axis=1)]
    if len(whole) < rules.min_count:
        few = f"there are fewer than {rules.min_count} rows without a missing value, of which nothing may be said"
        raise PolicyRefused(few, clause="statistics.min_count") if SITE_RULES in site.config else ConfigError(f"{few} [min_count]")
    return (whole[:, :-1], whole[:, -1]) if target else (whole, whole[:, :0])


def _numbers(column: Any, name: str, *, dimensions: int) -> Array:
    if _dtype(column).kind not in "iufb":
        raise ConfigError(f"column {name!r} holds {_dtype(column)}: statistics need numbers or booleans")
    if hasattr(column, "to_numpy"):  # a pandas column, which may have a missing value that no NumPy array has
        column = column.to_numpy(dtype=np.float64, na_value=np.nan)
    array = np.asarray(column, np.float64)
    if not 1 <= array.ndim <= dimensions:
        raise ConfigError(f"column {name!r} has shape {array.shape}: it must have one value a row")
    return array


def _dtype(column: Any) -> Any:
    return column.dtype if hasattr(column, "dtype") else np.asarray(column).dtype
