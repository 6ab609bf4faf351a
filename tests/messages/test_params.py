from __future__ import annotations

import json
import math
from collections import OrderedDict
from enum import IntEnum
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hanse.errors import ConfigError, WireError
from hanse.messages.params import MAX_DEPTH, flatten, unflatten


def there_and_back(params):
    arrays, structure = flatten(params)
    return unflatten(arrays, json.loads(json.dumps(structure)))


def same(a, b):
    """Equal, with the same types and, for arrays, the same dtypes and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def test_a_flat_mapping_keeps_names_order_and_memory():
    params = OrderedDict([("z/2.weight", np.ones((2, 3), "f4")), ("a~1", np.zeros(())), ("", np.arange(3))])
    arrays, structure = flatten(params)
    assert structure is None
    assert list(arrays) == list(params)
    assert all(arrays[name] is params[name] for name in params)
    assert list(unflatten(arrays, structure)) == list(params)


def test_nothing_and_an_empty_mapping_differ():
    assert flatten(None) == ({}, {"tree": None})
    assert flatten({}) == ({}, None)
    assert there_and_back(None) is None
    assert there_and_back({}) == {}


def test_names_are_paths():
    x = np.arange(2)
    arrays, structure = flatten({"outer": {"inner": x}, "list": [x, (x, 3)], "a/b~": x})
    assert list(arrays) == ["outer/inner", "list/0", "list/1/0", "a~1b~0"]
    assert structure == {
        "tree": {
            "dict": {
                "outer": {"dict": {"inner": "outer/inner"}},
                "list": ["list/0", {"tuple": ["list/1/0", 3]}],
                "a/b~": "a~1b~0",
            }
        }
    }


def test_paths_that_look_alike_do_not_collide():
    params = {"a/b": np.array(1), "a": {"b": np.array(2)}, "a~1b": np.array(3), "": {"": np.array(4)}, "/": np.array(5), "l": [np.array(6)]}
    assert same(there_and_back(params), params)


@pytest.mark.parametrize(
    "params",
    [
        np.arange(4),
        [],
        (),
        "text",
        True,
        b"",
        b"xgboost\x00model",
        math.inf,
        -math.inf,
        math.nan,
        -0.0,
        2**200,
        np.float32(0.1),
        np.bool_(True),
        np.datetime64("2024-02-29", "D"),
        ml_dtypes.bfloat16(1.5),
        {"coef_": np.ones((1, 3)), "intercept_": [np.float64(2)], "n_iter_": 7, "penalty": "l2", "none": None},
    ],
    ids=repr,
)
def test_all_other_params_come_back_the_same(params):
    assert same(there_and_back(params), params)


def test_what_comes_back_is_plain():
    class Level(IntEnum):
        HIGH = 3

    params = {"map": MappingProxyType({"a": 1}), "raw": bytearray(b"x"), "level": Level.HIGH, "s": np.str_("s")}
    assert same(there_and_back(params), {"map": {"a": 1}, "raw": b"x", "level": 3, "s": "s"})


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)),
)
keys = st.text(alphabet="a/~01", max_size=3)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_tree_comes_back_the_same(params):
    assert same(there_and_back(params), params)


@pytest.mark.parametrize(
    ("params", "where"),
    [
        ({"a": {"b/c": object()}}, "a/b~1c"),
        ({"a": [1, {2, 3}]}, "a/1"),
        ({"a": np.array([object()])}, "'a'"),
        ({"a": [np.array(["x", None], object)]}, "a/0"),
        ({"a": {3: np.ones(1)}}, "'a'"),
        ({"a": np.ma.masked_array([1, 2], [0, 1])}, "'a'"),
        ({"a": 1j}, "'a'"),
    ],
)
def test_what_cannot_travel_is_named_by_its_path(params, where):
    with pytest.raises(ConfigError, match=where):
        flatten(params)


def test_a_container_that_holds_itself_is_refused():
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="deeper"):
        flatten(loop)


def nested(depth):
    node: object = 1
    for _ in range(depth):
        node = [node]
    return node


def test_depth_has_the_same_limit_both_ways():
    assert there_and_back(nested(MAX_DEPTH)) == nested(MAX_DEPTH)
    with pytest.raises(ConfigError):
        flatten(nested(MAX_DEPTH + 1))
    with pytest.raises(WireError, match="deeper"):
        unflatten({}, {"tree": nested(MAX_DEPTH + 1)})


ARRAYS = {"x": np.ones(2), "raw": np.zeros(2, np.uint8)}


@pytest.mark.parametrize(
    "structure",
    [
        [],
        {},
        3,
        {"tree": None},
        {"tree": ["x"]},
        {"tree": ["x", "raw", "x"]},
        {"tree": ["x", "raw", "gone"]},
        {"tree": ["x", "raw"], "more": 1},
        {"tree": ["x", {"scalar": "raw"}]},
        {"tree": ["raw", {"bytes": "x"}]},
        {"tree": ["x", "raw", {"object": "os.system"}]},
        {"tree": ["x", "raw", {"str": 1}]},
        {"tree": ["x", "raw", {"str": "a", "tuple": []}]},
        {"tree": ["x", "raw", {}]},
        {"tree": ["x", "raw", {"dict": []}]},
    ],
    ids=repr,
)
def test_a_hostile_structure_is_a_wire_error_at_its_offset(structure):
    with pytest.raises(WireError) as caught:
        unflatten(ARRAYS, structure, offset=17)
    assert caught.value.offset == 17
