from __future__ import annotations

import math
import mmap
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hanse.aggregation import gathered
from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.fednova import FedNova
from hanse.aggregation.gathered import Gathered
from hanse.aggregation.geometric_median import GeometricMedian
from hanse.aggregation.krum import Bulyan, Krum, MultiKrum
from hanse.aggregation.norm_bound import NormBoundedMean
from hanse.aggregation.order_statistics import Median, TrimmedMean
from hanse.aggregation.qffl import QFFL
from hanse.errors import ConfigError, Failure, UpdateRejected
from hanse.messages.codec import decode, encode, read, write
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.lasting import lasting_map
from hanse.messages.task import TaskId
from hanse.messages.update import Update
from hanse.transport.blobs import map_file

F32 = np.float32
GATHERED = [Median(), TrimmedMean(0.2), Krum(1), MultiKrum(1), Bulyan(1), GeometricMedian(), NormBoundedMean()]
ALL = [*GATHERED, FedNova(), QFFL()]
REFERENCE = {"layer": {"w": np.ones((3, 4), F32), "n": np.array(2)}, "list": [np.zeros(2, F32)], "note": None}


def update(number: int, params: Any = None, **fields: Any) -> Update:
    site = f"site-{number}"
    fields = {"metrics": {"loss": 1.0 + number}, "meta": {"examples": 10 + number, "steps": 3 + number}} | fields
    return Update(site, TaskId("job", 4, 0, site), FLModel(params, **fields))


def updates(count: int = 7) -> list[Update]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        w, v = rng.standard_normal((3, 4)).astype(F32), rng.standard_normal(2).astype(F32)
        made.append(update(number, {"layer": {"w": w, "n": np.array(number)}, "list": [v], "note": None}))
    return made


def same(one: FLModel, other: FLModel) -> bool:
    return b"".join(map(bytes, encode(one))) == b"".join(map(bytes, encode(other)))


def folded(aggregator: Aggregator, parts: Sequence[Sequence[Update]], reference: FLModel | None) -> FLModel:
    """Each part folded by itself, its updates' memory spoilt after that, and their partial sent on."""
    total = aggregator.fresh(reference)
    for part in parts:
        group = aggregator.fresh(reference)
        for one in part:
            frame = bytearray(b"".join(map(bytes, encode(one.model))))
            group.add(Update(one.site, one.task_id, decode(frame)[0]))
            assert group.fold() == {}
            frame[-200:] = b"\xff" * 200
        sent = bytearray(b"".join(map(bytes, encode(group.partial()))))
        total.merge(decode(sent)[0])
        sent[-400:] = b"\xff" * 400
    return total.result()


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_partials_travel_and_no_memory_of_an_update_is_kept(monkeypatch, rule, in_memory):
    monkeypatch.setattr(gathered, "IN_MEMORY_BYTES", in_memory)
    reference, all_of = FLModel(REFERENCE), updates()
    singles = folded(rule, [[one] for one in all_of], reference)
    assert isinstance(singles.params["list"], list)
    assert singles.params["note"] is None
    assert singles.params["layer"]["n"].dtype == np.int64
    at_once = rule.fresh(reference)
    for one in reversed(all_of):
        at_once.add(one)
    assert same(at_once.result(), singles)
    if isinstance(rule, Gathered):  # sums that begin in other groups are rounded in other places
        assert same(folded(rule, [all_of[:3], all_of[3:]], reference), singles)
        if not isinstance(rule, NormBoundedMean):
            assert same(folded(rule, [all_of[:3], all_of[3:]], None), folded(rule, [[one] for one in all_of], None))


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
def test_what_fits_no_other_is_rejected_and_changes_nothing(rule):
    total = rule.fresh(FLModel({"w": np.zeros(2, F32)}))
    good = [update(number, {"w": np.array([number, 1], F32)}) for number in range(7)]
    for one in good[:-1]:
        total.add(one)
    for bad, says in [
        (update(6, {"w": np.zeros(3, F32)}), "shape"),
        (update(6, {"w": np.zeros(2, np.int32)}), "dtype int32"),
        (update(6, {"v": np.zeros(2, F32)}), "are missing"),
        (update(6, {"w": np.zeros(2, F32), "v": np.zeros(2, F32)}), "is not in"),
        (update(6, {"w": [np.zeros(2, F32)]}), "nested in another way"),
        (update(6, {"w": np.array(["a", "b"])}), "no mean"),
        (update(6, {"w": np.zeros(2, F32)}, meta={"examples": 0, "steps": 1}), "weight is 0"),
        (update(0, {"w": np.zeros(2, F32)}), "counted already"),
        (Update("site-6", TaskId("job", 4, 0, "site-6"), failure=Failure("E", "broken")), "broken"),
    ]:
        if isinstance(rule, QFFL) and says == "weight is 0":
            continue  # it does not look at them
        with pytest.raises(UpdateRejected, match=f"site '{bad.site}', round 5.*{says}"):
            total.add(bad)
    spoilt = update(6, {"w": np.array([1, math.nan], F32)})
    total.add(spoilt)
    rejected = total.fold()
    assert list(rejected) == ["site-6"]
    assert "tensor 'w' holds NaN or inf" in str(rejected["site-6"])
    clean = rule.fresh(FLModel({"w": np.zeros(2, F32)}))
    for one in good[:-1]:
        clean.add(one)
    if getattr(rule, "needs", 1) <= 6:
        assert same(total.result(), clean.result())
        with pytest.raises(ConfigError, match="has given its result"):
            total.add(good[-1])


