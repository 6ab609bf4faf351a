from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hanse.aggregation import mean as mean_module
from hanse.aggregation.aggregator import Aggregator
from hanse.aggregation.mean import WeightedMean
from hanse.errors import ConfigError, Failure, UpdateRejected
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.task import TaskId
from hanse.messages.update import Update

F32 = np.float32


def update(site: str, params: Any, *, meta: Mapping[str, Any] | None = None, commit: int = 3, **fields: Any) -> Update:
    return Update(site, TaskId("job", commit, 0, site), FLModel(params, meta=meta or {}, **fields))


def combined(aggregator: WeightedMean, updates: Sequence[Update]) -> FLModel:
    for each in updates:
        aggregator.add(each)
    return aggregator.result()


def array(*values: float, dtype: Any = F32) -> np.ndarray:
    return np.array(values, dtype)


# Hand-computed


def test_weights_are_example_counts():
    updates = [update("a", {"w": array(0, 2)}, meta={"examples": 1}), update("b", {"w": array(4, 6)}, meta={"examples": 3})]
    result = combined(WeightedMean(), updates)  # (0·1 + 4·3) / 4,  (2·1 + 6·3) / 4
    assert_array_equal(result.params["w"], [3.0, 5.0])
    assert result.params["w"].dtype == F32
    assert result.params_type is ParamsType.FULL


@pytest.mark.parametrize(
    ("by", "expected"),
    [(None, 7.0), ("examples", 7.0), ("steps", 2.8), ("equal", 4.0), ({"a": 3.0, "b": 1.0, "c": 9.0}, 2.0)],
)
def test_by(by, expected):
    updates = [
        update("a", {"w": array(0)}, meta={"examples": 1, "steps": 13}),
        update("b", {"w": array(8)}, meta={"examples": 7, "steps": 7}),
    ]
    assert combined(WeightedMean(by), updates).params["w"] == F32(expected)


def test_steps_are_the_weight_where_there_are_no_examples():
    updates = [update("a", {"w": array(0)}, meta={"steps": 1}), update("b", {"w": array(8)}, meta={"steps": 3})]
    assert combined(WeightedMean(), updates).params["w"] == 6


def test_without_weights_each_counts_the_same():
    assert combined(WeightedMean(), [update("a", {"w": array(0)}), update("b", {"w": array(8)})]).params["w"] == 4


def test_diff_stays_diff():
    assert combined(WeightedMean(), [update("a", {"w": array(1)}, params_type="DIFF")]).params_type is ParamsType.DIFF


def test_nothing_added_gives_no_params():
    assert WeightedMean().result().params is None
    assert WeightedMean().fresh(FLModel({"w": array(1)})).result().params is None


def test_empty_tensors_and_tensors_without_axes():
    params = {"none": np.empty((0, 3), F32), "one": np.array(5, F32)}
    result = combined(WeightedMean(), [update("a", params), update("b", params)]).params
    assert result["none"].shape == (0, 3)
    assert isinstance(result["one"], np.ndarray)
    assert result["one"].shape == ()
    assert result["one"] == 5


def test_metrics_are_averaged_with_the_same_weights_and_nan_is_left_out():
    updates = [
        update("a", None, meta={"examples": 1}, metrics={"accuracy": 1.0, "auc": math.nan}),
        update("b", None, meta={"examples": 3}, metrics={"accuracy": 0.0, "auc": 0.5}),
    ]
    result = combined(WeightedMean(), updates)
    assert result.metrics == {"accuracy": 0.25, "auc": 0.5}
    assert result.params is None


# Dtypes


def test_integers_are_rounded_half_to_even():
    updates = [update("a", {"n": array(1, 2, -3, dtype=np.int64)}), update("b", {"n": array(2, 3, -4, dtype=np.int64)})]
    result = combined(WeightedMean(), updates).params["n"]  # 1.5, 2.5, -3.5
    assert_array_equal(result, [2, 2, -4])
    assert result.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_integers_at_the_ends_of_their_range_stay_there(dtype):
    info = np.iinfo(dtype)
    updates = [update(site, {"n": np.array([info.min, info.max], dtype)}) for site in "abc"]
    result = combined(WeightedMean(), updates).params["n"]
    assert result[0] == info.min
    assert math.isclose(int(result[1]), info.max)


