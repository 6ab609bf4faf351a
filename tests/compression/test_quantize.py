from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_allclose, assert_array_equal

from hanse.compression.quantize import Quantized, quantize
from hanse.errors import ConfigError, UpdateRejected
from hanse.messages.codec import decode, encode

SHAPES = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
FLOATS = arrays(np.float32, SHAPES, elements=st.floats(-(2.0**100), 2.0**100, width=32))


def f32(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def test_eight_bits_by_hand():
    quantized = quantize({"w": f32(127, -63.5, 0.5, 1.5, 2.5, -127)}, 8)  # max / 127 = 1, and halves go to the even neighbour
    assert quantized.scales == {"w": 1.0}
    assert_array_equal(quantized.values["w"], [127, -64, 0, 2, 2, -127])
    assert_array_equal(quantized.restored()["w"], f32(127, -64, 0, 2, 2, -127))
    assert_array_equal(quantized.residual_after({"w": f32(127, -63.5, 0.5, 1.5, 2.5, -127)})["w"], f32(0, 0.5, 0.5, -0.5, 0.5, 0))


def test_four_bits_by_hand():
    quantized = quantize({"w": f32(7, -1, 2.5).reshape(3, 1)}, 4)  # 7 | -1 = 0xF, then 2 | nothing
    assert_array_equal(quantized.values["w"], np.array([0xF7, 0x02], np.uint8))
    assert_array_equal(quantized.restored()["w"], f32(7, -1, 2).reshape(3, 1))


def test_32_bits_leave_the_numbers():
    w = f32(0.1, -3)
    assert_array_equal(quantize({"w": w}, 32, {"w": f32(1, 1)}).restored()["w"], w + 1)
    assert_array_equal(quantize({"w": w}, 32).residual_after({"w": w})["w"], f32(0, 0))


@given(FLOATS, st.sampled_from([4, 8]))
def test_rounding_costs_half_a_step_at_most(w, bits):
    quantized = quantize({"w": w}, bits)
    restored = quantized.restored()["w"]
    assert restored.shape == w.shape
    assert restored.dtype == np.float32
    half = quantized.scales["w"] / 2 or np.abs(w).max(initial=0)
    assert (np.abs(restored.astype(float) - w) <= half * (1 + 1e-4)).all()


@given(FLOATS, st.sampled_from([4, 8, 32]))
def test_it_travels(w, bits):
    sent = quantize({"b": w, "a.weight": w[..., None]}, bits)
    model, _ = decode(b"".join(encode(sent.to_flmodel())))
    received = Quantized.from_flmodel(model)
    assert (received.scales, received.bits, received.shapes) == (sent.scales, sent.bits, sent.shapes)
    for name, array in sent.restored().items():
        assert_array_equal(received.restored()[name], array)


@settings(max_examples=30)
@given(st.sampled_from([4, 8]), st.integers(0, 2**32))
def test_with_feedback_what_was_sent_sums_up_to_what_was_meant(bits, seed):
    rng = np.random.default_rng(seed)
    residual, sent, meant = None, np.zeros(20), np.zeros(20)
    for _ in range(15):
        delta = {"w": rng.normal(size=20).astype(np.float32)}
        quantized = quantize(delta, bits, residual)
        residual = quantized.residual_after(delta, residual)
        sent, meant = sent + quantized.restored()["w"], meant + delta["w"]
    assert_allclose(sent + residual["w"], meant, atol=1e-5)
    assert np.abs(residual["w"]).max() <= quantized.scales["w"] * 0.5001


def test_without_feedback_small_numbers_are_lost_for_ever():
    delta = {"w": f32(1, 0.05)}
    assert quantize(delta, 4).restored()["w"][1] == 0
    residual, sent = None, 0.0
    for _ in range(20):
        quantized = quantize(delta, 4, residual)
        residual = quantized.residual_after(delta, residual)
        sent += float(quantized.restored()["w"][1])
    assert sent == pytest.approx(1, abs=0.08)


def test_numbers_too_small_for_a_scale_stay_in_the_residual():
    w = {"w": f32(1e-45, 0)}
    quantized = quantize(w, 8)
    assert quantized.scales["w"] == 0
    assert_array_equal(quantized.residual_after(w)["w"], w["w"])


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_what_is_not_finite_is_rejected_by_name(worst, bits):
    with pytest.raises(UpdateRejected, match=r"tensor 'w'.*lower the learning rate"):
        quantize({"v": f32(1), "w": f32(1, worst)}, bits)


def test_a_sum_with_the_residual_that_overflows_is_rejected():
    with np.errstate(over="ignore"), pytest.raises(UpdateRejected, match="tensor 'w'"):
        quantize({"w": f32(3e38)}, 8, {"w": f32(3e38)})


def test_wrong_arguments():
    with pytest.raises(ConfigError, match="bits is 2"):
        quantize({}, 2)
    with pytest.raises(ConfigError, match="dtype float64"):
        quantize({"w": np.ones(2)}, 8)
    with pytest.raises(ConfigError, match="its residual"):
        quantize({"w": f32(1, 2)}, 8, {"w": f32(1)})


GOOD = {bits: quantize({"w": f32(1, 2, 3)}, bits) for bits in (4, 8, 32)}


@pytest.mark.parametrize(
    ("bits", "changes", "problem"),
    [
        (8, {"values": {"w": np.zeros(3, np.uint8)}}, "array of int8, not uint8"),
        (8, {"values": {"w": np.zeros(4, np.int8)}}, "shape"),
        (8, {"values": {"w": np.array([0, 0, -128], np.int8)}}, "-128"),
        (8, {"values": {"v": np.zeros(3, np.int8)}}, "different names"),
        (8, {"values": {"w": [1, 2, 3]}}, "not list"),
        (8, {"shapes": {"w": (3, 1)}}, "shape"),
        (8, {"shapes": {}}, "different names"),
        (8, {"scales": {"w": -1.0}}, "scale"),
        (8, {"scales": {"w": float("nan")}}, "scale"),
        (8, {"scales": {"w": 3e38}}, "scale"),
        (8, {"scales": {"w": 0.1}}, "scale"),  # no float32
        (8, {"bits": 4}, "4 bits travel as an array of uint8"),
        (8, {"bits": 5}, "bits|enum"),
        (4, {"shapes": {"w": (5,)}}, "shape"),
        (4, {"shapes": {"w": (-3, -1)}}, "shape"),
        (4, {"values": {"w": np.array([0x11, 0x11], np.uint8)}}, "half byte"),
        (4, {"values": {"w": np.array([0x18, 0x01], np.uint8)}}, "-8"),
        (32, {"scales": {"w": 2.0}}, "scale"),
        (32, {"values": {"w": f32(1, 2, np.nan)}}, "finite"),
    ],
)
def test_decoding_is_strict(bits, changes, problem):
    with pytest.raises(UpdateRejected, match=problem):
        Quantized.from_flmodel(replace(GOOD[bits], **changes).to_flmodel())


def test_other_models_are_no_quantised_differences():
    model = GOOD[8].to_flmodel()
    with pytest.raises(UpdateRejected, match="DIFF"):
        Quantized.from_flmodel(replace(model, params_type="FULL"))
    with pytest.raises(UpdateRejected, match="meta"):
        Quantized.from_flmodel(replace(model, meta={}))