@pytest.mark.parametrize("rule", GATHERED, ids=lambda rule: type(rule).__name__)
def test_a_nan_in_the_last_update_is_told_by_the_result(rule):
    total = rule.fresh()
    total.add(update(1, {"w": np.array([math.inf], F32)}))
    with pytest.raises(UpdateRejected, match="NaN or inf"):
        total.result()


@pytest.mark.parametrize("rule", GATHERED, ids=lambda rule: type(rule).__name__)
def test_those_that_send_another_kind_than_most_are_left_out(rule):
    reference = FLModel({"w": np.zeros(2, F32), "v": np.zeros(1, F32)})
    total, without = rule.fresh(reference), rule.fresh(reference)
    for number in range(1, 8):
        one = update(number, {"w": np.array([number, 1], F32), "v": np.array([2], F32)})
        total.add(one)
        without.add(one)
    total.add(update(0, {"w": np.array([1e9, 1e9], F32), "v": np.array([2], F32)}, params_type="DIFF"))
    result = total.result()
    assert result.params_type is ParamsType.FULL
    assert result.meta.pop("left_out") == ["site-0"]
    assert all(np.array_equal(result.params[name], array) for name, array in without.result().params.items())


@pytest.mark.parametrize("rule", [Krum(1), Bulyan(1), GeometricMedian(), NormBoundedMean()], ids=lambda rule: type(rule).__name__)
def test_distances_are_taken_between_updates_with_the_same_tensors(rule):
    total = rule.fresh(FLModel({"w": np.zeros(2, F32), "v": np.zeros(1, F32)}))
    for number in range(7):
        total.add(update(number, {"w": np.array([number, 1], F32)}, meta={"excluded": ["v"]}))
    total.add(update(7, {"w": np.array([9, 9], F32), "v": np.array([2], F32)}))
    result = total.result()
    assert result.meta["left_out"] == ["site-7"]
    assert list(result.params) == ["w"]


def test_metrics_are_averaged_by_examples_and_alike_if_sites_tell_other_units():
    total = Median().fresh()
    total.add(update(0, metrics={"loss": 1.0, "auc": math.nan}, meta={"examples": 1}))
    total.add(update(1, metrics={"loss": 5.0}, meta={"examples": 3}))
    mixed = total.fresh()
    mixed.merge(folded_partial(total))
    mixed.add(update(2, metrics={"loss": 0.0}, meta={"steps": 9}))
    assert total.result() == FLModel(metrics={"loss": 4.0})
    assert mixed.result() == FLModel(metrics={"loss": 2.0})