def test_booleans_are_the_weighted_majority_and_a_tie_is_true():
    updates = [
        update("a", {"b": np.array([True, False, True, False])}, meta={"examples": 1}),
        update("b", {"b": np.array([False, True, True, False])}, meta={"examples": 2}),
        update("c", {"b": np.array([True, False, False, False])}, meta={"examples": 1}),
    ]
    result = combined(WeightedMean(), updates).params["b"]
    assert_array_equal(result, [True, True, True, False])
    assert result.dtype == np.bool_


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, F32, np.float64, np.complex64, np.complex128]
)
def test_every_float_keeps_its_dtype(dtype):
    updates = [update("a", {"w": array(1, -2, dtype=dtype)}), update("b", {"w": array(2, -4, dtype=dtype)})]
    result = combined(WeightedMean(), updates).params["w"]
    assert result.dtype == dtype
    assert_array_equal(result.astype(np.complex128), [1.5, -3])


def test_float16_is_summed_in_float32():
    updates = [update(f"{k}", {"w": array(60000, dtype=np.float16)}, meta={"examples": 1000}) for k in range(9)]
    assert combined(WeightedMean(), updates).params["w"] == 60000


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_float_of_another_width_counts_in_the_dtype_of_the_model(dtype):
    aggregator = WeightedMean().fresh(FLModel({"w": array(0, 0)}))
    result = combined(aggregator, [update("a", {"w": array(1, 2, dtype=dtype)}), update("b", {"w": array(2, 2)})]).params["w"]
    assert result.dtype == F32
    assert_array_equal(result, [1.5, 2])


# Agreement with a slow plain reference, and bits

values = st.floats(-1e6, 1e6, width=32)
weights = st.integers(1, 10_000)
rounds = st.lists(st.tuples(weights, st.lists(values, min_size=6, max_size=6)), min_size=1, max_size=7)


def as_updates(sites: Sequence[tuple[int, list[float]]]) -> list[Update]:
    return [
        update(f"site-{k}", {"w": np.array(v[:4], F32).reshape(2, 2), "b": np.array(v[4:], np.float64)}, meta={"examples": w})
        for k, (w, v) in enumerate(sites)
    ]


def bits(model: FLModel) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in model.params.items()}


@given(rounds)
def test_agrees_with_a_slow_plain_reference_step_by_step(sites):
    result = combined(WeightedMean(), as_updates(sites)).params
    for name, dtype in (("w", F32), ("b", np.float64)):
        columns = [v[:4] if name == "w" else v[4:] for _, v in sites]
        for position, got in enumerate(result[name].reshape(-1)):
            total = dtype(sites[0][0]) * dtype(columns[0][position])
            for (weight, _), column in zip(sites[1:], columns[1:], strict=True):
                total = dtype(total + dtype(weight) * dtype(column[position]))
            assert got == total / dtype(sum(weight for weight, _ in sites))


@given(rounds, st.data())
@settings(max_examples=60)
def test_any_arrival_order_and_any_folding_in_the_order_of_names_give_the_same_bits(sites, data):
    updates = as_updates(sites)
    expected = bits(combined(WeightedMean(), updates))
    assert bits(combined(WeightedMean(), data.draw(st.permutations(updates)))) == expected
    folded = WeightedMean()
    for each in updates:
        folded.add(each)
        if data.draw(st.booleans()):
            assert folded.fold() == {}
    assert bits(folded.result()) == expected


@given(rounds, st.data())
@settings(max_examples=60)
def test_the_same_groups_give_the_same_bits_wherever_they_were_summed(sites, data):
    updates = as_updates(sites)
    size = data.draw(st.integers(1, len(updates)))
    groups = [updates[low : low + size] for low in range(0, len(updates), size)]

    def merged(reference: FLModel | None) -> FLModel:
        whole = WeightedMean().fresh(reference)
        for group in groups:
            part = WeightedMean().fresh(reference)
            for each in data.draw(st.permutations(group)):
                part.add(each)
            part.fold()
            partial = part.partial()
            partial.meta = json.loads(json.dumps(partial.meta))
            whole.merge(partial)
            for tensor in partial.params.values():
                tensor.fill(7)  # the memory belongs to somebody else
        return whole.result()

    result = merged(None)
    assert bits(merged(updates[0].model)) == bits(result)
    plain = combined(WeightedMean(), updates)
    for name in "wb":
        np.testing.assert_allclose(result.params[name], plain.params[name], rtol=1e-3, atol=1.0)
    if size == 1:
        assert bits(result) == bits(plain)


