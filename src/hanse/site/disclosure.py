"""What the clause `statistics` of a site's policy does: the agent's own look at statistics before they leave, and its own noise.

The raw numbers are in the training process, which runs the job's code. It is told the rules, and `hanse.table_app` keeps them there, where
everything is known. The agent trusts none of that: it reads an answer strictly, refuses one that says something of too few, and adds noise
that neither the job nor the server knows.

k = clusters, d = columns, p = weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hanse.errors import PolicyRefused
from hanse.messages.flmodel import FLModel
from hanse.messages.task import ASSIGN, DERIVATIVES, DESCRIBE, HISTOGRAM, PROPOSE_CENTROIDS, Task
from hanse.messages.update import Update
from hanse.statistics.disclosure import SITE_RULES, Disclosure
from hanse.statistics.moments import Moments

Array = np.ndarray[Any, np.dtype[Any]]
Rng = np.random.Generator

_TASKS = {"statistics": (DESCRIBE, HISTOGRAM), "kmeans": (PROPOSE_CENTROIDS, ASSIGN), "logistic-newton": (DERIVATIVES,)}
"""The recipes whose tasks are looked at, and these tasks."""
_EXACT = {"kmeans": "k-means", "logistic-newton": "Newton's method"}
"""Recipes that need exact sums."""


def told(rules: Disclosure) -> dict[str, Any]:
    """What the training code is told in its config. Noise is not for it to add."""
    return {SITE_RULES: {"min_count": rules.min_count, "max_bins_share": rules.max_bins_share, "extremes": rules.extremes}}


def check_recipe(rules: Disclosure, recipe: str) -> None:
    """Raises PolicyRefused for a recipe that cannot work by these rules."""
    if rules.count_noise and recipe in _EXACT:
        raise PolicyRefused(
            f"{_EXACT[recipe]} needs exact sums over rows, and this site lets out counts with noise only",
            clause="statistics.count_noise",
            hint="Ask the site to take the noise out, or use StatisticsRecipe, which can do with it.",
        )


def check_task(rules: Disclosure, recipe: str, task: Task) -> None:
    """Raises PolicyRefused for a task that would get around the rules, before its code runs. recipe: what the signed job says it is."""
    if recipe in _TASKS and task.name not in _TASKS[recipe]:
        raise PolicyRefused(f"a {recipe!r} job has no task {task.name!r:.100}", clause="statistics")
    if SITE_RULES in task.config:
        raise PolicyRefused(f"the task's config has {SITE_RULES!r}, which is for this site to say", clause="statistics")
    for kind, names in _TASKS.items():
        if task.name in names:
            check_recipe(rules, kind)


def disclosed(rules: Disclosure, task: Task, update: Update, *, rng: Callable[[], Rng] = np.random.default_rng) -> Update:
    """The update as it may leave: with noise on its counts and ranges. Those of other tasks pass as they are.

    rng: makes the generator; from the operating system's randomness unless a test says otherwise.
    Raises PolicyRefused for an answer that says something of fewer than `min_count`, has extremes without leave, or is of any other form
    than `hanse.table_app` gives it: what the agent cannot read does not leave.
    """
    if task.name not in _READERS:
        return update
    if update.failure is not None:
        return replace(update, model=FLModel(), records=tuple(record for record in update.records if record.kind != "scalar"))
    model, brought, (read, metrics) = update.model, task.model.meta, _READERS[task.name]
    own_meta = any(name not in brought or brought[name] != value for name, value in model.meta.items())
    if model.metrics.keys() != metrics or own_meta or any(record.kind == "scalar" for record in update.records):
        raise _unknown(task.name)
    try:
        params = read(rules, model, rng())
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:  # its words may quote what must not leave
        raise _unknown(task.name) from error
    return replace(update, model=replace(model, params=params))


def _describe(rules: Disclosure, model: FLModel, rng: Rng) -> dict[str, Any]:
    def column(name: str, said: Mapping[str, Any]) -> dict[str, Array]:
        _only(said, "moments", "extremes", "range")
        if "extremes" in said and not rules.extremes:
            raise PolicyRefused(f"the extremes of {name!r:.200} may not leave this site", clause="statistics.extremes")
        count, missing, total, m2 = _floats(said["moments"], (4,)).tolist()
        _enough(rules, [count], f"column {name!r:.200}")
        _enough(rules, [missing] if missing else [], f"the missing values of column {name!r:.200}")
        noisy = rules.noisy(Moments(int(count), int(missing), total, m2), rng)
        missing = noisy.missing if noisy.missing >= rules.min_count else 0
        shown = {"moments": np.array([noisy.count, missing, noisy.total, noisy.m2])}
        for ends in ("extremes", "range"):
            if ends in said:
                low, high = _floats(said[ends], (2,)).tolist()
                shown[ends] = np.array(rules.widened(low, high, rng))
        return shown

    return _by_column(model, column)


def _histogram(rules: Disclosure, model: FLModel, rng: Rng) -> dict[str, Any]:
    def column(name: str, said: Mapping[str, Any]) -> dict[str, Array]:
        _only(said, "histogram")
        cells = _floats(said["histogram"], (None,))
        _enough(rules, cells[cells != 0], f"a cell of the histogram of {name!r:.200}")
        return {"histogram": rules.shown(cells.astype(np.int64), rng)}

    return _by_column(model, column)


def _propose(rules: Disclosure, model: FLModel, rng: Rng) -> dict[str, Any]:
    centroids, counts = _clusters(model)
    _enough(rules, counts, "a cluster")
    return {"centroids": centroids, "counts": counts}


def _assign(rules: Disclosure, model: FLModel, rng: Rng) -> dict[str, Any]:
    (centroids, counts), rows = _clusters(model), model.metrics["rows"]
    _enough(rules, [rows], "the table")
    _enough(rules, counts[counts != 0], "a cluster")
    if hidden := rows - counts.sum():
        _enough(rules, [hidden], "the clusters that are not told")
    if centroids[counts == 0].any():
        raise ValueError("the sum of a cluster that is not told")
    return {"centroids": centroids, "counts": counts}


def _derivatives(rules: Disclosure, model: FLModel, rng: Rng) -> dict[str, Any]:
    _only(model.params, "gradient", "hessian")
    _enough(rules, [model.metrics["rows"]], "the table")
    gradient = _floats(model.params["gradient"], (None,))
    return {"gradient": gradient, "hessian": _floats(model.params["hessian"], (len(gradient), len(gradient)))}


_READERS: Mapping[str, tuple[Callable[[Disclosure, FLModel, Rng], dict[str, Any]], set[str]]] = {
    DESCRIBE: (_describe, set()),
    HISTOGRAM: (_histogram, set()),
    PROPOSE_CENTROIDS: (_propose, set()),
    ASSIGN: (_assign, {"inertia", "rows"}),
    DERIVATIVES: (_derivatives, {"loss", "rows"}),
}
"""What reads the params of each task's answer, and which metrics come with them."""


