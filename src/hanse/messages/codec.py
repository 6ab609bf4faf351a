"""Models, tasks and updates as frames that any safetensors reader can open.

    8 bytes     length of the header, unsigned, little endian
    header      JSON in UTF-8: {"__metadata__": {"hanse": "…", …}, tensor name: {"dtype", "shape", "data_offsets": [begin, end]}, …}
    data        the tensors, little endian, C order, without holes; offsets count from here

The header names the tensors in the order of the parameters; the data lies by falling alignment and starts at a multiple of 64 bytes, so
that every view is aligned. All else of a model is one JSON text, the metadata's key "hanse". A dtype that safetensors has no name for
travels as U8 with a last axis of its item size; the text names it. docs/messages.md has the whole form.

Bytes from outside are not trusted: whatever they hold, reading gives a valid message or raises WireError.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np

from hanse.errors import ConfigError, Failure, WireError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import MAX_DEPTH, Array, Json, flatten, unflatten
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Update

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap
DType: TypeAlias = np.dtype[Any]
T = TypeVar("T")

MAX_HEADER_BYTES = 100_000_000
"""The same limit as in the safetensors library."""

_LENGTH_BYTES = 8
_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 20
_METADATA = "__metadata__"
_KEY = "hanse"


# ---------------------------------------------------------------------------------------------------------------------------- writing


def encode(model: FLModel, fields: Mapping[str, Json] | None = None) -> list[Buffer]:
    """The frame as pieces to send one after the other: the header, then one piece a tensor that shares the tensor's memory.

    Only arrays that are not contiguous or not little endian are copied. Do not change the others before the pieces are sent.
    fields: JSON values that travel beside the model.
    Raises ConfigError for what cannot travel, naming where it stands.
    """
    return _encode(model, fields or {}, dict[str, Json])


def write(target: str | os.PathLike[str] | BinaryIO, model: FLModel, fields: Mapping[str, Json] | None = None) -> None:
    """Write the frame, tensor by tensor, to a path or to an open binary file.

    A path is written whole or not at all, and readers that have mapped the old file keep it: the frame goes to a new file beside it,
    which then takes its name. That holds when the process is killed; it is not forced to the disk against a power cut.
    Raises ConfigError as `encode` does, before anything is written.
    """
    header, arrays = _layout(model, fields or {}, dict[str, Json])
    if not isinstance(target, str | os.PathLike):
        _write_to(target, header, arrays)
        return
    path = Path(target)
    part = path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")
    try:
        with part.open("xb") as file:
            _write_to(file, header, arrays)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def encode_task(task: Task) -> list[Buffer]:
    """A task as a frame; see `encode`."""
    return _encode(task.model, {"kind": "task", "name": task.name, "config": task.config}, _TaskFields)


def encode_update(update: Update) -> list[Buffer]:
    """An update as a frame; see `encode`."""
    failure, records = update.failure, update.records
    fields = {
        "kind": "update",
        "site": update.site,
        "task_id": update.task_id,
        "failure": failure and {"code": failure.code, "message": failure.message, "hint": failure.hint},
        "seconds": update.seconds,
        "records": [{"key": r.key, "value": r.value, "step": r.step, "kind": r.kind} for r in records],
    }
    return _encode(update.model, fields, _UpdateFields)


def _encode(model: FLModel, fields: Mapping[str, Json], schema: Any) -> list[Buffer]:
    header, arrays = _layout(model, fields, schema)
    return [header, *map(_bytes_of, arrays)]


def _layout(model: FLModel, fields: Mapping[str, Json], schema: Any) -> tuple[bytes, list[Array]]:
    """The padded header with its length in front, and the arrays in the order of the data. schema: the type of the fields."""
    arrays, structure = flatten(model.params)
    about: dict[str, Json] = {
        "params": structure,
        "params_type": model.params_type,
        "metrics": {name: _number(value, name) for name, value in model.metrics.items()},
        "start_round": model.start_round,
        "current_round": model.current_round,
        "total_rounds": model.total_rounds,
        "meta": model.meta,
        "fields": fields,
    }
    about = {name: _plain(value, name) if name != "params" else value for name, value in about.items()}
    if not isinstance(model.optimizer_params, Mapping):
        raise ConfigError(f"optimizer_params is a {type(model.optimizer_params).__name__}: it must be a mapping")
    if model.optimizer_params:
        moments, about["optimizer_params"] = flatten(model.optimizer_params)
        about["optimizer_prefix"] = prefix = _free_prefix(arrays)
        arrays.update((prefix + name, array) for name, array in moments.items())
    if _METADATA in arrays:
        raise ConfigError(f"params: a tensor cannot be named {_METADATA!r}, safetensors keeps that name for itself. Give it another name.")

    stored = {name: _stored(array.dtype, name) for name, array in arrays.items()}
    about["dtypes"] = {name: how.label for name, how in stored.items() if how.label}
    in_data = sorted(arrays, key=lambda name: -stored[name].dtype.alignment)
    offsets, end = {}, 0
    for name in in_data:
        begin, end = end, end + arrays[name].nbytes
        offsets[name] = [begin, end]
    try:
        msgspec.convert(about, _About)
        msgspec.convert(about["fields"], schema)
        # Some readers, transformers among them, open only files that say "pt": arrays shaped as PyTorch shapes them.
        header: dict[str, Json] = {_METADATA: {"format": "pt", _KEY: _dumps(about)}}
        for name, array in arrays.items():
            how = stored[name]
            shape = (*array.shape, array.itemsize) if how.label else array.shape
            header[name] = {"dtype": how.name, "shape": shape, "data_offsets": offsets[name]}
        text = msgspec.json.encode(header)
    except msgspec.ValidationError as error:
        raise ConfigError(f"a field of the model, task or update has the wrong type: {error}") from error
    except (UnicodeEncodeError, ValueError) as error:
        raise ConfigError(f"a name, text or number of the message has no JSON form: {error}") from error
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ConfigError(f"the header takes {len(text):,} bytes, above {MAX_HEADER_BYTES:,}. Send large values as arrays in params.")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, [arrays[name] for name in in_data]


def _free_prefix(names: Mapping[str, Any]) -> str:
    """One that no parameter's name starts with, so that the two kinds of tensors are told apart by it."""
    prefix = "optimizer_params/"
    while any(name.startswith(prefix) for name in names):
        prefix = "_" + prefix
    return prefix