def test_threads_and_blocks_change_no_bits(monkeypatch):
    rng = np.random.default_rng(5)
    updates = [update(f"{k}", {"w": rng.standard_normal((7, 1001), dtype=F32)}, meta={"examples": k + 3}) for k in range(5)]
    expected = bits(combined(WeightedMean(), updates))
    monkeypatch.setattr(mean_module, "BLOCK", 64)
    monkeypatch.setattr(mean_module, "PIECE", 1000)
    assert bits(combined(WeightedMean(threads=3), updates)) == expected
    assert bits(combined(WeightedMean(), updates)) == expected


def test_arrays_that_are_not_contiguous():
    w = np.arange(12, dtype=F32).reshape(3, 4)
    assert_array_equal(combined(WeightedMean(), [update("a", {"w": w.T}), update("b", {"w": w.T.copy()})]).params["w"], w.T)


def test_the_result_shares_no_memory_with_an_update():
    w = array(1, 2)
    result = combined(WeightedMean("equal"), [update("a", {"w": w})]).params["w"]
    result += 1
    assert_array_equal(w, [1, 2])


# What the updates show only together, or in their numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["a", "b", "c"])
@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("dtype", [F32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_an_update_with_a_number_that_is_not_finite_is_left_out(bad, place, folds, dtype):
    def params(site: str) -> dict[str, np.ndarray]:
        return {"v": array(ord(site), dtype=dtype), "w": array(ord(site), bad if site == place else 1, dtype=dtype)}

    aggregator, rejected = WeightedMean(), {}
    for site in "abc":
        aggregator.add(update(site, params(site), meta={"examples": ord(site)}))
        if folds:
            rejected |= aggregator.fold()
    rejected |= aggregator.fold()
    assert list(rejected) == [place]
    for word in (f"site {place!r}", "round 4", "tensor 'w'", "NaN or inf"):
        assert word in str(rejected[place])
    good = [update(site, params(site), meta={"examples": ord(site)}) for site in "abc" if site != place]
    assert bits(aggregator.result()) == bits(combined(WeightedMean(), good))


def test_result_raises_if_folding_leaves_out_the_one_update():
    aggregator = WeightedMean()
    aggregator.add(update("a", {"w": array(math.nan)}))
    with pytest.raises(UpdateRejected, match="site 'a', round 4: tensor 'w'"):
        aggregator.result()
    assert aggregator.result().params is None


def test_large_finite_numbers_are_no_reason_to_reject():
    big = array(3e38, -3e38, 3e38)  # their sum of squares and partial sums overflow float32
    assert_array_equal(combined(WeightedMean(), [update("a", {"w": big})]).params["w"], big)


def test_a_sum_that_overflows_is_an_error_and_not_an_inf():
    aggregator = WeightedMean()
    for site in "ab":
        aggregator.add(update(site, {"v": array(1), "w": array(3e38)}))
    assert aggregator.fold() == {}
    for _ in range(2):
        with pytest.raises(UpdateRejected, match="tensor 'w' over site 'a' and the others overflows float32"):
            aggregator.result()


def test_units_must_agree():
    aggregator = WeightedMean()
    aggregator.add(update("b", {"w": array(1)}, meta={"steps": 3}))
    aggregator.add(update("a", {"w": array(1)}, meta={"examples": 3}))
    rejected = aggregator.fold()
    assert list(rejected) == ["b"]  # the first in the order of names is the measure, whatever came first
    assert "site 'b', round 4: it is weighed by 'steps', that of site 'a' by 'examples'" in str(rejected["b"])
    assert aggregator.result().params["w"] == 1


def test_full_and_diff_do_not_mix():
    aggregator = WeightedMean()
    aggregator.add(update("a", {"w": array(1)}))
    aggregator.add(update("b", {"w": array(1)}, params_type="DIFF", current_round=8))
    assert "site 'b', round 9: its params are DIFF, those of site 'a' are FULL" in str(aggregator.fold()["b"])


def test_partials_that_do_not_go_together_are_rejected_and_change_nothing():
    whole, full, diff = WeightedMean(), WeightedMean(), WeightedMean()
    full.add(update("a", {"w": array(2)}))
    diff.add(update("b", {"w": array(1)}, params_type="DIFF"))
    full.fold()
    diff.fold()
    whole.merge(full.partial())
    with pytest.raises(UpdateRejected, match="site 'b' and those summed with it: its params are DIFF"):
        whole.merge(diff.partial())
    assert whole.result().params["w"] == 2


def test_merging_a_partial_of_nothing_changes_nothing():
    whole = WeightedMean()
    whole.merge(WeightedMean().partial())
    assert whole.result().params is None


# Rejections against the reference, whatever the order

REFERENCE = {"w": array(0, 0), "b": array(0)}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"w": array(1, 2)}, ["1 of 2 tensors", "missing", "'b'"]),
        ({}, ["2 of 2 tensors", "missing", "'w'"]),
        ({**REFERENCE, "extra": array(1)}, ["tensor 'extra' is not in the task's model"]),
        ({**REFERENCE, "w": array(1, 2, 3)}, ["tensor 'w' has shape (3,)", "it is (2,)"]),
        ({**REFERENCE, "w": array(1, 2, dtype=np.int32)}, ["tensor 'w' has dtype int32", "it is float32"]),
        ({**REFERENCE, "w": np.array(["1", "2"])}, ["tensor 'w' has dtype str", "no mean"]),
        ({**REFERENCE, "w": b"12"}, ["tensor 'w' has dtype bytes", "no mean"]),
        ({**REFERENCE, "b": 0.5}, ["nested in another way"]),
    ],
)
def test_what_does_not_fit_the_reference_is_rejected_at_once_and_changes_nothing(params, words):
    aggregator = WeightedMean().fresh(FLModel(REFERENCE))
    with pytest.raises(UpdateRejected) as caught:
        aggregator.add(update("north", params))
    for word in ["site 'north'", "round 4", *words]:
        assert word in str(caught.value)
    aggregator.add(update("north", {"w": array(1, 2), "b": array(3)}))
    assert_array_equal(aggregator.result().params["w"], [1, 2])


