from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import ConfigError
from hanse.trees.ensemble import check_part, join, layers_of

xgb = pytest.importorskip("xgboost")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 5)).astype(np.float32)
X[RNG.random(X.shape) < 0.05] = np.nan
Y = (np.nan_to_num(X[:, 0]) + np.nan_to_num(X[:, 1] * X[:, 2]) > 0).astype(int)
PARAMS = {"objective": "binary:logistic", "base_score": 0.5, "max_depth": 3, "nthread": 1}


def boosted(rows: slice = slice(None), *, layers: int = 2, on: Any = None, y: Any = Y, **params: Any) -> Any:
    return xgb.train(PARAMS | params, xgb.DMatrix(X[rows], y[rows]), layers, xgb_model=on)


def as_bytes(booster: Any) -> bytes:
    return bytes(booster.save_raw("json"))


def loaded(model: bytes) -> Any:
    return xgb.Booster({"nthread": 1}, model_file=bytearray(model))


def margin(booster: Any) -> Any:
    return booster.predict(xgb.DMatrix(X), output_margin=True)


SITES = [slice(start, None, 3) for start in range(3)]
KINDS: dict[str, dict[str, Any]] = {
    "depthwise": {},
    "pruned": {"tree_method": "exact", "max_depth": 5, "gamma": 2.0},
    "lossguide": {"grow_policy": "lossguide", "max_depth": 0, "max_leaves": 9},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ensembles_margin_is_the_mean_of_its_parts(kind: str) -> None:
    parts = [boosted(rows, **KINDS[kind]) for rows in SITES]
    for part in map(as_bytes, parts):
        check_part(part, as_bytes(parts[0]), layers=2, objective="binary:logistic")
    joined = loaded(join(None, [as_bytes(part) for part in parts]))
    assert joined.num_boosted_rounds() == 2
    np.testing.assert_allclose(margin(joined), sum(margin(part) for part in parts) / 3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_part_after_the_other_is_xgboost_by_itself(kind: str) -> None:
    first = boosted(SITES[0], **KINDS[kind])
    ensemble = join(None, [as_bytes(first)])
    np.testing.assert_array_equal(margin(loaded(ensemble)), margin(first))
    second = boosted(SITES[1], layers=1, on=loaded(ensemble), **KINDS[kind])
    new = as_bytes(second[2:])
    check_part(new, ensemble, layers=1, objective="binary:logistic")
    ensemble = join(ensemble, [new])
    assert layers_of(ensemble) == 3
    np.testing.assert_array_equal(margin(loaded(ensemble)), margin(second))


def test_classes_and_parallel_trees_stay_in_their_layers() -> None:
    y = RNG.integers(0, 3, len(X))
    about = {"objective": "multi:softprob", "num_class": 3, "num_parallel_tree": 2, "subsample": 0.5}
    parts = [boosted(rows, y=y, **about) for rows in SITES]
    for part in map(as_bytes, parts):
        check_part(part, None, layers=2, objective="multi:softprob", classes=3, parallel=2)
    joined = loaded(join(None, [as_bytes(part) for part in parts]))
    np.testing.assert_allclose(margin(joined), sum(margin(part) for part in parts) / 3, atol=1e-6)
    np.testing.assert_allclose(margin(joined[:1]), sum(margin(part[:1]) for part in parts) / 3, atol=1e-6)


def test_leaves_are_divided_by_hand() -> None:
    def stump(left: float, right: float) -> bytes:
        model = json.loads(as_bytes(boosted(layers=1, max_depth=1)))
        tree = model["learner"]["gradient_booster"]["model"]["trees"][0]
        tree |= {"split_indices": [2, 0, 0], "split_conditions": [0.5, left, right], "default_left": [1, 0, 0]}
        return json.dumps(model).encode()

    joined = json.loads(join(None, [stump(1.0, -3.0), stump(0.5, 2.0)]))
    trees = joined["learner"]["gradient_booster"]["model"]["trees"]
    assert [tree["split_conditions"] for tree in trees] == [[0.5, 0.5, -1.5], [0.5, 0.25, 1.0]]
    assert [tree["id"] for tree in trees] == [0, 1]
    x = np.array([[0, 0, 0.4, 0, 0], [0, 0, 0.6, 0, 0]], np.float32)
    found = loaded(json.dumps(joined).encode()).predict(xgb.DMatrix(x), output_margin=True)
    np.testing.assert_array_equal(found, np.float32([0.75, -0.5]))


def change(tree: dict[str, Any], name: str, node: int, value: Any) -> None:
    tree[name][node] = value


def trees_of(model: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = model["learner"]["gradient_booster"]["model"]
    return found


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: trees_of(m)["trees"][0]["left_children"].__setitem__(0, 99), "tree 0: node 0 has the child 99"),
        (lambda m: trees_of(m)["trees"][0]["left_children"].__setitem__(1, 0), "has the child 0: the nodes"),
        (lambda m: trees_of(m)["trees"][0]["left_children"].__setitem__(2, 3), "has the child 3"),
        (lambda m: trees_of(m)["trees"][0]["right_children"].__setitem__(1, -1), "has the child -1"),
        (lambda m: trees_of(m)["trees"][1]["split_indices"].__setitem__(0, 5), "tree 1: node 0 splits by feature 5, of 5"),
        (lambda m: trees_of(m)["trees"][1]["split_indices"].__setitem__(0, -1), "splits by feature -1"),
        (lambda m: trees_of(m)["trees"][0]["split_conditions"].__setitem__(6, 1e39), "split_conditions holds what is no float32"),
        (lambda m: trees_of(m)["trees"][0]["split_type"].__setitem__(0, 1), "splits by categories"),
        (lambda m: trees_of(m)["trees"][0]["default_left"].pop(), "default_left has"),
        (lambda m: trees_of(m)["trees"][0]["tree_param"].update(size_leaf_vector="2"), "leaves hold vectors"),
        (lambda m: trees_of(m)["trees"][0]["tree_param"].update(num_feature="7"), "of 7 features"),
        (lambda m: trees_of(m)["trees"][0].update({name: [] for name in ("left_children", "right_children")}), "0 nodes"),
        (lambda m: trees_of(m)["tree_info"].__setitem__(0, 1), "tree 0 is of class 1, of 1"),
        (lambda m: trees_of(m)["tree_info"].pop(), "2 trees and classes for 1"),
        (lambda m: trees_of(m)["trees"].pop(), "2 layers of 1 are wanted"),
        (lambda m: trees_of(m)["iteration_indptr"].__setitem__(2, 1 << 60), "2 layers of 1 are wanted"),
        (lambda m: m["learner"]["learner_model_param"].update(num_feature="9" * 5000), "num_feature is '999"),
        (lambda m: m["learner"]["learner_model_param"].update(num_feature="4"), "num_feature is 4, and the ensemble's is 5"),
        (
            lambda m: m["learner"]["learner_model_param"].update(base_score="[3E-1]"),
            r"base_score is \[0.3\], and the ensemble's is \[0.5\]",
        ),
        (lambda m: m["learner"]["learner_model_param"].update(base_score="[" * 60_000), r"base_score is '\[\["),
        (
            lambda m: m["learner"]["objective"].update(name="reg:logistic"),
            r"are \('reg:logistic', 1, 1\): \('binary:logistic', 1, 1\) are wanted",
        ),
        (lambda m: m["learner"]["learner_model_param"].update(num_class="900000000"), "900000000, 1"),
        (lambda m: m["learner"]["learner_model_param"].update(num_target="2"), r"\('binary:logistic', 1, 2\)"),
        (lambda m: m["learner"]["objective"]["reg_loss_param"].update(scale_pos_weight="2"), "objective is"),
        (lambda m: m["learner"]["feature_types"].extend(["c"] * 5), "categorical"),
        (lambda m: m["learner"]["feature_names"].append("age"), "5 features and 1 feature_names"),
        (lambda m: m["learner"]["gradient_booster"].update(name="dart"), "booster is 'dart': only gbtree"),
        (lambda m: m["learner"].pop("objective"), "no XGBoost model in JSON"),
        (lambda m: m["learner"]["objective"].update(deep={"a": {"b": 1}}), "no XGBoost model in JSON"),
    ],
)
def test_what_cannot_be_joined_is_told(spoil: Callable[[dict[str, Any]], Any], says: str) -> None:
    good = as_bytes(boosted())
    model = json.loads(good)
    spoil(model)
    with pytest.raises(ConfigError, match=says):
        check_part(json.dumps(model).encode(), good, layers=2, objective="binary:logistic")


