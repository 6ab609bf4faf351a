from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from hanse.aggregation.collect import Collect
from hanse.errors import ConfigError, Failure, UpdateRejected
from hanse.messages.codec import decode, encode
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.task import TaskId
from hanse.messages.update import Update


def check(params: Any, like: Any) -> None:
    if not isinstance(params, bytes) or (like is not None and params[:1] != like[:1]):
        raise ConfigError(f"{params!r} does not go with {like!r}", hint="Send bytes.")


def join(before: Any, parts: Mapping[str, Any]) -> bytes:
    return (before or b"") + b"".join(parts.values())


def update(site: str, params: Any, *, loss: float = 0.0, **about: Any) -> Update:
    return Update(site, TaskId("job", 0, 0, site), FLModel(params, metrics={"loss": loss}, **about))


def test_parts_are_joined_by_the_order_of_names_whatever_came_first() -> None:
    total = Collect(check, join).fresh(FLModel(b"a0"))
    for one in (update("c", b"a3", loss=1), update("a", b"a1", loss=2), update("b", None, loss=6)):
        total.add(one)
    assert total.fold() == {}
    result = total.result()
    assert (result.params, result.metrics, result.params_type) == (b"a0a1a3", {"loss": 3.0}, ParamsType.FULL)


@pytest.mark.parametrize("reference", [None, FLModel(), FLModel(b"a")])
def test_partials_travel_and_merge_to_the_same(reference: FLModel | None) -> None:
    updates = [update("a", b"a1", loss=1, meta={"examples": 1}), update("b", b"a2", loss=3, meta={"examples": 3}), update("c", b"a3")]
    updates[2].model.meta["examples"] = 4  # type: ignore[index]
    at_once, total = (Collect(check, join).fresh(reference) for _ in range(2))
    for one in updates:
        at_once.add(one)
    at_once.fold()
    for group in (updates[:1], updates[1:]):
        part = Collect(check, join).fresh(reference)
        for one in group:
            part.add(one)
        part.fold()
        total.merge(decode(b"".join(encode(part.partial())))[0])
    assert total.result() == at_once.result()
    assert total.result().metrics == {"loss": (1 * 1 + 3 * 3) / 8}


def test_what_does_not_go_with_the_model_is_rejected_and_does_not_count() -> None:
    total = Collect(check, join).fresh(FLModel(b"a"))
    with pytest.raises(UpdateRejected, match=r"site 'x': b'b' does not go with b'a' Send bytes\."):
        total.add(update("x", b"b"))
    with pytest.raises(UpdateRejected, match="site 'x': its params are a DIFF"):
        total.add(update("x", b"a", params_type=ParamsType.DIFF))
    with pytest.raises(UpdateRejected, match="could not do its task: E: no"):
        total.add(Update("x", TaskId("job", 0, 0, "x"), failure=Failure("E", "no")))
    total.add(update("x", b"a1"))
    with pytest.raises(UpdateRejected, match="counted already"):
        total.add(update("x", b"a1"))
    assert total.result().params == b"aa1"


def test_without_a_model_the_first_site_is_the_measure() -> None:
    total = Collect(check, join).fresh()
    for one in (update("b", b"b", loss=8), update("c", b"a"), update("a", b"a")):
        total.add(one)
    assert set(total.fold()) == {"b"}
    other = Collect(check, join).fresh()
    other.add(update("d", b"b"))
    other.fold()
    with pytest.raises(UpdateRejected, match="site 'd'"):
        total.merge(other.partial())
    assert (total.result().params, total.result().metrics) == (b"aa", {"loss": 0})


def test_a_site_whose_weight_is_of_another_kind_is_left_out_whole() -> None:
    total = Collect(check, join).fresh(FLModel(b"a"))
    total.add(update("a", b"a1", meta={"examples": 1}))
    total.add(update("b", b"a2", meta={"steps": 1}))
    assert set(total.fold()) == {"b"}
    assert total.result().params == b"aa1"


def test_nothing_at_all() -> None:
    total = Collect(check, join).fresh()
    assert total.fold() == {}
    assert total.result().params is None


def test_arrays_are_its_own_once_they_are_folded() -> None:
    array = np.zeros(2)
    total = Collect(lambda params, like: None, lambda before, parts: parts).fresh()
    total.add(update("a", {"x": array}))
    total.fold()
    array += 1
    np.testing.assert_array_equal(total.result().params["a"]["x"], [0, 0])
