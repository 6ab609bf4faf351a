"""What the agent lets out of statistics, whatever the training process says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from hanse.analytics import table_app
from hanse.app import Site
from hanse.errors import Failure, PolicyRefused
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Update
from hanse.site.disclosure import check_recipe, check_task, disclosed, told
from hanse.statistics.disclosure import SITE_RULES, Disclosure, hide_small

RULES = Disclosure(min_count=10)
MOMENTS = {"moments": np.array([40.0, 0.0, 100.0, 7.0])}


def update(params: Any, **model: Any) -> Update:
    return Update("north", TaskId("job", 0, 0, "north"), FLModel(params, **model))


def leaves(task: str, params: Any, rules: Disclosure = RULES, **model: Any) -> Any:
    return disclosed(rules, Task(task, FLModel()), update(params, **model), rng=lambda: np.random.default_rng(0)).model.params


def clause(task: str, params: Any, rules: Disclosure = RULES, **model: Any) -> str:
    """By which the answer is refused."""
    with pytest.raises(PolicyRefused) as refused:
        leaves(task, params, rules, **model)
    return refused.value.clause


def test_an_answer_that_keeps_the_rules_leaves_as_it_is() -> None:
    said = {"x": {**MOMENTS, "range": np.array([0.0, 8.0])}, "y": {"withheld": np.array(True)}}
    out = leaves("describe", said)
    assert out.keys() == {"x", "y"}
    assert out["y"] == {"withheld": True}
    for name in said["x"]:
        assert_array_equal(out["x"][name], said["x"][name])
    cells = np.array([0, 12, 0, 40])
    assert_array_equal(leaves("histogram", {"x": {"histogram": cells}})["x"]["histogram"], cells)


@pytest.mark.parametrize(
    ("moments", "allowed"),
    [([9, 0, 1, 1], False), ([10, 0, 1, 1], True), ([40, 9, 1, 1], False), ([40, 10, 1, 1], True), ([0, 40, 0, 0], False)],
)
def test_too_few_values(moments: list[float], allowed: bool) -> None:
    said = {"x": {"moments": np.array(moments, float)}}
    if allowed:
        assert_array_equal(leaves("describe", said)["x"]["moments"], moments)
    else:
        assert clause("describe", said) == "statistics.min_count"


def test_too_few_in_a_cell_or_cluster_or_table() -> None:
    assert clause("histogram", {"x": {"histogram": np.array([0, 9, 40])}}) == "statistics.min_count"
    centroids = np.array([[1.0], [2.0]])
    assert clause("propose_centroids", {"centroids": centroids, "counts": np.array([12, 9])}) == "statistics.min_count"
    good: dict[str, Any] = {"metrics": {"inertia": 1.0, "rows": 50.0}}
    assert leaves("assign", {"centroids": centroids, "counts": np.array([20, 30])}, **good)["counts"].tolist() == [20, 30]
    assert clause("assign", {"centroids": centroids, "counts": np.array([3, 47])}, **good) == "statistics.min_count"
    hidden = {"centroids": np.array([[1.0], [0.0]]), "counts": np.array([45, 0])}
    assert clause("assign", hidden, **good) == "statistics.min_count"  # 5 rows are the other cluster's
    newton = {"gradient": np.zeros(2), "hessian": np.eye(2)}
    assert leaves("derivatives", newton, metrics={"loss": 1.0, "rows": 10.0}).keys() == {"gradient", "hessian"}
    assert clause("derivatives", newton, metrics={"loss": 1.0, "rows": 9.0}) == "statistics.min_count"


def test_extremes_leave_only_by_leave() -> None:
    said = {"x": {**MOMENTS, "extremes": np.array([0.0, 8.0])}}
    assert clause("describe", said) == "statistics.extremes"
    assert_array_equal(leaves("describe", said, Disclosure(extremes=True))["x"]["extremes"], [0, 8])


ROW = np.arange(5.0)


@pytest.mark.parametrize(
    ("task", "params", "more"),
    [
        ("describe", {"x": {**MOMENTS, "row": ROW}}, {}),
        ("describe", {"x": {"range": ROW[:2]}}, {}),
        ("describe", {"x": {"moments": ROW}}, {}),
        ("describe", {"x": {"moments": np.array([40.5, 0, 1, 1])}}, {}),
        ("describe", {"x": {"moments": np.array([40, np.nan, 1, 1])}}, {}),
        ("describe", {"x": {"moments": "Jane"}}, {}),
        ("describe", {"x": {"withheld": ROW}}, {}),
        ("describe", {"x": ROW}, {}),
        ("describe", [ROW], {}),
        ("describe", {"x": MOMENTS}, {"metrics": {"row": 1.0}}),
        ("describe", {"x": MOMENTS}, {"meta": {"examples": 3}}),
        ("histogram", {"x": {"histogram": np.ones((2, 2))}}, {}),
        ("histogram", {"x": {"histogram": [20, "Jane"]}}, {}),
        ("propose_centroids", None, {}),
        ("propose_centroids", {"centroids": np.ones((3, 1)), "counts": np.array([20, 20])}, {}),
        (
            "assign",
            {"centroids": np.ones((2, 1)), "counts": np.array([20, 0])},
            {"metrics": {"inertia": 1.0, "rows": 40.0}},
        ),
        ("derivatives", {"gradient": ROW, "hessian": np.eye(4)}, {"metrics": {"loss": 1.0, "rows": 40.0}}),
        ("derivatives", {"gradient": ROW, "hessian": np.eye(5)}, {"metrics": {"loss": 1.0}}),
    ],
)
def test_what_the_agent_cannot_read_does_not_leave(task: str, params: Any, more: dict[str, Any]) -> None:
    assert clause(task, params, **more) == "statistics"


def test_logged_numbers_do_not_leave_beside_statistics() -> None:
    logged = replace(update({"x": MOMENTS}), records=(Record("row", 1.0),))
    with pytest.raises(PolicyRefused, match=r"\[statistics\]"):
        disclosed(RULES, Task("describe", FLModel()), logged)
    failed = replace(logged, failure=Failure("ValueError", "no"))
    out = disclosed(RULES, Task("describe", FLModel()), failed)
    assert (out.model.params, out.records, out.failure) == (None, (), failed.failure)


def test_what_the_task_brought_may_go_back() -> None:
    out = disclosed(RULES, Task("describe", FLModel(meta={"project": "a"})), update({"x": MOMENTS}, meta={"project": "a"}))
    assert out.model.meta == {"project": "a"}


def test_noise_is_the_agents_own_and_from_the_operating_system() -> None:
    rules = Disclosure(min_count=10, count_noise=4.0, range_noise=0.5)
    said = {"x": {"moments": np.array([1000.0, 50.0, 2000.0, 999.0]), "range": np.array([0.0, 8.0])}}
    draws = [disclosed(rules, Task("describe", FLModel()), update(said)).model.params["x"] for _ in range(200)]
    counts = np.array([draw["moments"][0] for draw in draws])
    assert 2.5 < counts.std() < 5.5
    assert len(set(counts)) > 5
    for draw in draws:
        count, _, total, m2 = draw["moments"]
        assert_allclose([total / count, m2 / (count - 1)], [2.0, 1.0], atol=0.05)
        assert draw["range"][0] <= 0.0 < 8.0 <= draw["range"][1]
    cells = np.full(500, 15)
    told_cells = disclosed(rules, Task("histogram", FLModel()), update({"x": {"histogram": cells}})).model.params["x"]["histogram"]
    assert set(np.unique(told_cells)) <= {0, *range(10, 60)}
    assert len(np.unique(told_cells)) > 5
    assert (said["x"]["moments"].tolist(), cells.sum()) == ([1000.0, 50.0, 2000.0, 999.0], 7500)


def test_other_tasks_pass() -> None:
    same = update({"w": np.ones(2)}, metrics={"loss": 1.0}, meta={"examples": 3})
    assert disclosed(RULES, Task("train", FLModel()), same) is same


def test_tasks_that_would_get_around_the_rules() -> None:
    check_task(RULES, "statistics", Task("describe", FLModel(), {"describe": {}}))
    check_task(RULES, "fedavg", Task("train", FLModel()))
    check_task(RULES, "workflow", Task("describe", FLModel()))
    for recipe, task in (
        ("statistics", Task("train", FLModel())),
        ("statistics", Task("assign", FLModel())),
        ("statistics", Task("describe", FLModel(), {SITE_RULES: {"min_count": 1}})),
        ("workflow", Task("train", FLModel(), {SITE_RULES: {}})),
    ):
        with pytest.raises(PolicyRefused, match=r"\[statistics\]"):
            check_task(RULES, recipe, task)
    noisy = Disclosure(count_noise=1.0)
    check_recipe(noisy, "statistics")
    for task in ("propose_centroids", "assign", "derivatives"):  # also in a workflow of the job's own
        with pytest.raises(PolicyRefused, match=r"exact sums.*\[statistics.count_noise\]"):
            check_task(noisy, "workflow", Task(task, FLModel()))


BOTH = st.builds(Disclosure, min_count=st.integers(1, 30), max_bins_share=st.floats(0.01, 2.0), extremes=st.booleans())
CONFIG = {
    "describe": {"columns": None, "range": True, "known": []},
    "histogram": {"edges": {"x": [0.0, 6.0, 6]}},
    "kmeans": {"columns": ["x"], "clusters": 3},
}


@given(st.lists(st.sampled_from([0.5, 1.5, 2.5, 3.5, 5.5, float("nan")]), min_size=1, max_size=120), BOTH, BOTH)
def test_both_parties_rules_are_kept_as_if_the_job_had_made_the_stricter_ones(
    values: list[float], job: Disclosure, site: Disclosure
) -> None:
    """The training process keeps what it is told, and the agent then finds nothing to refuse, whatever the table and the rules are."""
    table, model = {"x": np.array(values)}, FLModel({"centroids": np.array([[0.5], [2.0], [5.0]])})

    def answer(task: str, rules: Disclosure, config: dict[str, Any]) -> FLModel:
        asked = Site("north", 0, 1, "job", CONFIG | config, {}, 0, ("site", "north"))
        return table_app(lambda site: table, disclosure=rules).run(task, model, asked)

    for task in ("describe", "histogram"):
        out = leaves(task, answer(task, job, told(site)).params, site)
        same = answer(task, job.stricter(site), {}).params
        assert out.keys() == same.keys()
        for name in out:
            assert out[name].keys() == same[name].keys()
            for part in out[name]:
                assert_array_equal(out[name][part], same[name][part])
    least = max(job.min_count, site.min_count)
    rows = np.isfinite(table["x"]).sum()
    for task in ("propose_centroids", "assign"):
        if rows < least:
            with pytest.raises(PolicyRefused, match=r"\[statistics.min_count\]"):
                answer(task, job, told(site))
        else:
            told_of = answer(task, job, told(site))
            counts = leaves(task, told_of.params, site, metrics=told_of.metrics)["counts"]
            assert (counts[counts > 0] >= least).all()


@given(st.lists(st.integers(0, 60), min_size=1, max_size=10).map(np.array), st.integers(1, 30), st.integers(1, 30))
def test_no_cell_below_the_sites_least_leaves_whatever_the_code_hid(cells: np.ndarray, hid: int, least: int) -> None:
    said = {"x": {"histogram": hide_small(cells, hid)}}
    if ((said["x"]["histogram"] > 0) & (said["x"]["histogram"] < least)).any():
        assert clause("histogram", said, Disclosure(min_count=least)) == "statistics.min_count"
    else:
        shown = leaves("histogram", said, Disclosure(min_count=least))["x"]["histogram"]
        assert_array_equal(shown, said["x"]["histogram"])


async def test_the_agent_tells_its_code_the_rules_and_lets_no_task_tell_others(one_site: Any, job_folder: Callable[..., Path]) -> None:
    """The code here answers with what it was told, which is no secret of the site's."""
    code = (
        "from hanse import App\napp = App()\n@app.train\ndef train(model, site):\n"
        "    model.metrics = {k: float(v) for k, v in site.config['statistics_rules'].items()}\n    return model\n"
    )
    one_site.policy("sandbox: 'off'\nstatistics: {min_count: 30, count_noise: 2}\n")
    await one_site.start()
    await one_site.take(job_folder(code), site_config={"site-1": {SITE_RULES: {"min_count": 1}}})
    one_site.server.assign((0, 0), Task("train", FLModel({"w": np.zeros(3)})))
    update = await one_site.server.update((0, 0))
    assert update.model.metrics == {"min_count": 30.0, "max_bins_share": 0.1, "extremes": 0.0}
    one_site.server.assign((1, 0), Task("train", FLModel({"w": np.zeros(3)}), {SITE_RULES: {"min_count": 1}}))
    failure = (await one_site.server.update((1, 0))).failure
    assert (failure.code, failure.message.endswith("which is for this site to say [statistics]")) == ("PolicyRefused", True)