def folded_partial(aggregator: Median) -> FLModel:
    aggregator.fold()
    return aggregator.partial()


def test_nothing_at_all():
    for rule in ALL:
        assert rule.fresh(FLModel({"w": np.zeros(2)})).result().params is None
        total = rule.fresh()
        total.merge(rule.fresh().partial())
        assert total.result() == FLModel()


def test_what_does_not_fit_in_memory_goes_to_a_file(monkeypatch):
    monkeypatch.setattr(gathered, "IN_MEMORY_BYTES", 1000)
    shelf = gathered._Shelf()
    arrays = [np.arange(100, dtype=F32), np.arange(300.0).reshape(3, 100).T, np.array(3, np.int8), np.arange(200, dtype=np.complex64)]
    places = [shelf.keep(array) for array in arrays]
    kept = [shelf.read(place) for place in places]
    for array, copy in zip(arrays, kept, strict=True):
        assert_array_equal(copy, array)
        assert copy.dtype == array.dtype
        assert not np.shares_memory(copy, array)
    assert [isinstance(array.base, mmap.mmap) or array.base is not None for array in kept] == [False, True, False, True]
    later = shelf.keep(np.full(500, 7.0))
    assert_array_equal(shelf.read(later), np.full(500, 7.0))
    assert_array_equal(kept[1], arrays[1])  # the mapping made before stays


def test_a_blobs_mapping_is_kept_as_it_is(monkeypatch, tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(b"".join(map(bytes, encode(FLModel({"w": np.arange(5, dtype=F32)})))))
    mapped = decode(map_file(path))[0].params["w"]
    assert lasting_map(mapped) is not None
    assert lasting_map(mapped[1:].reshape(2, 2)) is lasting_map(mapped)
    assert lasting_map(mapped.copy()) is None
    shelf = gathered._Shelf()
    assert np.shares_memory(shelf.keep(mapped), mapped)
    monkeypatch.setattr(gathered, "MAPS", 1)
    assert np.shares_memory(shelf.keep(mapped[1:]), mapped)
    other = decode(map_file(path))[0].params["w"]
    assert not np.shares_memory(shelf.keep(other), other)  # which would hold one more descriptor


def test_threads_change_no_bits(monkeypatch):
    rng = np.random.default_rng(0)
    stack = [update(number, {"w": rng.standard_normal(10_001).astype(F32)}) for number in range(9)]
    for rule in GATHERED:
        results = []
        for threads in ("1", "3"):
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
            monkeypatch.setattr(gathered, "PIECE", 3000)
            monkeypatch.setattr("hanse.aggregation.order_statistics.PIECE", 3000)
            total = rule.fresh(FLModel({"w": np.zeros(10_001, F32)}))
            for one in stack:
                total.add(one)
            results.append(total.result())
        assert same(*results)


@pytest.mark.parametrize("rule", GATHERED, ids=lambda rule: type(rule).__name__)
def test_memory_is_one_model_and_blocks_whatever_the_number_of_sites(monkeypatch, tmp_path, rule):
    """Updates from mapped files, and folded one by one as the runtime does: 11 models of 8 MiB that would be 88 in memory."""
    model_bytes, sites = 8 << 20, 11
    for number in range(sites):
        rng = np.random.default_rng(number)
        params = {str(k): rng.standard_normal(model_bytes // 16, F32) for k in range(4)}
        write(tmp_path / f"site-{number}", FLModel(params, "DIFF"))
    monkeypatch.setattr(gathered, "IN_MEMORY_BYTES", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # each has blocks of its own
    results = []
    for folds in (False, True):
        tracemalloc.start()
        total = rule.fresh()
        for number in range(sites):
            one = read(tmp_path / f"site-{number}")[0]
            total.add(update(number, one.params, params_type="DIFF"))
            if folds:
                assert total.fold() == {}
        results.append(total.result())
        del total, one
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < model_bytes + (7 << 20)
    assert same(*results)