@pytest.mark.parametrize("junk", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"learner":' * 50_000, b"null", b'{"learner": NaN}', b"\x00" * 8])
def test_junk_is_no_model(junk: bytes) -> None:
    with pytest.raises(ConfigError, match="no XGBoost model in JSON"):
        check_part(junk, None, layers=1, objective="binary:logistic")


@pytest.mark.parametrize(("booster", "name"), [("dart", "dart"), ("gblinear", "gblinear")])
def test_other_boosters_are_named(booster: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"its booster is '{name}': only gbtree can be joined"):
        check_part(as_bytes(boosted(booster=booster)), None, layers=2, objective="binary:logistic")


GOOD = as_bytes(boosted(max_depth=2))
NUMBERS = st.integers(-3, 9) | st.sampled_from([2**31 - 1, -(2**31), 2**63, 1e38, -1e39, 0.5, "7", None, True])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_let_through_xgboost_can_use(data: st.DataObject) -> None:
    """Numbers anywhere in the model, and bytes anywhere in its text, are replaced. XGBoost follows a bad index into memory that is not its
    own: what passes the check must not have one."""
    model = json.loads(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        node, steps = model, []
        while isinstance(node, dict | list) and node:
            steps.append((node, data.draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1))))
            node = node[steps[-1][1]]
        holder, name = steps[-1]
        holder[name] = data.draw(NUMBERS)
    spoilt = bytearray(json.dumps(model).encode())
    for place in data.draw(st.lists(st.integers(0, len(spoilt) - 1), max_size=1)):
        spoilt[place] = data.draw(st.integers(0, 255))
    try:
        check_part(bytes(spoilt), GOOD, layers=2, objective="binary:logistic")
    except ConfigError:
        return
    joined = loaded(join(GOOD, [bytes(spoilt)]))
    assert margin(joined).shape == (len(X),)
