"""What a site keeps to itself: it comes back in the site's next task, and never leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site, Stack
from hanse.client.session import SiteInfo
from hanse.errors import ConfigError
from hanse.filters import ClipNorm, Filters
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.task import Task, TaskId
from hanse.site.personal import keep, recall
from hanse.site.runner import SiteRunner

CONFIG = {"local_params": ["head.*"]}
GIVEN = FLModel({"body": np.zeros(1), "head.w": np.ones(1)})


def test_by_hand() -> None:
    answer = FLModel({"body": np.full(1, 5.0), "head.w": np.full(1, 7.0)}, meta={"examples": 3, "excluded": ["x"]})
    sent, kept = keep(answer, GIVEN, CONFIG)
    assert sent.params == {"body": 5.0}
    assert sent.meta == {"examples": 3, "excluded": ["head.w", "x"]}
    assert kept == {"head.w": 7.0}
    assert kept["head.w"] is not answer.params["head.w"]  # the next site's network may be the same
    again = recall(GIVEN, CONFIG, {"local_params": kept})
    assert again.params == {"body": 0.0, "head.w": 7.0}
    assert GIVEN.params["head.w"] == 1.0


def test_a_diff_is_kept_as_what_it_leads_to() -> None:
    sent, kept = keep(FLModel({"body": np.ones(1), "head.w": np.ones(1)}, ParamsType.DIFF), GIVEN, CONFIG)
    assert (sent.params_type, kept) == (ParamsType.DIFF, {"head.w": 2.0})


def test_nested_params_go_by_flat_names() -> None:
    nested = FLModel({"head": {"w": np.ones(1)}, "body": [np.zeros(1)]})
    sent, kept = keep(nested, nested, {"local_params": ["head/*"]})
    assert (sent.params, kept) == ({"body/0": 0.0}, {"head/w": 1.0})
    assert recall(nested, {"local_params": ["head/*"]}, {"local_params": {"head/w": np.full(1, 4.0)}}).params["head"]["w"] == 4.0


def test_what_was_not_sent_stays_named() -> None:
    sent, kept = keep(FLModel({"body": np.zeros(1)}), GIVEN, CONFIG)
    assert (kept, sent.meta["excluded"]) == ({}, ["head.w"])


def test_without_patterns_or_params_nothing_changes() -> None:
    assert keep(GIVEN, GIVEN, {}) == (GIVEN, {})
    assert keep(FLModel(metrics={"a": 1}), GIVEN, CONFIG)[1] == {}
    assert recall(GIVEN, CONFIG, {}) is GIVEN
    assert recall(GIVEN, {}, {"local_params": {"head.w": np.zeros(1)}}) is GIVEN


def test_a_name_that_nothing_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no parameter has such a name: the first is 'body'"):
        keep(GIVEN, GIVEN, {"local_params": ["tail.*"]})


def test_a_task_that_a_filter_ends_leaves_the_state_as_it_was() -> None:
    app = App()

    @app.train
    def train(model: FLModel, site: Site) -> FLModel:
        site.state["rounds"] = site.state.get("rounds", 0) + 1
        extra = {"new": np.ones(1)} if model.current_round == 1 else {}  # of which the filter knows no change
        return FLModel({**{name: array + 1 for name, array in model.params.items()}, **extra})

    runner, state = SiteRunner(app, filters=Filters(site_out=[ClipNorm(100.0)])), dict[str, Any]()
    for round in range(3):
        task = Task("train", FLModel(GIVEN.params, current_round=round), CONFIG)
        update = runner.run(SiteInfo("site-1"), task, TaskId("job", round, 0, "site-1"), state)
        assert (update.failure is None) is (round != 1)
    assert state == {"rounds": 2, "local_params": {"head.w": 3.0}}
    assert update.model.params == {"body": 1.0}


def test_sites_that_keep_something_are_not_trained_together() -> None:
    """That way ends in sums, and goes past what takes local parameters out."""

    class Quick:
        def stacks(self) -> bool:
            return True

        def together(self, model: FLModel, sites: Any) -> Any:
            names = [site.name for site in sites]
            yield Stack(range(len(names)), {"head.w": np.ones((len(names), 1))}, {}, {"examples": [1] * len(names)})

        def __call__(self, model: FLModel, site: Site) -> FLModel:
            return model

    app = App()
    app.train(Quick())
    infos = [SiteInfo("site-1"), SiteInfo("site-2")]
    assert len(list(SiteRunner(app).together(infos, Task("train", GIVEN), ("job", 0, 0), {}))) == 1
    assert list(SiteRunner(app).together(infos, Task("train", GIVEN, CONFIG), ("job", 0, 0), {})) == []
