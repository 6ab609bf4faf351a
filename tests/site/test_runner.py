"""One task at one site, with function apps; scripts have tests of their own."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site
from hanse.client.script import Script
from hanse.client.session import SiteInfo
from hanse.filters import CastTo, ClipNorm, Exclude, Filters, GaussianNoise
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Update
from hanse.site.runner import SiteRunner


def do(
    code: Any, params: Any = None, *, site: int = 0, round: int = 0, state: dict[str, Any] | None = None, seed: int = 1, **more: Any
) -> Update:
    """One task for one site; `code` is a runner, or a training function to make one with `filters`."""
    runner = code if isinstance(code, SiteRunner) else running(code, filters=more.pop("filters", None))
    info = SiteInfo(f"site-{site}", site, 4, "job", seed, {"lr": 0.1, "mu": 0})
    task = Task(more.pop("name", "train"), FLModel(params, current_round=round), {"mu": 1})
    return runner.run(info, task, TaskId("job", round, 0, info.name), {} if state is None else state, **more)


def running(function: Any, **settings: Any) -> SiteRunner:
    app = App()
    app.train(function)
    return SiteRunner(app, **settings)


def good(update: Update) -> FLModel:
    assert update.failure is None, update.records[-1].value
    return update.model


def test_a_function_gets_model_and_site_and_its_answer_is_the_update() -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        site.log("loss", 0.25, step=1)
        assert (site.name, site.rank, site.count, site.job_id, dict(site.config)) == ("site-2", 2, 4, "job", {"lr": 0.1, "mu": 1})
        w = model.params["w"] + 1
        return FLModel({"w": w}, ParamsType.DIFF, metrics={"a": np.float32(0.5), "b": True}, meta={"examples": np.int64(7), "x": [1]})

    update = do(train, {"w": np.ones(2)}, site=2)
    model = good(update)
    np.testing.assert_array_equal(model.params["w"], [2, 2])
    assert (model.params_type, model.metrics, model.meta) == (ParamsType.DIFF, {"a": 0.5, "b": 1.0}, {"examples": 7, "x": [1]})
    assert type(model.metrics["a"]) is float
    assert type(model.meta["examples"]) is int
    assert (update.site, update.task_id) == ("site-2", TaskId("job", 0, 0, "site-2"))
    assert update.records == (Record("loss", 0.25, 1),)
    assert update.seconds > 0


def test_an_exception_becomes_a_failure_with_the_traceback_and_what_was_logged() -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        site.log("loss", 1.0)
        raise ValueError("no data")

    update = do(train)
    assert update.failure is not None
    assert update.failure.message.startswith("test_runner.py:")
    assert update.failure.message.endswith("no data")
    assert [record.key for record in update.records] == ["loss", "traceback"]
    assert update.model.params is None


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "train returned a NoneType"),
        (FLModel(metrics={"a": "high"}), "metric 'a' is a str, 'high'"),
        (FLModel(metrics={"a": np.ones(2)}), "metric 'a' is a ndarray"),
        (FLModel(metrics={3: 1.0}), "metric 3 is a float"),  # type: ignore[dict-item]
    ],
)
def test_what_is_no_answer(answer: Any, says: str) -> None:
    def train(model: FLModel, site: Site) -> Any:
        return answer

    update = do(train)
    assert update.failure is not None
    assert says in update.failure.message


def test_an_interrupt_is_not_a_failure() -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(train)


def test_arrays_are_shared_and_cannot_be_changed_but_containers_can() -> None:
    params = {"w": np.ones(3), "nested": [np.ones(1)]}
    addresses = []

    def train(model: FLModel, site: Site) -> FLModel:
        addresses.append(model.params["w"].ctypes.data)
        for array in (model.params["w"], model.params["nested"][0]):
            with pytest.raises(ValueError, match="read-only"):
                array += 1
        model.params["w"] = model.params["w"] * 2
        model.params["nested"].clear()
        model.meta = {"mine": 1}
        return FLModel(model.params)

    runner = running(train)
    for site in range(2):
        np.testing.assert_array_equal(good(do(runner, params, site=site)).params["w"], [2, 2, 2])
    assert addresses == [params["w"].ctypes.data] * 2
    assert len(params["nested"]) == 1
    params["w"] += 1  # the caller's own may still be changed


def test_one_network_used_for_every_site_gives_each_its_own_update() -> None:
    w = np.zeros(2)

    def train(model: FLModel, site: Site) -> FLModel:
        w[:] = site.rank
        return FLModel({"w": w})

    runner = running(train)
    assert [good(do(runner, site=site)).params["w"].tolist() for site in range(3)] == [[0, 0], [1, 1], [2, 2]]


def test_tensors_are_each_sites_own() -> None:
    torch = pytest.importorskip("torch")
    params = {"w": np.ones(2, np.float32)}

    def train(model: FLModel, site: Site) -> FLModel:
        model.params["w"] += site.rank + 1
        return FLModel(model.params)

    runner = running(train, framework="torch")
    assert [good(do(runner, params, site=site)).params["w"].tolist() for site in range(2)] == [[2, 2], [3, 3]]
    assert params["w"].tolist() == [1, 1]
    assert isinstance(good(do(lambda model, site: FLModel({"w": torch.ones(1)}))).params["w"], np.ndarray)


def test_a_private_mapping_becomes_tensors_without_a_copy(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "model.bin"
    path.write_bytes(np.ones(1 << 24, np.float32).tobytes())
    mapped: list[int] = []

    def private() -> FLModel:
        with path.open("rb") as file:
            array = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.float32)
        mapped.append(array.ctypes.data)
        return FLModel({"w": array})

    def train(model: FLModel, site: Site) -> FLModel:
        assert model.params["w"].data_ptr() == mapped[-1]
        model.params["w"].data.add_(1)  # behind torch's back
        return FLModel({"w": model.params["w"]})

    with path.open("rb") as file:
        shared = {"w": np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.float32)}
    clipped = Filters(site_out=[ClipNorm(2048.0)])  # the change is 1 in 2²⁴ places, of norm 2¹²: half of it is left
    runner = running(train, framework="torch", filters=clipped)
    for site in range(3):
        assert (good(do(runner, shared, site=site, private=private)).params["w"] == 1.5).all()
    assert (shared["w"] == 1).all()
    assert len(mapped) == 3
    shared["w"] = shared["w"][:4]
    assert good(do(running(train_by_copy, framework="torch"), shared, private=private)).params["w"].tolist() == [2, 2, 2, 2]
    assert len(mapped) == 3  # a small model is copied


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.add_(1),
        lambda w: w.detach().numpy().__iadd__(1),
        lambda w: np.from_dlpack(w).__iadd__(1),
        lambda w: w.view(2, 2)[1].add_(1),
        lambda w: ctypes.memset(w.data_ptr(), 1, 4),
    ],
)
def test_what_one_site_writes_reaches_no_other(write: Callable[[Any], object]) -> None:
    pytest.importorskip("torch")
    shared, seen = {"w": np.zeros(4, np.float32)}, []

    def train(model: FLModel, site: Site) -> FLModel:
        seen.append(model.params["w"].tolist())
        kept.append(model.params["w"])
        write(model.params["w"])
        assert model.params["w"].tolist() != seen[-1]
        return FLModel(model.params)

    kept: list[Any] = []
    runner = running(train, framework="torch")
    for site in range(3):
        assert good(do(runner, shared, site=site)).params["w"].any()
    assert seen == [[0.0] * 4] * 3
    assert not shared["w"].any()


def train_by_copy(model: FLModel, site: Site) -> FLModel:
    model.params["w"].data.add_(1)
    return FLModel({"w": model.params["w"]})


def test_filters_stand_at_both_edges() -> None:
    seen: list[Mapping[str, Any]] = []

    def train(model: FLModel, site: Site) -> FLModel:
        seen.append(model.params)
        return FLModel({name: array + np.float32(3) for name, array in model.params.items()} | {"own": np.ones(1, np.float32)})

    filters = Filters(site_in=[CastTo("float16")], site_out=[Exclude(["own"]), ClipNorm(3.0)])
    answer = good(do(train, {"w": np.full(4, 1.0, np.float32)}, filters=filters))
    assert seen[0]["w"].dtype == np.float16
    assert not seen[0]["w"].flags.writeable
    assert answer.params.keys() == {"w"}
    np.testing.assert_allclose(answer.params["w"], 2.5)  # the change, 3 in each of 4 places, has norm 6


def test_noise_belongs_to_seed_site_and_task() -> None:
    runner = running(lambda model, site: FLModel({"w": np.zeros(3, np.float32)}), filters=Filters(site_out=[GaussianNoise(1.0)]))

    def noise(**which: Any) -> list[float]:
        return list(good(do(runner, **which)).params["w"].tolist())

    first = noise()
    assert first == noise()
    assert first != noise(site=1)
    assert first != noise(round=1)
    assert first != noise(seed=2)


def test_a_task_done_again_has_the_same_random_numbers() -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        return FLModel(metrics={"a": random.random(), "b": np.random.random(), "c": site.rng.random()})

    runner = running(train)
    first = good(do(runner)).metrics
    others = [good(do(runner, site=1)).metrics, good(do(runner, round=1)).metrics]
    assert good(do(runner)).metrics == first
    assert good(do(running(train))).metrics == first
    assert all(len({metrics[name] for metrics in [first, *others]}) == 3 for name in "abc")


def test_what_cannot_be_kept_is_named() -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        site.state["net"] = object()
        return model

    state = {"kept": 1}
    update = do(train, state=state)
    assert update.failure is not None
    assert "site.state['net']" in update.failure.message
    assert state == {"kept": 1}


def test_state_lasts_and_a_failed_task_leaves_it_as_it_was() -> None:
    def train(model: FLModel, site: Site) -> FLModel:
        site.state["count"] = site.state.get("count", 0) + 1
        site.state.setdefault("list", []).append(model.current_round)
        site.state.setdefault("w", np.zeros(2))[:] += 1
        if model.current_round == 1:
            raise ValueError("no")
        return FLModel(metrics={"count": site.state["count"]})

    runner, state = running(train), dict[str, Any]()
    assert good(do(runner, state=state, round=0)).metrics == {"count": 1}
    assert do(runner, state=state, round=1).failure is not None
    assert good(do(runner, state=state, round=2)).metrics == {"count": 2}
    assert (state["count"], state["list"], state["w"].tolist()) == (2, [0, 2], [2, 2])


@pytest.mark.parametrize(
    ("value", "says"),
    [(np.zeros(129), "grown to 1,032 bytes of arrays"), ("x" * (1 << 20), "bytes of JSON"), ({1, 2}, "JSON values and arrays only")],
    ids=["array", "text", "set"],
)
def test_state_is_small_and_plain(monkeypatch: pytest.MonkeyPatch, value: Any, says: str) -> None:
    monkeypatch.setattr("hanse.site.runner.MAX_STATE_ARRAY_BYTES", 1024)

    def train(model: FLModel, site: Site) -> FLModel:
        site.state["x"] = value
        return FLModel()

    state: dict[str, Any] = {"kept": 1}
    update = do(train, state=state)
    assert update.failure is not None
    assert says in update.failure.message
    assert state == {"kept": 1}


def test_what_functions_print_goes_to_the_sink() -> None:
    lines: list[tuple[str, str]] = []

    def train(model: FLModel, site: Site) -> FLModel:
        print("hello")
        return FLModel()

    runner = running(train, sink=lambda site, line: lines.append((site, line)))
    good(do(runner, site=3))
    assert runner.close() == []
    assert lines == [("site-3", "hello")]


def test_an_app_without_the_function_says_which_it_has() -> None:
    update = do(lambda model, site: FLModel(), name="evaluate")
    assert update.failure is not None
    assert "no function for task 'evaluate'; it has 'train'" in update.failure.message


def test_scikit_learn_in_a_script(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "train.py").write_text("""
import numpy as np
from sklearn.linear_model import SGDClassifier
import hanse.client as flare
from hanse.adapters.sklearn import params_of, set_params_of

flare.init()
data = np.random.default_rng(flare.system_info()["rank"])
x = data.normal(size=(40, 3)); y = (x[:, 0] > 0).astype(int)
model = SGDClassifier(random_state=0)
while flare.is_running():
    given = flare.receive()
    if given.params:
        set_params_of(model, given.params)
    model.partial_fit(x, y, classes=[0, 1])
    flare.send(flare.FLModel(params=params_of(model), metrics={"accuracy": model.score(x, y)}, meta={"examples": len(x)}))
""")
    runner = SiteRunner(Script(tmp_path / "train.py"), framework="sklearn")
    first = [good(do(runner, None, site=site)) for site in range(2)]
    mean = {name: (first[0].params[name] + first[1].params[name]) / 2 for name in ("coef_", "intercept_")}
    second = good(do(runner, mean, site=0, round=1))
    assert second.metrics["accuracy"] > 0.9
    assert second.meta == {"examples": 40}
    assert runner.close() == []
