from __future__ import annotations

from typing import Any

import blake3
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from torch import nn

from hanse.errors import UpdateRejected
from hanse.finetuning.models import load_params, params_of
from hanse.finetuning.points import checked, decode_change, difference, digest_of, encode_change, merged, moved
from hanse.finetuning.training import Trainable
from hanse.messages.codec import decode, encode
from hanse.messages.flmodel import FLModel, ParamsType

BITS = (4, 8, 32)
FINITE = st.floats(-1e6, 1e6, width=32)
SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (3, 1, 2)])
CHANGES = st.dictionaries(
    st.sampled_from(["w", "b", "layer.0.weight", "a/b", "~", "größe"]), SHAPES.flatmap(lambda s: arrays_of.arrays("f4", s, elements=FINITE))
)


def travelled(model: FLModel) -> FLModel:
    """The model as the other party reads it from the wire."""
    found, _ = decode(b"".join(bytes(piece) for piece in encode(model)))
    return found


# ------------------------------------------------------------------------------------------------------------------------------- digests


@given(CHANGES)
def test_the_digest_is_of_the_frame_in_the_order_of_names(arrays: dict[str, np.ndarray]) -> None:
    frame = b"".join(bytes(piece) for piece in encode(FLModel({name: arrays[name] for name in sorted(arrays)})))
    assert digest_of(arrays) == f"blake3:{blake3.blake3(frame).hexdigest()}" == digest_of(dict(reversed(arrays.items())))


def test_the_digest_is_of_names_shapes_types_and_numbers() -> None:
    base = {"w": np.array([1.0, 2.0], np.float32)}
    others = [
        {"v": base["w"]},
        {"w": base["w"].reshape(1, 2)},
        {"w": base["w"].astype(np.float64)},
        {"w": np.array([1.0, -2.0], np.float32)},
        {"w": base["w"], "b": np.zeros(0, np.float32)},
        {},
    ]
    assert len({digest_of(each) for each in (base, *others)}) == 1 + len(others)
    assert digest_of({"w": np.array([0.0], np.float32)}) != digest_of({"w": np.array([-0.0], np.float32)})


# ------------------------------------------------------------------------------------------------------------------------------- merging


def test_merged_by_hand() -> None:
    base = {"w": np.array([[1, 2], [3, 4]], np.float32), "b": np.array([5, 6], np.float32), "n": np.array(7)}
    a, b = np.array([[1, 10]], np.float32), np.array([[2], [3]], np.float32)
    whole = merged(base, {"w.lora_a": a, "w.lora_b": b, "b": np.array([0, 1], np.float32)})
    assert whole.keys() == base.keys()
    assert whole["w"].tolist() == [[3, 22], [6, 34]]
    assert whole["b"].tolist() == [0, 1]
    assert whole["n"] == 7
    assert whole["w"].dtype == np.float32
    assert base["w"].tolist() == [[1, 2], [3, 4]]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32))
def test_merged_is_rank_by_rank_in_float64(rank: int, rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, columns), (rank, columns), (rows, rank)))
    slow = np.empty_like(base)
    for row in range(rows):
        for column in range(columns):
            change = 0.0
            for nth in range(rank):
                change += float(b[row, nth]) * float(a[nth, column])
            slow[row, column] = np.float32(float(base[row, column]) + change)
    assert np.array_equal(merged({"w": base}, {"w.lora_a": a, "w.lora_b": b})["w"], slow)


def test_merged_is_what_torch_computes_for_linear_layers_and_convolutions() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 1))
    trainable = Trainable(module, "lora", rank=2)
    rng = np.random.default_rng(0)
    trainable.load({name: rng.normal(size=array.shape).astype(np.float32) for name, array in trainable.arrays().items()})
    whole = merged(params_of(module), trainable.arrays())
    theirs = trainable.merged()
    assert whole.keys() == theirs.keys()
    for name, array in whole.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-5, atol=1e-6)
    inputs = torch.from_numpy(rng.normal(size=(3, 2, 4, 4)).astype(np.float32))
    expected = trainable(inputs).detach().numpy()
    load_params(module, whole)
    np.testing.assert_allclose(module.eval()(inputs).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------------- differences


@given(CHANGES)
def test_moving_by_a_difference_from_zero_is_exact(after: dict[str, np.ndarray]) -> None:
    before = {name: np.zeros_like(array) for name, array in after.items()}
    change = difference(after, before)
    assert {name: array.shape for name, array in change.items()} == {name: array.shape for name, array in after.items()}
    assert all(np.array_equal(array, after[name]) for name, array in moved(before, change).items())


@pytest.mark.parametrize(
    "change", [{}, {"v": np.zeros(2, "f4")}, {"w": np.zeros(3, "f4")}, {"w": np.zeros(2, "f4"), "v": np.zeros(2, "f4")}]
)
def test_a_difference_of_another_model_moves_nothing(change: dict[str, np.ndarray]) -> None:
    with pytest.raises(UpdateRejected, match="other names or shapes"):
        moved({"w": np.zeros(2, np.float32)}, change)


@pytest.mark.parametrize("bits", BITS)
@given(change=CHANGES)
def test_a_difference_comes_back_within_half_a_step_and_the_rest_is_kept(bits: Any, change: dict[str, np.ndarray]) -> None:
    answer, residual = encode_change(change, bits, None)
    assert answer.params_type is ParamsType.DIFF
    assert answer.meta == {}
    back = decode_change(travelled(answer), change)
    assert back.keys() == residual.keys() == change.keys()
    for name, array in change.items():
        assert back[name].shape == residual[name].shape == array.shape
        assert back[name].dtype == residual[name].dtype == np.float32
        assert np.array_equal(residual[name], array - back[name])
        if bits == 32:
            assert np.array_equal(back[name], array)
        elif array.size:
            step = np.abs(array).max() / (7 if bits == 4 else 127)
            assert np.abs(residual[name]).max() <= step * 0.5001 + 1e-37


@pytest.mark.parametrize("bits", [4, 8])
def test_what_rounding_left_over_is_made_up_for(bits: Any) -> None:
    rng = np.random.default_rng(1)
    changes = [{"w": rng.normal(size=50).astype(np.float32)} for _ in range(40)]
    residual, sent = None, np.zeros(50)
    for change in changes:
        answer, residual = encode_change(change, bits, residual)
        sent += decode_change(answer, change)["w"]
    meant = np.sum([change["w"] for change in changes], axis=0, dtype=np.float64)
    assert residual is not None
    np.testing.assert_allclose(sent + residual["w"], meant, atol=1e-4)
    assert np.abs(residual["w"]).max() < 0.5


# ------------------------------------------------------------------------------------------------------------------------- hostile updates

LIKE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)}
VALUES = {"w": np.ones((2, 3), np.int8), "b": np.ones((), np.int8)}
SCALES = {"w": np.array(0.5, np.float32), "b": np.array(0.25, np.float32)}


