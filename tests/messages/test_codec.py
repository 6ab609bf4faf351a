from __future__ import annotations

import io
import json
import math
import os
import struct
import subprocess
import sys
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from hanse.errors import ConfigError, Failure, WireError
from hanse.messages import codec
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Update


def frame_of(model, fields=None):
    return b"".join(codec.encode(model, fields))


def there_and_back(params):
    return codec.decode(frame_of(FLModel(params)))[0].params


def raw_frame(header, data=b""):
    """A frame by hand, from a header as text or as what JSON says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header_of(frame):
    size = int.from_bytes(frame[:8], "little")
    return json.loads(frame[8 : 8 + size])


NAMED = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
UNNAMED = [
    *("complex128", "longdouble", "clongdouble", "M8", "M8[ns]", "M8[25us]", "m8[D]", "m8", "U3", "S5"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "int4", "uint2", "float4_e2m1fn", "float6_e2m3fn"),
]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def sample(dtype, shape=(2, 3)):
    if dtype.kind in "US":
        return np.resize(np.array(["ab", "", "c"]), shape).astype(dtype)
    if dtype.kind in "Mm":
        return np.arange(math.prod(shape)).reshape(shape).astype("i8").view(dtype)
    ones_and_twos = np.arange(math.prod(shape)).reshape(shape) % 2 + (dtype.kind != "b")  # some float8 have no zero
    return ones_and_twos.astype("f4").astype(dtype)


# ------------------------------------------------------------------------------------------------------------------------- the frame


def test_a_small_frame_byte_by_byte():
    frame = frame_of(FLModel({"w": np.array([1.0, -2.0], "<f4"), "n": np.array(3, "<i8")}))
    size = int.from_bytes(frame[:8], "little")
    assert (8 + size) % 64 == 0
    assert frame[8:9] == b"{"
    header = header_of(frame)
    assert list(header) == ["__metadata__", "w", "n"]  # the order of the parameters
    assert header["n"] == {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}  # the data lies by falling alignment
    assert header["w"] == {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    assert frame[8 + size :] == struct.pack("<qff", 3, 1.0, -2.0)


@pytest.mark.parametrize("name", [*NAMED, *UNNAMED])
@pytest.mark.parametrize("shape", [(), (2, 3), (0, 4)], ids=str)
def test_every_dtype_comes_back(name, shape):
    array = sample(dtype_of(name), shape)
    back = there_and_back({"x": array})["x"]
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert np.array_equal(back, array)


def test_long_doubles_carry_no_stray_memory():
    array = np.frombuffer(b"\xff" * 64, np.longdouble).copy()
    array[:] = 1
    assert frame_of(FLModel([array])) == frame_of(FLModel([np.ones(4, np.longdouble)]))


@pytest.mark.parametrize(("name", "stored"), NAMED.items())
def test_dtypes_that_safetensors_names_carry_its_name(name, stored):
    assert header_of(frame_of(FLModel({"x": sample(dtype_of(name))})))["x"]["dtype"] == stored


@pytest.mark.parametrize("name", UNNAMED)
def test_other_dtypes_travel_as_bytes(name):
    dtype = dtype_of(name)
    stored = header_of(frame_of(FLModel({"x": sample(dtype)})))["x"]
    assert (stored["dtype"], stored["shape"]) == ("U8", [2, 3, dtype.itemsize])


@pytest.mark.parametrize("dtype", [">f4", ">c16", ">M8[s]", ">U2", ">i2"])
def test_big_endian_arrays_arrive_in_little_endian(dtype):
    array = sample(np.dtype(dtype))
    back = there_and_back([array])[0]
    assert back.dtype == array.dtype.newbyteorder("<")
    assert np.array_equal(back, array)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12)[::-3],
        np.broadcast_to(np.float32(2), (3, 2)),
        np.asfortranarray(np.arange(6, dtype="i2").reshape(2, 3)),
        np.arange(9).reshape(3, 3)[1:, 1:],
    ],
)
def test_arrays_that_are_not_contiguous_keep_their_values(array):
    assert np.array_equal(there_and_back({"x": array})["x"], array)


@pytest.mark.parametrize(
    "array", [np.zeros(2, [("a", "f4")]), np.zeros(2, "V3"), np.array(["a"], object), np.array(["a"], np.dtypes.StringDType())], ids=repr
)
def test_other_arrays_are_refused_by_name(array):
    with pytest.raises(ConfigError, match=r"layer\.weight"):
        codec.encode(FLModel({"layer.weight": array}))


def test_every_view_is_aligned_in_a_mapped_file(tmp_path):
    kinds = ["int8", "complex128", "float16", "U3", "float64", "bool", "longdouble", "float32", "S5"]
    path = tmp_path / "model.safetensors"
    codec.write(path, FLModel({kind: sample(np.dtype(kind), (3,)) for kind in kinds}))
    params = codec.read(path)[0].params
    assert list(params) == kinds
    assert all(array.flags.aligned for array in params.values())


# -------------------------------------------------------------------------------------------------------------------- memory and files


def test_encoding_shares_the_arrays_memory():
    params = {"big": np.zeros((256, 1024), "f4"), "bf16": np.zeros(8, ml_dtypes.bfloat16), "column": np.zeros((8, 8))[:, 0]}
    header, *pieces = codec.encode(FLModel(params))
    assert len(pieces) == 3
    shared = {name for name, array in params.items() for piece in pieces if np.shares_memory(np.frombuffer(piece, np.uint8), array)}
    assert shared == {"big", "bf16"}
    assert len(header) % 64 == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_decoding_gives_read_only_views_into_the_buffer(kind):
    buffer = kind(frame_of(FLModel({"x": np.arange(5.0)})))
    x = codec.decode(buffer)[0].params["x"]
    assert np.shares_memory(x, np.frombuffer(buffer, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1


def test_reading_maps_the_file_and_replacing_it_keeps_the_old_view(tmp_path):
    path = tmp_path / "model.safetensors"
    codec.write(path, FLModel({"x": np.full(5, 1.0)}))
    old = codec.read(path)[0].params["x"]
    codec.write(str(path), FLModel({"x": np.full(9, 2.0)}))
    assert np.array_equal(old, np.full(5, 1.0))
    assert np.array_equal(codec.read(path)[0].params["x"], np.full(9, 2.0))
    assert not old.flags.writeable
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    codec.write(path, FLModel({"x": np.arange(3)}))
    before = path.read_bytes()
    written = []

    def full_disk(array):
        if written:
            raise OSError("no space left on device")
        written.append(array)
        return memoryview(b"1234")

    monkeypatch.setattr(codec, "_bytes_of", full_disk)
    with pytest.raises(OSError, match="no space"):
        codec.write(path, FLModel({"x": np.arange(3), "y": np.arange(4)}))
    assert written
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


class Trickle(io.RawIOBase):
    """A stream that cannot seek and gives or takes few bytes at a time, as a pipe may."""

    def __init__(self, data=b""):
        self.data = bytearray(data)
        self.asked = 0

    def read(self, size=-1):
        self.asked = max(self.asked, size)
        piece = bytes(self.data[: min(size, 7)])
        del self.data[: len(piece)]
        return piece

    def write(self, piece):
        self.data += piece[:7]
        return min(len(piece), 7)

    def seekable(self):
        return False


def test_writing_to_a_stream_that_takes_a_few_bytes_at_a_time():
    model = FLModel({"x": np.arange(50.0), "empty": np.zeros(0)})
    stream = Trickle()
    codec.write(stream, model)
    assert bytes(stream.data) == frame_of(model)


def test_a_stream_is_read_tensor_by_tensor():
    params = {"a": np.arange(3, dtype="i1"), "t": np.array(["1970-01-02"], "M8[D]"), "w": np.ones((2, 2), "f4"), "none": np.zeros((0, 2))}
    stream = Trickle(frame_of(FLModel(params)) + b"the next frame")
    found = {}
    for name, array in codec.tensors(stream):
        found[name] = array
        assert array.flags.writeable
        left = sum(array.nbytes for name, array in params.items() if name not in found)
        assert len(stream.data) == left + len(b"the next frame")  # nothing is read ahead
    assert list(found) == ["t", "none", "w", "a"]  # the order of the data
    assert all(np.array_equal(found[name], params[name]) for name in params)


def test_a_huge_declared_tensor_is_not_allocated():
    stream = Trickle(raw_frame({"x": entry([1 << 58], 0, 1 << 60)}, bytes(100)))
    with pytest.raises(WireError, match="too early"):
        list(codec.tensors(stream))
    assert stream.asked <= 1 << 20


# ------------------------------------------------------------------------------------------------------------------ the rest of a model


def test_a_whole_model_comes_back():
    model = FLModel(
        params={"w": np.arange(4.0), "optimizer_params/w": np.zeros(1)},
        params_type=ParamsType.DIFF,
        optimizer_params={"m": {"w": np.full(4, 0.5)}, "step": 3},
        metrics={"accuracy": 0.1 + 0.2, "batches": 7},
        start_round=2,
        current_round=5,
        total_rounds=9,
        meta={"examples": 120, "note": "Grüße", "nested": {"a": [1, None, True]}},
    )
    back, fields = codec.decode(frame_of(model, {"any": ["thing"]}))
    assert fields == {"any": ["thing"]}
    assert list(back.params) == list(model.params)
    assert all(np.array_equal(back.params[name], model.params[name]) for name in model.params)
    assert np.array_equal(back.optimizer_params["m"]["w"], model.optimizer_params["m"]["w"])
    assert back.optimizer_params["step"] == 3
    for name in ("params_type", "metrics", "start_round", "current_round", "total_rounds", "meta"):
        assert getattr(back, name) == getattr(model, name)
    assert back.params_type is ParamsType.DIFF
    assert type(back.metrics["batches"]) is int


def test_an_empty_model_comes_back():
    assert codec.decode(frame_of(FLModel()))[0] == FLModel()
    assert there_and_back({}) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 0.1])
def test_metrics_keep_every_bit(value):
    model, fields = codec.decode(frame_of(FLModel(metrics={"m": value}, meta={"m": value}), {"m": value}))
    for back in (model.metrics["m"], model.meta["m"], fields["m"]):
        assert struct.pack("<d", back) == struct.pack("<d", value)


def test_what_holds_a_number_may_be_a_metric():
    metrics = {"np": np.float32(0.5), "int": np.int64(2**60 + 1), "array": np.array(0.25), "torch": torch.tensor(0.75)}
    meta = {"examples": np.int64(3), "balanced": np.bool_(True), "kind": ParamsType.DIFF}
    back = codec.decode(frame_of(FLModel(metrics=metrics, meta=meta)))[0]
    assert back.metrics == {"np": 0.5, "int": 2**60 + 1, "array": 0.25, "torch": 0.75}
    assert back.meta == {"examples": 3, "balanced": True, "kind": "DIFF"}
    assert [type(value) for value in back.meta.values()] == [int, bool, str]


LOOP: dict[str, object] = {}
LOOP["self"] = LOOP


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (FLModel(metrics={"loss": "0.5"}), "loss"),
        (FLModel(metrics={"loss": np.zeros(2)}), "loss"),
        (FLModel(metrics={"loss": None}), "loss"),
        (FLModel(meta={"a": {"b": [1, object()]}}), r"meta\.a\.b\[1\]"),
        (FLModel(meta={"a": {1: 2}}), r"meta\.a: the key 1"),
        (FLModel(meta={"a": np.zeros(3)}), r"meta\.a"),
        (FLModel(meta={"a": np.float64(1).astype(np.longdouble)}), r"meta\.a"),
        (FLModel(meta=LOOP), "holds itself"),
        (FLModel(meta={"a": "\ud800"}), "no JSON form"),
        (FLModel(meta={"a": 10**5000}), "no JSON form"),
        (FLModel({"\ud800": np.zeros(1)}), "no JSON form"),
        (FLModel({"__metadata__": np.zeros(1)}), "__metadata__"),
        (FLModel(meta={"took": np.timedelta64(5, "ns")}), r"meta\.took"),
        (FLModel(optimizer_params=[np.zeros(1)]), "optimizer_params"),
        (FLModel(current_round="3"), "current_round"),
        (FLModel(start_round=0.5), "start_round"),
        (FLModel({"w": torch.zeros(1)}), "'w'"),
    ],
)
def test_what_cannot_travel_is_refused_and_named(model, where):
    with pytest.raises(ConfigError, match=where):
        codec.encode(model)


def test_a_refused_model_writes_nothing(tmp_path):
    with pytest.raises(ConfigError):
        codec.write(tmp_path / "model.safetensors", FLModel(meta={"a": object()}))
    assert os.listdir(tmp_path) == []


def test_tasks_come_back():
    task = Task("train", FLModel({"w": np.ones(2)}, current_round=1), MappingProxyType({"lr": 0.1, "layers": (1, 2)}))
    back = codec.decode_task(b"".join(codec.encode_task(task)))
    assert (back.name, back.config, back.model.current_round) == ("train", {"lr": 0.1, "layers": [1, 2]}, 1)
    assert np.array_equal(back.model.params["w"], np.ones(2))


@pytest.mark.parametrize("failure", [None, Failure("SiteFailed", "no data", "mount it")])
def test_updates_come_back(failure):
    records = (Record("loss", 0.5, 3), Record("lr", None), Record("note", {"a": [1]}, None, "text"), Record("loss", math.inf))
    update = Update("hospital-1", TaskId("job", 1, 2, "hospital-1"), FLModel(meta={"examples": 5}), failure, 1.5, records)
    back = codec.decode_update(b"".join(codec.encode_update(update)))
    assert back == update
    assert isinstance(back.task_id, TaskId)


def test_an_update_with_wrong_types_is_refused_where_it_is_made():
    with pytest.raises(ConfigError, match="task_id"):
        codec.encode_update(Update("a", ("job", "1", 2, "a")))
    with pytest.raises(ConfigError, match="seconds"):
        codec.encode_update(Update("a", TaskId("job", 1, 2, "a"), seconds=-1.0))


TASK_ID = ["job", 1, 0, "a"]
UPDATE = {"kind": "update", "site": "a", "task_id": TASK_ID, "failure": None, "seconds": 0.0, "records": []}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "task"},
        {"site": 3},
        {"site": None},
        {"task_id": "job/1/0/a"},
        {"task_id": TASK_ID[:3]},
        {"task_id": ["job", True, 0, "a"]},
        {"task_id": ["job", 1.0, 0, "a"]},
        {"failure": "it failed"},
        {"failure": {"code": "X"}},
        {"seconds": "1"},
        {"seconds": -1},
        {"records": {}},
        {"records": [{"key": "a"}]},
        {"records": [{"key": "a", "value": 1, "step": 0.5}]},
        {"more": 1},
    ],
    ids=repr,
)
def test_an_update_with_wrong_fields_is_a_wire_error(change):
    assert codec.decode_update(frame_of(FLModel(), UPDATE)).site == "a"
    with pytest.raises(WireError, match="not an update"):
        codec.decode_update(frame_of(FLModel(), {**UPDATE, **change}))


@pytest.mark.parametrize("fields", [{}, {"kind": "update", "name": "train", "config": {}}, {"kind": "task", "name": "train", "config": []}])
def test_a_task_with_wrong_fields_is_a_wire_error(fields):
    with pytest.raises(WireError, match="not a task"):
        codec.decode_task(frame_of(FLModel(), fields))


# ---------------------------------------------------------------------------------------------------------------- safetensors agrees


def test_safetensors_opens_our_files(tmp_path):
    params = {name: sample(dtype_of(name)) for name in NAMED if not hasattr(ml_dtypes, name)} | {"empty": np.zeros((0, 3))}
    path = tmp_path / "model.safetensors"
    codec.write(path, FLModel(params, optimizer_params={"m": np.ones(1)}))
    theirs = safetensors.numpy.load_file(path)
    assert theirs.keys() == {*params, "optimizer_params/m"}
    assert all(np.array_equal(theirs[name], params[name]) and theirs[name].dtype == params[name].dtype for name in params)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["format"] == "pt"


def test_torch_reads_our_bfloat16_and_float8():
    values = np.array([0.5, -1.5, 2.0], "f4")
    kinds = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
    theirs = safetensors.torch.load(frame_of(FLModel({kind: values.astype(dtype_of(kind)) for kind in kinds})))
    for kind, dtype in kinds.items():
        assert theirs[kind].dtype == dtype
        assert theirs[kind].float().tolist() == values.tolist()


def test_we_read_files_of_safetensors():
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2, dtype=torch.bfloat16), "f8": torch.ones(3).to(torch.float8_e4m3fn)}
    model, fields = codec.decode(safetensors.torch.save(tensors, {"format": "pt"}))
    assert fields == {}
    assert model.params.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert model.params[name].astype("f4").tolist() == tensor.float().tolist()
    assert model.params["a"].dtype == ml_dtypes.bfloat16


def test_safetensors_reads_nested_params():
    theirs = safetensors.numpy.load(frame_of(FLModel({"tree": [np.ones(2), b"abc"], "n": 3})))
    assert theirs.keys() == {"tree/0", "tree/1"}
    assert theirs["tree/1"].tobytes() == b"abc"


# ------------------------------------------------------------------------------------------------------------------- hostile bytes

X8 = entry([2], 0, 8)
X8_TEXT = json.dumps(X8).encode()


def with_about(about, header=None, data=b""):
    return raw_frame({"__metadata__": {"hanse": about if isinstance(about, str) else json.dumps(about)}, **(header or {})}, data)


HOSTILE = {
    "empty": (b"", 0),
    "half a length": (b"\x01\x00\x00", 3),
    "header too long": (struct.pack("<Q", 100_000_001), 0),
    "header length of all ones": (b"\xff" * 8, 0),
    "cut in the header": (raw_frame({"x": X8})[:20], 20),
    "cut in the data": (raw_frame({"x": X8}, bytes(7)), None),
    "no header": (raw_frame(b""), 8),
    "not JSON": (raw_frame(b'{"x" 3}'), 13),
    "not an object": (raw_frame(b"[]"), 8),
    "not UTF-8": (raw_frame(b'{"x\xff":3}'), 11),
    "UTF-16": (raw_frame("{}".encode("utf-16")), 8),
    "half a character": (raw_frame(b'{"\\ud800":' + X8_TEXT + b"}", bytes(8)), 8),
    "duplicate name": (
        raw_frame(b'{"x":' + X8_TEXT + b',"x":' + X8_TEXT + b"}", bytes(8)),
        8 + 1 + 3 + 1 + len(json.dumps(X8)) + 1,
    ),
    "duplicate key": (raw_frame(b'{"x":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', bytes(8)), 40),
    "too deep": (raw_frame(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 8),
    "a number of many digits": (raw_frame(b'{"x":' + b"9" * 5000 + b"}"), 8),
    "overlap": (raw_frame({"x": X8, "y": entry([2], 4, 12)}, bytes(12)), 70),
    "the same bytes twice": (raw_frame({"x": X8, "y": X8}, bytes(8)), 70),
    "hole": (raw_frame({"x": X8, "y": entry([2], 9, 17)}, bytes(17)), 70),
    "hole at the start": (raw_frame({"x": entry([2], 4, 12)}, bytes(12)), 9),
    "empty tensor in another": (raw_frame({"x": X8, "y": entry([0], 4, 4)}, bytes(8)), 70),
    "wrong length": (raw_frame({"x": entry([3], 0, 8)}, bytes(8)), 9),
    "falling offsets": (raw_frame({"x": entry([2], 8, 0)}, bytes(8)), 9),
    "huge tensor": (raw_frame({"x": entry([1 << 58], 0, 1 << 60)}, bytes(8)), None),
    "huge offsets": (raw_frame({"x": entry([1 << 70], 0, 1 << 72)}, bytes(8)), 9),
    "product wraps to 8": (raw_frame({"x": entry([1 << 32, 1 << 32, 2], 0, 8)}, bytes(8)), 9),
    "empty, yet beyond NumPy": (raw_frame({"x": entry([0, 1 << 62, 1 << 62], 0, 0)}), None),
    "65 axes": (raw_frame({"x": entry([1] * 65, 0, 4)}, bytes(4)), 9),
    "unknown dtype": (raw_frame({"x": entry([2], 0, 8, "F33")}, bytes(8)), 9),
    "dtype of another kind": (raw_frame({"x": entry([2], 0, 8, 32)}, bytes(8)), 9),
    "NumPy's own dtype": (raw_frame({"x": entry([1], 0, 8, "O")}, bytes(8)), 9),
    "missing key": (raw_frame({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)), 9),
    "extra key": (raw_frame({"x": {**X8, "strides": [0]}}, bytes(8)), 9),
    "entry is null": (raw_frame({"x": None}), 9),
    "boolean of 2": (raw_frame({"x": entry([2], 0, 2, "BOOL")}, b"\x01\x02"), None),
    "metadata is a list": (raw_frame({"__metadata__": []}), 9),
    "metadata holds a number": (raw_frame({"__metadata__": {"a": 1}}), 9),
    "our text is not JSON": (with_about("{"), 9),
    "our text is a list": (with_about([]), 9),
    "our text has half a character": (with_about('{"meta":{"a":"\\ud800"}}'), 9),
    "our text is too deep": (with_about("[" * 100_000), 9),
    "our text has a name twice": (with_about('{"meta":{"a":1,"a":2}}'), 9),
    "unknown field": (with_about({"colour": 1}), 9),
    "params_type": (with_about({"params_type": "HALF"}), 9),
    "metric": (with_about({"metrics": {"a": "1"}}), 9),
    "round": (with_about({"current_round": True}), 9),
    "meta": (with_about({"meta": []}), 9),
    "structure": (with_about({"params": {"tree": ["gone"]}}), 9),
    "optimizer_params": (with_about({"optimizer_params": {"tree": 3}}), 9),
    "label without a tensor": (with_about({"dtypes": {"x": "<c16"}}), 9),
}
LABELLED = {"object": "|O", "structured": "f4,f4", "void": "|V8", "zero step": "<M8[0s]", "empty text": "<U0", "code": "__import__('os')"}
LABELLED |= {
    "long text": "<U999999999",
    "wrong size": "<c16",
    "other long double": "longdouble7",
    "big endian": ">f8",
    "no dtype": "finfo",
}
for _what, _label in LABELLED.items():
    HOSTILE[f"label: {_what}"] = (with_about({"dtypes": {"x": _label}}, {"x": entry([1, 8], 0, 8, "U8")}, bytes(8)), None)
HOSTILE["label: not U8"] = (with_about({"dtypes": {"x": "<M8"}}, {"x": entry([1, 8], 0, 64, "F64")}, bytes(64)), None)
HOSTILE["label: no axis"] = (with_about({"dtypes": {"x": "|S1"}}, {"x": entry([], 0, 1, "U8")}, bytes(1)), None)
HOSTILE["beyond Unicode"] = (with_about({"dtypes": {"x": "<U1"}}, {"x": entry([1, 4], 0, 4, "U8")}, b"\xff" * 4), None)
for _shape in ([-2], [2.0], [True, 2], ["2"], 2, None, [[2]], {"0": 2}):
    HOSTILE[f"shape {_shape}"] = (raw_frame({"x": {**X8, "shape": _shape}}, bytes(8)), 9)
for _offsets in ([-8, 0], [0.0, 8], [False, 8], [0], [0, 4, 8], "08", None):
    HOSTILE[f"offsets {_offsets}"] = (raw_frame({"x": {**X8, "data_offsets": _offsets}}, bytes(8)), 9)


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_are_a_wire_error_at_their_offset(what):
    frame, offset = HOSTILE[what]
    with pytest.raises(WireError) as caught:
        codec.decode(frame)
    assert 0 <= caught.value.offset <= len(frame)
    if offset is not None:
        assert caught.value.offset == offset
    if what not in ("structure", "optimizer_params"):  # which a reader of tensors alone does not look at
        with pytest.raises(WireError) as streamed:
            list(codec.tensors(io.BytesIO(frame)))
        if what not in ("cut in the header", "cut in the data", "huge tensor"):
            assert streamed.value.offset == caught.value.offset


def test_a_cut_frame_says_where_it_ends():
    frame = frame_of(FLModel({"x": np.arange(10.0)}))
    for end in range(len(frame)):
        with pytest.raises(WireError) as caught:
            codec.decode(frame[:end])
        assert caught.value.offset == end
        with pytest.raises(WireError) as caught:
            list(codec.tensors(io.BytesIO(frame[:end])))
        assert caught.value.offset == end


def test_bytes_after_the_frame_are_an_error_where_they_begin():
    frame = frame_of(FLModel({"x": np.arange(10.0)}))
    with pytest.raises(WireError, match="3 bytes follow") as caught:
        codec.decode(frame + b"abc")
    assert caught.value.offset == len(frame)


def test_the_header_limit_is_the_callers_to_lower(tmp_path):
    frame = frame_of(FLModel({"x": np.arange(10.0)}))
    (tmp_path / "frame").write_bytes(frame)
    size = int.from_bytes(frame[:8], "little")
    codec.decode(frame, max_header_bytes=size)
    for read, source in (
        (codec.decode, frame),
        (codec.decode_task, frame),
        (codec.decode_update, frame),
        (codec.read, tmp_path / "frame"),
        (lambda stream, **limit: list(codec.tensors(stream, **limit)), io.BytesIO(frame)),
    ):
        with pytest.raises(WireError, match="the limit is"):
            read(source, max_header_bytes=size - 1)


def test_an_empty_file_is_a_wire_error(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(WireError):
        codec.read(tmp_path / "empty")


def test_ml_dtypes_is_loaded_only_when_it_is_needed():
    program = (
        "import sys, numpy as np; from hanse.messages import codec; from hanse.messages.flmodel import FLModel\n"
        "codec.decode(b''.join(codec.encode(FLModel({'x': np.ones(2)}))))\n"
        "sys.exit('ml_dtypes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
