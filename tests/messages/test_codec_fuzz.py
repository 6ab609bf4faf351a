"""Whatever the bytes, reading them gives a message or a WireError, and what comes out can be sent on."""

from __future__ import annotations

import io
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanse.errors import Failure, WireError
from hanse.messages import codec
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Update

MODELS = [
    FLModel(),
    FLModel(
        {"w": np.arange(6, dtype="f4").reshape(2, 3), "b": np.array([True, False]), "e": np.zeros((0, 2)), "h": np.ones(3, "f2")},
        metrics={"loss": float("nan"), "n": 3},
        current_round=2,
        meta={"examples": 10, "note": "Grüße"},
    ),
    FLModel(
        {"list": [np.array(["ab", "c"]), (1, 2.5, None)], "raw": b"bytes", "z": np.ones(2, "c16"), "t": np.datetime64("2024-01-01")},
        optimizer_params={"m": {"w": np.ones(2, ml_dtypes.bfloat16)}, "step": 3},
    ),
]
FRAMES = [
    *(b"".join(codec.encode(model, {"a": 1})) for model in MODELS),
    *(b"".join(codec.encode_task(Task("train", model, {"lr": 0.1}))) for model in MODELS),
    *(
        b"".join(codec.encode_update(Update("s", TaskId("j", 1, 2, "s"), model, Failure("A", "b", "c"), 1.5, (Record("k", [1], 2),))))
        for model in MODELS
    ),
]


WAYS = {
    codec.decode: lambda found: codec.encode(*found),
    codec.decode_task: codec.encode_task,
    codec.decode_update: codec.encode_update,
    lambda frame: dict(codec.tensors(io.BytesIO(frame))): lambda found: codec.encode(FLModel(found)),
}


def read_in_every_way(frame: bytes) -> None:
    for read, send_on in WAYS.items():
        failed = None
        try:
            found = read(frame)
        except WireError as error:
            failed = error
        if failed:
            assert 0 <= failed.offset <= len(frame)
            continue
        repr(found)  # touches every value of small arrays
        send_on(found)


@st.composite
def damaged(draw):
    """A valid frame with up to four places changed: bits flipped, bytes replaced, inserted, left out, doubled, or taken from another."""
    frame = bytearray(draw(st.sampled_from(FRAMES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(frame)))
        end = min(len(frame), at + draw(st.integers(0, 40)))
        match draw(st.integers(0, 5)):
            case 0 if at < len(frame):
                frame[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                frame[at:end] = draw(st.binary(max_size=12))
            case 2:
                frame[at:at] = frame[at:end]
            case 3:
                del frame[at:end]
            case 4:
                frame[at:end] = draw(st.sampled_from(FRAMES))[at:end]
            case 5:
                del frame[at:]
    return bytes(frame)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged())
def test_a_damaged_frame_is_a_message_or_a_wire_error(frame):
    read_in_every_way(frame)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100), st.booleans())
def test_random_bytes_are_a_message_or_a_wire_error(data, as_header):
    read_in_every_way(len(data).to_bytes(8, "little") + data if as_header else data)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([2**63, 2**63 - 1, -(2**63), 10**30, 1e999, 0.5, float("nan")])
    | st.sampled_from(["", "F32", "U8", "BOOL", "BF16", "<U2", "<M8[s]", "w", "list/0", "\ud800", "FULL"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["w", "tree", "str", "bytes", "scalar", "dict", "tuple", "dtype", "shape"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """The path of each value in a JSON tree."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def edited(draw):
    """A valid frame whose header, still JSON, has up to three values replaced, left out or added, also inside our own text."""
    frame = draw(st.sampled_from(FRAMES))
    size = int.from_bytes(frame[:8], "little")
    header = json.loads(frame[8 : 8 + size])
    header["__metadata__"]["hanse"] = json.loads(header["__metadata__"]["hanse"])
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(header) if path] or [("x",)]))
        owner = header
        for key in path:
            owner = owner[key]
        match draw(st.integers(0, 5)):
            case 0:
                owner.pop(last, None) if isinstance(owner, dict) else owner.pop(last)
            case 1 if isinstance(owner, dict):
                owner[draw(st.text(max_size=3))] = owner.get(last)
            case _:
                owner[last] = draw(json_values)
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and "hanse" in metadata:
        metadata["hanse"] = json.dumps(metadata["hanse"])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + frame[8 + size :]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edited())
def test_an_edited_header_is_a_message_or_a_wire_error(frame):
    read_in_every_way(frame)


@pytest.mark.parametrize("frame", FRAMES)
def test_the_frames_to_damage_are_valid(frame):
    codec.decode(frame)
    assert [*codec.tensors(io.BytesIO(frame))] or b'"data_offsets"' not in frame
