from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hanse.aggregation.mean import WeightedMean
from hanse.errors import ConfigError, UpdateRejected
from hanse.filters import CastTo, ClipNorm, Exclude, Filter, Filters, GaussianNoise, apply
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Update
from hanse.seeds import generator

F32 = np.float32
ALL: list[Filter] = [Exclude(["head.*"]), ClipNorm(1.0), GaussianNoise(0.5), CastTo("float16")]


def run(filters: Any, model: FLModel, reference: FLModel | None = None) -> FLModel:
    filters = filters if isinstance(filters, list) else [filters]
    return apply(filters, model, reference=reference or FLModel(), rng=lambda: generator(1, "filters"))


def params() -> dict[str, np.ndarray]:
    return {"body.w": np.array([3, 4], F32), "head.w": np.array(12, F32), "n": np.array([7])}


@pytest.mark.parametrize("each", ALL)
def test_no_filter_changes_its_input_or_what_it_does_not_filter(each):
    model = FLModel(params(), "DIFF", meta={"examples": 5}, current_round=2, metrics={"loss": 0.5})
    after = run(each, model)
    for name, array in params().items():
        assert_array_equal(model.params[name], array)
    assert model.meta == {"examples": 5}
    assert after.params["n"] is model.params["n"]
    assert (after.params_type, after.current_round, after.metrics, after.meta["examples"]) == ("DIFF", 2, {"loss": 0.5}, 5)
    assert any(name not in after.params or after.params[name].tobytes() != model.params[name].tobytes() for name in ("body.w", "head.w"))


@pytest.mark.parametrize("each", ALL)
def test_a_model_without_params_passes(each):
    model = FLModel(metrics={"loss": 0.5})
    assert run(each, model).params is None


@pytest.mark.parametrize("each", ALL[1:])
def test_nested_params_keep_their_form(each):
    model = FLModel({"net": [np.array(30, F32)], "k": 3, "blob": b"\x00\xff"}, "DIFF")
    after = run(each, model).params
    assert isinstance(after["net"][0], np.ndarray)
    assert after["net"][0].shape == ()
    assert (after["k"], after["blob"]) == (3, b"\x00\xff")


def test_exclude_lists_what_it_left_out():
    after = run(Exclude(["head.*", "?"]), FLModel(params(), meta={"examples": 3}))
    assert list(after.params) == ["body.w"]
    assert after.meta == {"examples": 3, "excluded": ["head.w", "n"]}


def test_exclude_adds_to_what_was_left_out_and_knows_the_names_of_the_reference():
    after = run([Exclude(["n"]), Exclude(["head.*"])], FLModel({"n": np.array(1), "body.w": np.ones(2)}), FLModel(params()))
    assert list(after.params) == ["body.w"]
    assert after.meta["excluded"] == ["head.w", "n"]


def test_exclude_makes_nested_params_flat():
    after = run(Exclude(["net/head"]), FLModel({"net": {"w": np.ones(1), "head": np.ones(1)}}))
    assert list(after.params) == ["net/w"]


def test_exclude_leaves_a_model_without_a_match_as_it_is():
    model = FLModel({"net": {"w": np.ones(1)}})
    assert run(Exclude(["HEAD*"]), model) is model


def test_clip_scales_a_diff_over_all_float_tensors():
    after = run(ClipNorm(6.5), FLModel(params(), "DIFF"))  # √(9 + 16 + 144) = 13
    assert_array_equal(after.params["body.w"], [1.5, 2])
    assert after.params["head.w"] == 6
    assert after.params["n"] == 7


def test_clip_of_a_full_model_scales_its_change():
    reference = FLModel({"w": np.array([10, 10], F32), "n": np.array(1)})
    after = run(ClipNorm(2.5), FLModel({"w": np.array([13, 14], F32), "n": np.array(5)}), reference)
    assert_array_equal(after.params["w"], [11.5, 12])
    assert after.params["n"] == 5
    assert after.params_type == "FULL"


def test_clip_of_a_short_change_keeps_the_bits():
    model = FLModel({"w": np.array([0.1], F32)})
    assert run(ClipNorm(1.0), model, FLModel({"w": np.array([0.3], F32)})).params["w"] is model.params["w"]


def test_clip_of_a_full_model_needs_the_reference():
    with pytest.raises(ConfigError, match=r"tensor 'body\.w'"):
        run(ClipNorm(1.0), FLModel(params()))


def test_clip_of_nan_is_rejected():
    with pytest.raises(UpdateRejected, match="tensor 'w'"):
        run(ClipNorm(1.0), FLModel({"w": np.array([math.nan])}, "DIFF"))


def test_noise_does_not_depend_on_the_order_of_tensors():
    a = run(GaussianNoise(1.0), FLModel(params()))
    b = run(GaussianNoise(1.0), FLModel(dict(reversed(params().items()))))
    assert list(a.params) == list(params())
    assert list(b.params) == list(params())[::-1]
    for name in params():
        assert_array_equal(a.params[name], b.params[name])


def test_two_filters_of_one_edge_do_not_draw_the_same_noise():
    zeros = FLModel({"w": np.zeros(4, F32)})
    once = run(GaussianNoise(1.0), zeros).params["w"]
    twice = run([GaussianNoise(1.0), GaussianNoise(1.0)], zeros).params["w"]
    assert (twice - once != once).all()


def test_filters_run_in_order():
    big = FLModel({"w": np.array([1e5], F32)}, "DIFF")
    assert run([ClipNorm(1.0), CastTo("float16")], big).params["w"].dtype == np.float16
    with pytest.raises(UpdateRejected, match="overflow float16"):
        run([CastTo("float16"), ClipNorm(1.0)], big)


def test_no_filters_no_change():
    model = FLModel(params())
    assert run([], model) is model


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("undo", [True, False])
def test_what_filters_send_the_mean_takes(dtype, undo):
    reference = FLModel(params())
    mean = WeightedMean().fresh(reference)
    for site, scale in (("a", 1), ("b", 3)):
        sent = run([Exclude(["head.*"]), CastTo(dtype)], FLModel({name: scale * array for name, array in params().items()}), reference)
        assert sent.params["body.w"].dtype in (np.float16, ml_dtypes.bfloat16)
        mean.add(Update(site, TaskId("job", 0, 0, site), run(CastTo("float32"), sent) if undo else sent))
    result = mean.result().params
    assert_array_equal(result["body.w"], [6, 8])
    assert result["body.w"].dtype == F32
    assert "head.w" not in result


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exclude("head.*"),
        lambda: Exclude([]),
        lambda: Exclude([""]),
        lambda: ClipNorm(0),
        lambda: ClipNorm(math.inf),
        lambda: GaussianNoise(0),
        lambda: GaussianNoise(math.nan),
        lambda: CastTo("int8"),
        lambda: Filters(site_out=ClipNorm(1.0)),
        lambda: Filters(server_in=["clip"]),
    ],
)
def test_wrong_settings(make):
    with pytest.raises(ConfigError):
        make()


def test_filters_are_frozen_and_compare_by_value():
    assert Filters(site_out=[ClipNorm(1.0), Exclude(["a"])]) == Filters(site_out=(ClipNorm(1.0), Exclude(("a",))))
    assert Filters().server_in == ()