def _bytes_of(array: Array) -> memoryview:
    """Shape (nbytes,), little endian, C order; a view where the array lies so already."""
    if array.dtype.byteorder not in "=|<":
        array = array.astype(array.dtype.newbyteorder("<"))
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if array.dtype.type in _LONG_DOUBLES and np.finfo(np.longdouble).nmant == 63:  # 10 bytes, then 6 of whatever was in memory
        data = data.copy()
        data.reshape(-1, np.dtype(np.longdouble).itemsize)[:, 10:] = 0
    return data.data


def _write_to(file: BinaryIO, header: bytes, arrays: list[Array]) -> None:
    _write_whole(file, memoryview(header))
    for array in arrays:
        _write_whole(file, _bytes_of(array))


def _write_whole(file: BinaryIO, piece: memoryview) -> None:
    while piece.nbytes:
        written = file.write(piece)  # an unbuffered file may take only a part
        if not written:
            raise BlockingIOError(f"{file!r} takes no bytes; open it in blocking mode")
        piece = piece[written:]


_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_JSON_SCALARS = frozenset((str, int, float, bool, type(None)))


def _plain(value: Any, path: str, depth: int = 0) -> Json:
    """`value` made of dict, list, str, int, float, bool and None alone. Raises ConfigError naming the path."""
    if type(value) in _JSON_SCALARS:
        return value
    if depth > MAX_DEPTH:
        raise ConfigError(f"{path[:80]}…: nested deeper than {MAX_DEPTH} containers, or a container holds itself")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{path}: the key {key!r} is a {type(key).__name__}. Keys must be strings.")
        return {str.__str__(key): _plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, np.generic) and value.dtype.kind in "biufU" and type(value.item()) in _JSON_SCALARS:
        return value.item()
    if isinstance(value, str):  # subclasses, such as those of enum
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise ConfigError(f"{path}: a {type(value).__module__}.{type(value).__name__} is not a JSON value. Send arrays in params.")