def test_without_a_reference_the_first_site_in_the_order_of_names_is_the_measure():
    aggregator = WeightedMean()
    aggregator.add(update("b", {"w": array(1, 2, 3)}))
    aggregator.add(update("a", {"w": array(1, 2)}))
    assert "site 'b', round 4: tensor 'w' has shape (3,), in the update of site 'a' it is (2,)" in str(aggregator.fold()["b"])


def test_without_a_reference_the_first_site_by_name_sets_the_dtype():
    updates = [update("b", {"w": array(2)}), update("a", {"w": array(1, dtype=np.float16)})]
    assert combined(WeightedMean(), updates).params["w"].dtype == np.float16


def test_a_wide_float_that_the_sum_cannot_hold_is_an_error():
    aggregator = WeightedMean().fresh(FLModel({"w": array(0)}))
    aggregator.add(update("a", {"w": array(1e300, dtype=np.float64)}))
    with pytest.raises(UpdateRejected, match=r"w.*overflows float32"):
        aggregator.result()


@pytest.mark.parametrize(
    ("by", "meta", "words"),
    [
        ("examples", {}, "its meta has no 'examples'"),
        ("steps", {"examples": 3}, "its meta has no 'steps'"),
        (None, {"examples": 0}, "its weight is 0 examples"),
        (None, {"examples": -1}, "its weight is -1 examples"),
        (None, {"steps": math.nan}, "its weight is nan steps"),
        (None, {"examples": "many"}, "its weight is 'many' examples"),
        (None, {"examples": True}, "its weight is True examples"),
        ({"b": 1.0}, {}, "no weight is given for this site"),
    ],
)
def test_weights_that_cannot_be_used(by, meta, words):
    with pytest.raises(UpdateRejected, match=f"site 'a', round 4: {words}"):
        WeightedMean(by).add(update("a", {"w": array(1)}, meta=meta))


def test_a_site_counts_once():
    aggregator = WeightedMean()
    aggregator.add(update("a", {"w": array(1)}))
    aggregator.fold()
    with pytest.raises(UpdateRejected, match="site 'a', round 4: an update of this site is counted already"):
        aggregator.add(update("a", {"w": array(1)}))


def test_a_failure_is_no_update():
    with pytest.raises(UpdateRejected, match="ValueError: no data"):
        WeightedMean().add(Update("a", TaskId("job", 0, 0, "a"), failure=Failure("ValueError", "no data")))


