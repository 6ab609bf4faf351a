"""The Client API over a session written down here: names, order of calls, what is sent."""

from __future__ import annotations

import contextvars
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hanse.client as flare
from hanse.client.session import SiteInfo, enter
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.update import Record


class Tasks:
    """A session with its tasks given beforehand; `None` stands for a time-out."""

    def __init__(self, *tasks: tuple[str, FLModel]) -> None:
        self.info = SiteInfo("site-7", 6, 8, "job-1", config={"lr": 0.1})
        self.task_name = ""
        self._tasks = list(tasks)
        self._pending: FLModel | None = None
        self.sent: list[FLModel] = []
        self.records: list[Record] = []

    def is_running(self) -> bool:
        if self._pending is None and self._tasks:
            self.task_name, self._pending = self._tasks.pop(0)
        return self._pending is not None

    def receive(self, within_s: float | None = None) -> FLModel | None:
        model = self._pending if self.is_running() else None
        self._pending = None
        return model

    def send(self, model: FLModel) -> None:
        self.sent.append(model)

    def record(self, record: Record) -> None:
        self.records.append(record)


def within(session: Tasks, code: Callable[[], Any]) -> Any:
    """Run `code` with `session` entered, in a context of its own."""

    def run() -> Any:
        enter(session)
        return code()

    return contextvars.Context().run(run)


def started(session: Tasks, code: Callable[[], Any]) -> Any:
    def run() -> Any:
        flare.init()
        return code()

    return within(session, run)


def test_the_loop_gets_each_task_once_and_ends() -> None:
    session = Tasks(("train", FLModel({"w": np.ones(2)}, current_round=0)), ("evaluate", FLModel({"w": np.ones(2)}, current_round=1)))
    seen = []

    def script() -> None:
        while flare.is_running():
            model = flare.receive()
            assert model is not None
            seen.append((flare.get_task_name(), flare.is_train(), flare.is_evaluate(), flare.is_submit_model(), model.current_round))
            flare.send(FLModel(params=model.params, metrics={"loss": 1.0}))
        assert flare.receive() is None

    started(session, script)
    assert seen == [("train", True, False, False, 0), ("evaluate", False, True, False, 1)]
    assert len(session.sent) == 2


def test_who_and_where() -> None:
    def script() -> None:
        flare.init(rank="0")  # twice does no harm
        assert flare.system_info() == {"job_id": "job-1", "site_name": "site-7", "rank": 6, "count": 8}
        assert (flare.get_job_id(), flare.get_site_name(), flare.get_config()) == ("job-1", "site-7", {"lr": 0.1})

    started(Tasks(), script)


@pytest.mark.parametrize("call", [flare.receive, flare.is_running, flare.is_train, flare.system_info, flare.shutdown, flare.get_config])
def test_before_init_the_error_says_so(call: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"before init\(\)"):
        within(Tasks(), call)


def test_init_knows_one_process_a_site() -> None:
    with pytest.raises(ConfigError, match="rank=1"):
        within(Tasks(), lambda: flare.init(rank=1))


def test_receive_gives_the_same_model_until_it_is_answered() -> None:
    first, second = FLModel({"w": np.ones(1)}), FLModel({"w": np.zeros(1)})

    def script() -> None:
        assert flare.receive() is flare.receive() is first
        flare.send(FLModel(metrics={"a": 1.0}))
        assert flare.receive(timeout=1.0) is second

    started(Tasks(("train", first), ("train", second)), script)


def test_send_lets_go_of_parameters_but_not_of_the_answer() -> None:
    session = Tasks(("train", FLModel({"w": np.ones(1)})), ("train", FLModel({"w": np.ones(1)})))

    def script() -> None:
        given, answer = flare.receive(), FLModel({"w": np.full(1, 5.0)}, ParamsType.DIFF)
        flare.send(answer)
        assert given is not None
        assert given.params is None
        assert answer.params is None
        given, answer = flare.receive(), FLModel({"w": np.full(1, 6.0)})
        flare.send(answer, clear_cache=False)
        assert given is not None
        assert given.params is not None
        assert answer.params == {"w": np.full(1, 6.0)}

    started(session, script)
    assert [(model.params["w"][0], model.params_type) for model in session.sent] == [(5.0, "DIFF"), (6.0, "FULL")]