def _number(value: Any, name: str) -> float:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int | float):
        return value
    try:
        return float(value.__float__())  # what holds one number, such as an array of shape ()
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"metrics: {name!r} is a {type(value).__name__}, it must be a number") from error


# ---------------------------------------------------------------------------------------------------------------------------- reading


def decode(buffer: Buffer, *, max_header_bytes: int = MAX_HEADER_BYTES, writable: bool = False) -> tuple[FLModel, dict[str, Json]]:
    """The model and the fields in a whole frame. Its arrays are views into `buffer` and keep it alive; read-only, unless `writable`.

    Frames of other safetensors writers are read too: their tensors become the params, their metadata is left out.
    Raises WireError, naming the offset. The offset of what is wrong with a tensor is that of its name in the header.
    """
    view = (memoryview(buffer) if writable else memoryview(buffer).toreadonly()).cast("B")
    size = _header_bytes(view[:_LENGTH_BYTES], max_header_bytes)
    base = _LENGTH_BYTES + size
    if len(view) < base:
        raise WireError(f"the frame ends inside its header of {size:,} bytes", offset=len(view))
    header = _parse(bytes(view[_LENGTH_BYTES:base]))
    if len(view) < base + header.data_bytes:
        raise WireError(f"the frame ends inside its {header.data_bytes:,} bytes of data", offset=len(view))
    if len(view) > base + header.data_bytes:
        raise WireError(f"{len(view) - base - header.data_bytes:,} bytes follow the last tensor", offset=base + header.data_bytes)

    arrays = {tensor.name: _array(tensor, view, base + tensor.begin, base + tensor.begin) for tensor in header.tensors}
    about, offset, moments = header.about, header.about_offset, {}
    if prefix := about.optimizer_prefix:
        moments = {name.removeprefix(prefix): arrays.pop(name) for name in [*arrays] if name.startswith(prefix)}
    optimizer_params = unflatten(moments, about.optimizer_params, offset=offset)
    if not isinstance(optimizer_params, dict):
        raise WireError(f"optimizer_params is a {type(optimizer_params).__name__}, it must be a dictionary", offset=offset)
    model = FLModel(
        params=unflatten(arrays, about.params, offset=offset),
        params_type=about.params_type,
        optimizer_params=optimizer_params,
        metrics=about.metrics,
        start_round=about.start_round,
        current_round=about.current_round,
        total_rounds=about.total_rounds,
        meta=about.meta,
    )
    return model, about.fields