def test_a_good_one_is_taken() -> None:
    found = decode_change(FLModel({"bits": 8, "values": VALUES, "scales": SCALES}, ParamsType.DIFF), LIKE)
    assert (found["w"].tolist(), found["b"].tolist()) == ([[0.5] * 3] * 2, 0.25)


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        np.zeros(3, np.float32),
        {"w": np.zeros((2, 3), np.float32)},
        {"bits": 8, "values": VALUES},
        {"bits": 8, "values": VALUES, "scales": SCALES, "more": 1},
        *({"bits": bits, "values": VALUES, "scales": SCALES} for bits in (7, 4, 32, 0, -8, 8.5, True, "8", None, [8])),
        *({"bits": 8, "values": values, "scales": SCALES} for values in (None, [], {}, {"w": VALUES["w"]}, VALUES | {"v": VALUES["b"]})),
        *(
            {"bits": 8, "values": VALUES | {"w": values}, "scales": SCALES}
            for values in (
                np.ones((3, 2), np.int8), np.ones(6, np.int8), np.ones((1, 3), np.int8), np.ones((2, 3), np.float32),
                np.ones((2, 3), np.uint8), np.ones((2, 3), np.int64), np.full((2, 3), -128, np.int8), np.ones((2, 3), bool), 1, "w", None,
            )
        ),
        *({"bits": 8, "values": VALUES, "scales": scales} for scales in (None, 1.0, [], {}, {"w": 1.0}, SCALES | {"v": 1.0})),
        *(
            {"bits": 8, "values": VALUES, "scales": SCALES | {"w": scale}}
            for scale in (
                np.array(np.nan, np.float32), np.array(np.inf, np.float32), np.array(-1, np.float32), np.array(1e39), 0.1, 1e308,
                np.zeros(2, np.float32), np.array(1j), "x", None, 10**400,
            )
        ),
        {"bits": 32, "values": {"w": np.full((2, 3), np.nan, "f4"), "b": np.zeros((), "f4")}, "scales": {"w": 1.0, "b": 1.0}},
        {"bits": 32, "values": {"w": np.ones((2, 3), "f4"), "b": np.zeros((), "f4")}, "scales": {"w": 2.0, "b": 1.0}},
        {"bits": 4, "values": {"w": np.full(3, 0x88, np.uint8), "b": np.zeros(1, np.uint8)}, "scales": SCALES},
        {"bits": 4, "values": {"w": np.zeros(3, np.uint8), "b": np.full(1, 0x10, np.uint8)}, "scales": SCALES},
    ],
)  # fmt: skip
def test_what_is_no_difference_of_this_model_is_rejected(params: Any) -> None:
    with pytest.raises(UpdateRejected):
        decode_change(FLModel(params, ParamsType.DIFF), LIKE)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(width=32) | st.text(max_size=4)
    | arrays_of.arrays(st.sampled_from(["f4", "i1", "u1", "i8", "f8", "c8", "?"]), SHAPES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["w", "b", "bits", "values", "scales"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(
    params=ANYTHING | st.fixed_dictionaries({"bits": st.sampled_from(BITS) | ANYTHING, "values": ANYTHING, "scales": ANYTHING}),
    kind=st.sampled_from(list(ParamsType)),
)
@example(params={"bits": 8, "values": VALUES, "scales": SCALES}, kind=ParamsType.FULL)
def test_whatever_comes_is_rejected_or_a_finite_difference(params: Any, kind: ParamsType) -> None:
    try:
        found = decode_change(FLModel(params, kind), LIKE)
    except UpdateRejected:
        return
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {n: (a.shape, a.dtype) for n, a in LIKE.items()}
    assert all(np.isfinite(array).all() for array in found.values())


def test_arrays_of_this_model_are_taken_as_they_are() -> None:
    assert checked(LIKE, LIKE) is LIKE


@pytest.mark.parametrize(
    "arrays",
    [
        None, [], {}, {"w": LIKE["w"]}, LIKE | {"v": LIKE["b"]},
        *(
            LIKE | {"w": array}
            for array in (
                np.zeros(3, "f4"), np.zeros((1, 3), "f4"), np.zeros((2, 3), "f8"), np.full((2, 3), np.nan, "f4"),
                np.full((2, 3), -np.inf, "f4"), 0.0, "w", None,
            )
        ),
    ],
)  # fmt: skip
def test_other_arrays_are_rejected(arrays: Any) -> None:
    with pytest.raises(UpdateRejected):
        checked(arrays, LIKE)