def test_flares_step_count_becomes_ours() -> None:
    session = Tasks(("train", FLModel()), ("train", FLModel()))

    def script() -> None:
        flare.receive()
        flare.send(FLModel(params={"w": np.ones(1)}, meta={"NUM_STEPS_CURRENT_ROUND": 12, "note": "x"}))
        flare.receive()
        flare.send(FLModel(params={"w": np.ones(1)}, meta={"NUM_STEPS_CURRENT_ROUND": 12, "steps": 3}))

    started(session, script)
    assert session.sent[0].meta == {"steps": 12, "note": "x"}
    assert session.sent[1].meta["steps"] == 3


@pytest.mark.parametrize(
    ("model", "says"),
    [({"w": 1}, "it takes an FLModel"), (FLModel(), "neither params nor metrics")],
)
def test_send_refuses_what_is_no_answer(model: Any, says: str) -> None:
    def script() -> None:
        flare.receive()
        flare.send(model)

    with pytest.raises(ConfigError, match=says):
        started(Tasks(("train", FLModel())), script)


def test_send_answers_a_task_once() -> None:
    def script() -> None:
        flare.receive()
        flare.send(FLModel(metrics={"a": 1.0}))
        flare.send(FLModel(metrics={"a": 1.0}))

    with pytest.raises(ConfigError, match="no task at hand"):
        started(Tasks(("train", FLModel()), ("train", FLModel())), script)


def test_after_shutdown_no_task_comes() -> None:
    def script() -> None:
        flare.shutdown()
        assert not flare.is_running()
        assert flare.receive() is None

    started(Tasks(("train", FLModel())), script)


@flare.evaluate
def check(model: FLModel, scale: float = 1.0) -> float:
    return float(model.params["w"][0] * scale)


@flare.train(device="cpu")
def fit(input_model: FLModel | None = None, add: float = 1.0) -> FLModel:
    assert input_model is not None
    return FLModel(params={"w": input_model.params["w"] + add})


def test_decorated_functions_send_parameters_with_the_metrics_measured_before() -> None:
    session = Tasks(("train", FLModel({"w": np.full(1, 4.0)})), ("train", FLModel({"w": np.full(1, 4.0)})))

    def script() -> None:
        assert check(None, scale=2.0) == 8.0
        assert fit(add=3.0).params["w"] == [7.0]
        fit()

    started(session, script)
    assert (session.sent[0].params["w"], session.sent[0].metrics) == ([7.0], {"metric": 8.0})
    assert (session.sent[1].params["w"], session.sent[1].metrics) == ([5.0], {})


def test_a_decorated_evaluation_answers_an_evaluation_task() -> None:
    session = Tasks(("evaluate", FLModel({"w": np.full(1, 4.0)})), ("evaluate", FLModel({"w": np.full(1, 4.0)})))

    def script() -> None:
        check(None)
        flare.evaluate(lambda model: {"accuracy": 0.5})()

    started(session, script)
    assert [model.metrics for model in session.sent] == [{"metric": 4.0}, {"accuracy": 0.5}]


@pytest.mark.parametrize("decorate", [flare.train, flare.evaluate])
def test_decorated_functions_must_return_something(decorate: Any) -> None:
    def nothing(model: FLModel) -> None:
        return None

    with pytest.raises(ConfigError, match=r"nothing returned (a NoneType|None)"):
        started(Tasks(("train", FLModel())), lambda: decorate(nothing)(None))


def test_the_client_api_brings_nothing_heavy() -> None:
    code = "import sys, hanse.client, hanse.client.tracking, hanse.app; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "hanse.client.tracking" in modules
    assert modules & {"torch", "sklearn", "scipy", "grpc", "sqlalchemy", "greenlet", "ml_dtypes", "importlib.metadata", "rich"} == set()