def read(path: str | os.PathLike[str], *, max_header_bytes: int = MAX_HEADER_BYTES) -> tuple[FLModel, dict[str, Json]]:
    """As `decode`, of a file. The file is mapped: a tensor's pages are read when they are touched, and shared among processes."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return decode(b"", max_header_bytes=max_header_bytes)
        return decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), max_header_bytes=max_header_bytes)


def tensors(stream: BinaryIO, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Iterator[tuple[str, Array]]:
    """Name and array of each tensor of a frame, as they arrive, in the order of the data; the stream need not be seekable.

    Names are those in the header. Each array owns its memory, which grows with the bytes that come, never with the size that is
    declared. Nothing is read beyond the frame's end. Raises WireError, as `decode` does, when it comes to what is wrong.
    """
    size = _header_bytes(_read(stream, _LENGTH_BYTES, 0), max_header_bytes)
    header = _parse(_read(stream, size, _LENGTH_BYTES))
    base = _LENGTH_BYTES + size
    for tensor in sorted(header.tensors, key=_extent):
        yield tensor.name, _array(tensor, _read(stream, tensor.end - tensor.begin, base + tensor.begin), 0, base + tensor.begin)


def decode_task(buffer: Buffer, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Task:
    """The task in a frame of `encode_task`. Raises WireError, also where the frame holds something else."""
    model, fields = decode(buffer, max_header_bytes=max_header_bytes)
    task = _convert(fields, _TaskFields, "not a task", _LENGTH_BYTES)
    return Task(task.name, model, task.config)


def decode_update(buffer: Buffer, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Update:
    """The update in a frame of `encode_update`. Raises WireError, also where the frame holds something else."""
    model, fields = decode(buffer, max_header_bytes=max_header_bytes)
    update = _convert(fields, _UpdateFields, "not an update", _LENGTH_BYTES)
    return Update(update.site, update.task_id, model, update.failure, update.seconds, update.records)


class _About(msgspec.Struct, forbid_unknown_fields=True):
    """The text under the key "hanse": an FLModel without its arrays. `params` and `optimizer_params` are structures of `flatten`."""

    params: Json = None
    params_type: ParamsType = ParamsType.FULL
    optimizer_params: Json = None
    optimizer_prefix: str = ""
    dtypes: dict[str, str] = {}
    metrics: dict[str, bool | int | float] = {}
    start_round: int = 0
    current_round: int | None = None
    total_rounds: int | None = None
    meta: dict[str, Json] = {}
    fields: dict[str, Json] = {}


class _TaskFields(msgspec.Struct, forbid_unknown_fields=True):
    kind: Literal["task"]
    name: str
    config: dict[str, Json]


class _UpdateFields(msgspec.Struct, forbid_unknown_fields=True):
    kind: Literal["update"]
    site: str
    task_id: TaskId
    failure: Failure | None
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    records: tuple[Record, ...]


_Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor as the header has it."""

    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=64)]
    data_offsets: tuple[_Size, _Size]


class _Tensor(NamedTuple):
    """An entry that has been checked.

    dtype, shape: of the array, not of the U8 it may travel as. begin, end: bytes from the start of the data.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


class _Header(NamedTuple):
    tensors: list[_Tensor]
    data_bytes: int
    about: _About
    about_offset: int


def _header_bytes(prefix: Buffer, limit: int) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise WireError(f"the frame ends inside the {_LENGTH_BYTES} bytes of its header's length", offset=len(prefix))
    size = int.from_bytes(prefix, "little")
    if size > limit:
        raise WireError(f"a header of {size:,} bytes is declared, the limit is {limit:,}", offset=0)
    return size


def _read(stream: BinaryIO, size: int, offset: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        piece = stream.read(min(size - len(data), _CHUNK_BYTES))
        if not piece:
            raise WireError(f"the stream ends, {size - len(data):,} bytes too early", offset=offset + len(data))
        data += piece
    return data


def _parse(raw: bytes | bytearray) -> _Header:
    """The header's JSON, checked: after this every tensor's bytes are known to lie in the data, which has no holes or overlaps."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise WireError(f"the header is not UTF-8: {error.reason}", offset=_LENGTH_BYTES + error.start) from None
    entries = _loads(text)
    if not isinstance(entries, dict):
        raise WireError(f"the header is a JSON {type(entries).__name__}, not an object", offset=_LENGTH_BYTES)

    about_offset = _offset(text, _METADATA)
    about = _about(entries.pop(_METADATA, None), about_offset)
    labels = dict(about.dtypes)
    found = []
    for name, entry in _entries(entries, text).items():
        try:
            found.append(_tensor(name, entry, labels.pop(name, None)))
        except _BadTensor as error:
            raise WireError(f"tensor {name!r}: {error}", offset=_offset(text, name)) from None
    if labels:
        raise WireError(f"a dtype is given for {next(iter(labels))!r}, which is not there", offset=about_offset)
    end = 0
    for tensor in sorted(found, key=_extent):
        if tensor.begin != end:
            what = "there is a hole before it" if tensor.begin > end else "it overlaps the tensor before it"
            raise WireError(f"tensor {tensor.name!r}: {what}, at byte {end:,} of the data", offset=_offset(text, tensor.name))
        end = tensor.end
    return _Header(found, end, about, about_offset)