def _by_column(model: FLModel, read: Callable[[str, Mapping[str, Any]], dict[str, Array]]) -> dict[str, Any]:
    """What `read` makes of each column; one that is withheld stays so."""
    said = {} if model.params is None else model.params
    return {name: {"withheld": np.array(True)} if _is_withheld(column) else read(name, column) for name, column in said.items()}


def _is_withheld(said: Mapping[str, Any]) -> bool:
    """Whether that is all that is said of a column. Raises ValueError if the flag holds more than one bit."""
    if said.keys() != {"withheld"}:
        return False
    if np.shape(said["withheld"]) != ():
        raise ValueError("more than one flag")
    return True


def _clusters(model: FLModel) -> tuple[Array, Array]:
    """Centroids or sums, shape (k, d), and the clusters' counts, shape (k,)."""
    _only(model.params, "centroids", "counts")
    counts = _floats(model.params["counts"], (None,))
    return _floats(model.params["centroids"], (len(counts), None)), counts


def _only(said: Mapping[str, Any], *names: str) -> None:
    if unknown := said.keys() - set(names):
        raise KeyError(min(unknown))


def _floats(value: Any, shape: tuple[int | None, ...]) -> Array:
    """float64, of that shape; None: any length. Raises ValueError for anything else, and for what is not finite."""
    array = np.asarray(value)
    fits = array.ndim == len(shape) and all(size in (None, there) for size, there in zip(shape, array.shape, strict=True))
    if array.dtype.kind not in "iuf" or not fits or not np.isfinite(array).all():
        raise ValueError("other numbers than were asked for")
    return array.astype(np.float64)


def _enough(rules: Disclosure, counts: Any, what: str) -> None:
    """Raises PolicyRefused if one of the counts is below `min_count`, ValueError if one is none."""
    numbers = np.asarray(counts, np.float64)
    if (numbers != np.rint(numbers)).any():
        raise ValueError("counts are whole numbers")
    if (numbers < rules.min_count).any():
        raise PolicyRefused(
            f"{what} holds fewer than {rules.min_count}, of which this site says nothing",
            clause="statistics.min_count",
            hint="Make the app with hanse.table_app, which hides them.",
        )


def _unknown(task: str) -> PolicyRefused:
    return PolicyRefused(
        f"the answer to task {task!r} is of another form than this site can look through",
        clause="statistics",
        hint="Make the app with hanse.table_app, and leave out filters of the job.",
    )