@pytest.mark.parametrize("bad", ["low", None, 10**400])
def test_a_metric_that_is_no_number(bad):
    with pytest.raises(UpdateRejected, match="site 'a', round 4: metric 'loss' is "):
        WeightedMean().add(update("a", None, metrics={"loss": bad}))


def test_metrics_too_large_for_a_sum_are_left_out():
    updates = [update(site, None, metrics={"loss": 1.7e308, "accuracy": 0.5}) for site in "ab"]
    assert combined(WeightedMean(), updates).metrics == {"accuracy": 0.5}


@pytest.mark.parametrize("bad", ["w", 5, [5], [["w"]], {"w": 1}])
def test_excluded_that_is_no_list_of_names(bad):
    with pytest.raises(UpdateRejected, match=r"site 'a', round 4: meta\["):
        WeightedMean().add(update("a", {"w": array(1)}, meta={"excluded": bad}))


@pytest.mark.parametrize("arguments", [{"by": "size"}, {"by": {"a": 0}}, {"by": {"a": math.inf}}, {"threads": 0}])
def test_wrong_settings(arguments):
    with pytest.raises(ConfigError):
        WeightedMean(**arguments)


# Forms


def test_excluded_names_are_averaged_over_the_sites_that_sent_them():
    updates = [
        update("a", {"w": array(2), "head": array(10)}, meta={"examples": 1}),
        update("b", {"w": array(4)}, meta={"examples": 1, "excluded": ["head", "tail"]}),
        update("c", {"w": array(9), "head": array(50)}, meta={"examples": 3}),
    ]
    for reference in (None, updates[0].model):
        for order in (updates, updates[::-1]):
            result = combined(WeightedMean().fresh(reference), order).params
            assert_array_equal(result["w"], array(6.6))  # (2 + 4 + 27) / 5
            assert result["head"] == 40  # (10 + 150) / 4


def test_names_that_only_the_first_site_excludes_come_from_the_others():
    updates = [update("a", {"w": array(2)}, meta={"excluded": ["head"]}), update("b", {"w": array(4), "head": array(7)})]
    assert combined(WeightedMean(), updates).params == {"w": array(3), "head": array(7)}
    whole = WeightedMean()
    for each in updates:
        part = WeightedMean()
        part.add(each)
        part.fold()
        whole.merge(part.partial())
    assert whole.result().params == {"w": array(3), "head": array(7)}


def test_nested_params_keep_their_form():
    def params(x: float) -> dict[str, Any]:
        return {"coef": [array(x), {"b": F32(x)}], "classes": 3, "name": "linear", "none": None}

    result = combined(WeightedMean(), [update("a", params(1)), update("b", params(3))]).params
    assert result == {"coef": [array(2), {"b": F32(2)}], "classes": 3, "name": "linear", "none": None}


def test_tensors_of_a_nested_model_may_come_by_flat_names():
    reference = FLModel({"net": {"w": array(0), "head": array(0)}})
    aggregator = WeightedMean().fresh(reference)
    updates = [update("a", {"net": {"w": array(1), "head": array(5)}}), update("b", {"net/w": array(3)}, meta={"excluded": ["net/head"]})]
    assert combined(aggregator, updates).params == {"net": {"w": array(2), "head": array(5)}}


def test_tensors_nobody_sent_leave_a_flat_result():
    aggregator = WeightedMean().fresh(FLModel({"net": {"w": array(0), "head": array(0)}}))
    assert combined(aggregator, [update("b", {"net/w": array(3)}, meta={"excluded": ["net/head"]})]).params == {"net/w": array(3)}


def test_bytes_cannot_come_in_as_a_plain_tensor():
    aggregator = WeightedMean().fresh(FLModel({"net": {"w": array(0), "blob": b"1"}}))
    with pytest.raises(UpdateRejected, match="tensor 'net/blob' has dtype uint8"):
        aggregator.add(update("a", {"net/w": array(3), "net/blob": np.zeros(1, np.uint8)}))


def test_it_is_an_aggregator_and_gives_its_result_once():
    aggregator: Aggregator = WeightedMean()
    aggregator.add(update("a", {"w": array(1)}))
    assert aggregator.result() is aggregator.result()
    with pytest.raises(ConfigError, match="fresh"):
        aggregator.add(update("b", {"w": array(1)}))
    assert aggregator.fresh().result().params is None