def _about(metadata: Json, offset: int) -> _About:
    if metadata is None:
        return _About()
    metadata = _convert(metadata, dict[str, str], "the metadata", offset)
    if _KEY not in metadata:
        return _About()
    return _convert(_loads(metadata[_KEY], offset), _About, f"the metadata's key {_KEY!r}", offset)


def _entries(entries: Json, text: str) -> dict[str, _Entry]:
    try:
        return msgspec.convert(entries, dict[str, _Entry])
    except msgspec.ValidationError:  # which does not say the name
        return {name: _convert(entry, _Entry, f"tensor {name!r}", _offset(text, name)) for name, entry in entries.items()}


class _BadTensor(ValueError):
    """Caught in `_parse`, which knows the offset."""


def _tensor(name: str, entry: _Entry, label: str | None) -> _Tensor:
    shape, (begin, end) = entry.shape, entry.data_offsets
    if label is None:
        dtype = _named(entry.dtype)
    else:
        dtype = _labelled(label)
        if entry.dtype != "U8" or not shape or shape.pop() != dtype.itemsize:
            raise _BadTensor(f"a tensor of {label} must travel as U8 with a last axis of {dtype.itemsize}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise _BadTensor(f"shape {shape} of {dtype} does not take the {end - begin:,} bytes of its data_offsets")
    return _Tensor(name, dtype, tuple(shape), begin, end)


def _extent(tensor: _Tensor) -> tuple[int, int]:
    return tensor.begin, tensor.end


def _array(tensor: _Tensor, data: Buffer, start: int, offset: int) -> Array:
    """A view of `data` from byte `start`; `offset` is where that is in the frame."""
    try:
        array: Array = np.ndarray(tensor.shape, tensor.dtype, data, start)
    except ValueError as error:  # shapes that NumPy cannot hold, such as (0, 2⁶², 2⁶²)
        raise WireError(f"tensor {tensor.name!r}: {error}", offset=offset) from error
    # NumPy trusts memory to hold these two and may crash where it does not.
    if tensor.dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise WireError(f"tensor {tensor.name!r}: a boolean is neither 0 nor 1", offset=offset)
    if tensor.dtype.kind == "U" and array.size and array.reshape(-1).view("<u4").max() > 0x10FFFF:
        raise WireError(f"tensor {tensor.name!r}: a character is beyond Unicode", offset=offset)
    return array


def _convert(value: Json, to: type[T], what: str, offset: int) -> T:
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        raise WireError(f"{what}: {error}", offset=offset) from None


class _Duplicate(ValueError):
    """Caught in `_loads`, which knows the offset."""


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Duplicate(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _loads(text: str, quoted_at: int | None = None) -> Json:
    """JSON, in which NaN and Infinity are numbers. quoted_at: where a text stands that is itself a string in the header."""
    try:
        value = _JSON.decode(text)
        if "\\u" in text:  # escapes may spell half a character, which UTF-8 cannot
            _dumps(value).encode()
        return value
    except _Duplicate as error:
        what, offset = f"the name {error.args[0]!r} occurs twice", _offset(text, error.args[0])
    except json.JSONDecodeError as error:
        what, offset = f"this is not JSON: {error.msg}", _LENGTH_BYTES + len(text[: error.pos].encode(errors="replace"))
    except (ValueError, RecursionError) as error:  # half a character; a number of too many digits; too deep
        what, offset = f"this JSON cannot be read: {error}", _LENGTH_BYTES
    raise WireError(what, offset=offset if quoted_at is None else quoted_at)


def _offset(text: str, name: str) -> int:
    """Where `name` stands in the header, in bytes from the frame's start; the header's start if it is written in another way."""
    return _LENGTH_BYTES + len(text[: max(text.rfind(_dumps(name)), 0)].encode(errors="replace"))


# ----------------------------------------------------------------------------------------------------------------------------- dtypes


_NUMPY = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_LONG_DOUBLES = (np.longdouble, np.clongdouble)
_NAMES = {dtype: name for name, dtype in _NUMPY.items()}
_ML_NAMES = {kind: name for name, kind in _ML_DTYPES.items()}
_ML_LABEL = re.compile(r"bcomplex32|complex32|float8_e[34]m[34](b11fnuz)?|float6_e[23]m[23]fn|float4_e2m1fn|u?int[124]")
_NUMPY_LABEL = re.compile(r"<c16|<[Mm]8(\[([1-9][0-9]{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?|<U[1-9][0-9]{0,8}|\|S[1-9][0-9]{0,8}")


class _Stored(NamedTuple):
    """How arrays of a dtype travel. name: safetensors' dtype. label: the real dtype where that is U8 in its place, else empty."""

    name: str
    label: str
    dtype: DType


def _stored(dtype: DType, tensor: str) -> _Stored:
    if how := _how(dtype):
        return how
    raise ConfigError(f"params at {tensor!r}: an array of dtype {dtype} cannot travel. Convert it to numbers, or to fixed-width strings.")


@lru_cache(256)
def _how(dtype: DType) -> _Stored | None:
    dtype = dtype.newbyteorder("<")
    if name := _NAMES.get(dtype):
        return _Stored(name, "", dtype)
    if dtype.type.__module__ == "ml_dtypes":
        name = _ML_NAMES.get(dtype.name)
        if name:
            return _Stored(name, "", dtype)
        return _Stored("U8", dtype.name, dtype) if _ML_LABEL.fullmatch(dtype.name) else None
    if dtype.type in _LONG_DOUBLES:
        return _Stored("U8", _long_double(dtype.kind), dtype)
    return _Stored("U8", dtype.str, dtype) if _NUMPY_LABEL.fullmatch(dtype.str) else None


def _long_double(kind: str) -> str:
    """Machines differ in what a long double is; those with the same number of bits in its fraction agree."""
    return f"{'clongdouble' if kind == 'c' else 'longdouble'}{np.finfo(np.longdouble).nmant}"


def _named(name: str) -> DType:
    if dtype := _NUMPY.get(name):
        return dtype
    if kind := _ML_DTYPES.get(name):
        return _ml_dtype(kind)
    raise _BadTensor(f"the dtype {name[:40]!r} is unknown")


def _labelled(label: str) -> DType:
    if _NUMPY_LABEL.fullmatch(label):
        with contextlib.suppress(TypeError, ValueError):  # strings longer than NumPy allows
            return np.dtype(label)
    if _ML_LABEL.fullmatch(label):
        return _ml_dtype(label)
    for long_double in _LONG_DOUBLES:
        if label == _long_double(np.dtype(long_double).kind):
            return np.dtype(long_double)
    raise _BadTensor(f"the dtype {label[:40]!r} is unknown on this machine")


def _ml_dtype(kind: str) -> DType:
    import ml_dtypes  # here, because most models do not need it

    try:
        dtype: DType = np.dtype(getattr(ml_dtypes, kind))
    except AttributeError:
        raise _BadTensor(f"the dtype {kind!r} is unknown to ml_dtypes {ml_dtypes.__version__}") from None
    return dtype
