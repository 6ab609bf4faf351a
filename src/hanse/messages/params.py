"""Parameters of any shape as named arrays, and back.

A flat mapping of names to arrays, as `state_dict()` gives, stays what it is: names, order and memory untouched, and its structure is
None. Anything else becomes named arrays and a structure, one JSON value that says how to put them together: `{"tree": node}`, where

    params                      node                        tensor
    number, bool, None          itself                      -
    str                         {"str": "…"}                -
    list                        [node, …]                   those of its items
    tuple                       {"tuple": [node, …]}        those of its items
    mapping with str keys       {"dict": {key: node, …}}    those of its values
    array                       "name"                      the array
    NumPy scalar                {"scalar": "name"}          an array of shape ()
    bytes, bytearray            {"bytes": "name"}           uint8, shape (length,)

A tensor in a tree is named by its path, written as JSON Pointer (RFC 6901) writes it but without the first slash: keys and indices
joined by "/", with "~" in a key as "~0" and "/" as "~1". So no two leaves share a name: `{"a/b": x, "a": {"b": y}}` has "a~1b" and "a/b".

What comes back is plain: any mapping is a dict, a named tuple is a tuple, a bytearray is bytes, np.str_ and np.bytes_ are str and bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from hanse.errors import ConfigError, WireError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Json: TypeAlias = Any

MAX_DEPTH = 64
"""How many containers may hold one another."""


def flatten(params: Any) -> tuple[dict[str, Array], Json]:
    """The arrays in `params` by name, not copied, and the structure that `unflatten` needs; None for a flat mapping.

    Raises ConfigError, naming the path, for what has no form: other objects, arrays of objects, masked arrays, keys that are not strings.
    """
    if isinstance(params, Mapping) and all(isinstance(name, str) and isinstance(leaf, np.ndarray) for name, leaf in params.items()):
        return {name: _checked(leaf, name) for name, leaf in params.items()}, None
    arrays: dict[str, Array] = {}
    return arrays, {"tree": _flatten(params, (), arrays)}


def size_bytes(params: Any) -> int:
    """Bytes of all arrays in `params`."""
    return sum(array.nbytes for array in flatten(params)[0].values())


def unflatten(arrays: Mapping[str, Array], structure: Json, *, offset: int = 0) -> Any:
    """What `flatten` was given. Arrays are not copied, bytes are.

    offset: where in its frame the structure stands.
    Raises WireError, at `offset`, for a structure that `flatten` does not write or that does not use each of the arrays once.
    """
    if structure is None:
        return dict(arrays)
    left = dict(arrays)
    try:
        params = _unflatten(_only(structure, "tree"), left, 0)
    except _BadStructure as error:
        raise WireError(f"the structure of the parameters is wrong: {error}", offset=offset) from None
    if left:
        raise WireError(f"the structure of the parameters leaves out tensor {next(iter(left))!r}", offset=offset)
    return params


def _flatten(value: Any, path: tuple[str, ...], arrays: dict[str, Array]) -> Json:
    name = "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"params at {name[:80]!r}…: nested deeper than {MAX_DEPTH} containers, or a container holds itself")
    if isinstance(value, np.ndarray):
        arrays[name] = _checked(value, name)
        return name
    if isinstance(value, str):
        return {"str": str.__str__(value)}
    if isinstance(value, bytes | bytearray):
        arrays[name] = np.frombuffer(value, np.uint8)
        return {"bytes": name}
    if isinstance(value, np.generic):
        arrays[name] = _checked(np.asarray(value), name)
        return {"scalar": name}
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        nodes = [_flatten(item, (*path, str(index)), arrays) for index, item in enumerate(value)]
        return nodes if isinstance(value, list) else {"tuple": nodes}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"params at {name!r}: the key {key!r} is a {type(key).__name__}. Keys must be strings.")
        return {"dict": {str.__str__(key): _flatten(item, (*path, key), arrays) for key, item in value.items()}}
    raise ConfigError(
        f"params at {name!r}: a {type(value).__module__}.{type(value).__name__} cannot travel.",
        hint="Use arrays, numbers, strings, bytes, None, and lists, tuples or dictionaries of them.",
    )


def _checked(array: Array, name: str) -> Array:
    if array.dtype.hasobject:
        raise ConfigError(f"params at {name!r}: dtype {array.dtype} cannot travel. Convert it to numbers, or to fixed-width strings.")
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise ConfigError(f"params at {name!r}: a masked array cannot travel. Send its data and its mask as two arrays.")
    return array


class _BadStructure(ValueError):
    """Caught in `unflatten`, which knows the offset."""


def _unflatten(node: Json, left: dict[str, Array], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise _BadStructure(f"nested deeper than {MAX_DEPTH} containers")
    if node is None or isinstance(node, bool | int | float):
        return node
    if isinstance(node, str):
        return _take(node, left)
    if isinstance(node, list):
        return [_unflatten(item, left, depth + 1) for item in node]
    if not isinstance(node, dict) or len(node) != 1:
        raise _BadStructure("a node is neither a JSON scalar, nor a list, nor an object with one key")
    [(kind, content)] = node.items()
    match kind, content:
        case "str", str():
            return content
        case "tuple", list():
            return tuple(_unflatten(item, left, depth + 1) for item in content)
        case "dict", dict():
            return {key: _unflatten(item, left, depth + 1) for key, item in content.items()}
        case "scalar", str():
            array = _take(content, left)
            if array.shape != ():
                raise _BadStructure(f"scalar {content!r} has shape {array.shape}")
            return array[()]
        case "bytes", str():
            array = _take(content, left)
            if array.dtype != np.uint8 or array.ndim != 1:
                raise _BadStructure(f"bytes {content!r} have dtype {array.dtype} and shape {array.shape}")
            return array.tobytes()
    raise _BadStructure(f"a node has kind {kind!r} and holds a {type(content).__name__}")


def _only(structure: Json, key: str) -> Json:
    if not isinstance(structure, dict) or structure.keys() != {key}:
        raise _BadStructure(f"it is not an object with the one key {key!r}")
    return structure[key]


def _take(name: str, left: dict[str, Array]) -> Array:
    if name not in left:
        raise _BadStructure(f"tensor {name!r} is missing, or used twice")
    return left.pop(name)
