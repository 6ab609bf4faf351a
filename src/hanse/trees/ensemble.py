"""XGBoost's models as JSON: read, checked, joined. XGBoost itself is not needed, nor loaded.

The form is that of `Booster.save_raw("json")` of XGBoost 1.6 to 3 ("Introduction to Model IO" in its documentation). XGBoost follows the
indices of a tree without looking, so each one is checked here, and what a site sent is written anew from what was understood of it.

A model's trees lie in layers, one for each iteration of boosting. The margin of an example is the base score's plus the sum, over the trees
of its class, of the value of the leaf that it falls into.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from hanse.errors import ConfigError

MAX_NODES = 1 << 20
"""Of one tree."""

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_OF_ROOT = 2147483647  # the parent of the root


class _Tree(msgspec.Struct):
    left_children: list[int]  # -1 at a leaf
    right_children: list[int]
    split_indices: list[int]  # the feature
    split_conditions: list[float]  # the threshold; at a leaf, its value
    default_left: list[int]  # where an example goes that lacks the feature
    split_type: list[int]  # 0: by threshold
    base_weights: list[float]
    loss_changes: list[float]
    sum_hessian: list[float]
    tree_param: dict[str, str]
    parents: list[int] = []
    id: int = 0
    categories: list[int] = []
    categories_nodes: list[int] = []
    categories_segments: list[int] = []
    categories_sizes: list[int] = []


class _Trees(msgspec.Struct, Generic[T]):
    trees: list[T]
    tree_info: list[int]  # the class of each
    gbtree_model_param: dict[str, str]
    iteration_indptr: list[int]  # where each layer begins, and the end of the last


class _Booster(msgspec.Struct, Generic[T]):
    model: _Trees[T]
    name: str


class _Learner(msgspec.Struct, Generic[T]):
    gradient_booster: _Booster[T]
    learner_model_param: dict[str, str]
    objective: dict[str, str | dict[str, str]]
    feature_names: list[str] = []
    feature_types: list[str] = []
    attributes: dict[str, str] = {}


class _Model(msgspec.Struct, Generic[T]):
    learner: _Learner[T]
    version: tuple[int, int, int]


class _Name(msgspec.Struct):
    name: str


class _Named(msgspec.Struct):
    gradient_booster: _Name


class _Kind(msgspec.Struct):
    learner: _Named


_PART = msgspec.json.Decoder(_Model[_Tree])
_ENSEMBLE = msgspec.json.Decoder(_Model[msgspec.Raw])  # of what was checked once, the trees are only carried on


def check_part(part: bytes, like: bytes | None, *, objective: str, layers: int, classes: int = 1, parallel: int = 1) -> None:
    """Raises ConfigError, saying what, unless `part` is a gbtree model of just so many new layers that can be added to `like`.

    like: the ensemble so far, or another part: number of features, their names and types, objective and base score must agree.
    objective: its name. classes: 1 for regression and for two classes. parallel: how many trees a layer has for each, `num_parallel_tree`.
    """
    model = _read(part, _PART)
    header = _header(model)
    found_of = header["objective"].get("name"), max(1, header["num_class"]), header["num_target"]
    if found_of != (objective, classes, 1):
        raise ConfigError(f"its objective, classes and targets are {found_of!s:.80}: {(objective, classes, 1)} are wanted")
    if like is not None:
        for what, theirs in _header(_read(like, _ENSEMBLE)).items():
            if header[what] != theirs:
                raise ConfigError(f"its {what} is {header[what]!s:.80}, and the ensemble's is {theirs!s:.80}")
    found = model.learner.gradient_booster.model
    trees_a_layer = classes * parallel
    bounds = found.iteration_indptr
    if bounds != list(range(0, layers * trees_a_layer + 1, trees_a_layer)) or len(found.trees) != bounds[-1]:
        raise ConfigError(f"it has {len(found.trees)} trees that begin at {bounds!s:.60}: {layers} layers of {trees_a_layer} are wanted")
    if len(found.tree_info) != len(found.trees):
        raise ConfigError(f"it has {len(found.trees)} trees and classes for {len(found.tree_info)}")
    for index, (tree, of_class) in enumerate(zip(found.trees, found.tree_info, strict=True)):
        if not 0 <= of_class < classes:
            raise ConfigError(f"its tree {index} is of class {of_class}, of {classes}")
        try:
            _reachable(tree, header["num_feature"])
        except ConfigError as error:
            raise ConfigError(f"its tree {index}: {error.message}") from error


def join(ensemble: bytes | None, parts: Sequence[bytes]) -> bytes:
    """`ensemble` with the parts' trees added and their leaves divided by the number of parts: the mean of the sites' boosted margins.

    ensemble: None for none yet. parts: at least one, each of which `check_part` has let through, all with as many layers. Layer l of every
    part goes into the ensemble's l-th new layer, in the order of the parts. A leaf's value is rounded to float32 once.
    """
    models = [_read(part, _PART) for part in parts]
    first = models[0].learner
    features = _header(models[0])["num_feature"]
    if ensemble is None:
        param = {name: first.learner_model_param[name] for name in sorted(_PARAMS & first.learner_model_param.keys())}
        trees_param = {"num_parallel_tree": first.gradient_booster.model.gbtree_model_param.get("num_parallel_tree", "1")}
        empty = _Trees[msgspec.Raw]([], [], trees_param, [0])
        learner = _Learner(_Booster(empty, "gbtree"), param, first.objective, first.feature_names, first.feature_types)
        joined = _Model(learner, models[0].version)
    else:
        joined = _read(ensemble, _ENSEMBLE)
    into = joined.learner.gradient_booster.model
    encode = msgspec.json.Encoder().encode
    for layer in range(len(first.gradient_booster.model.iteration_indptr) - 1):
        for model in models:
            found = model.learner.gradient_booster.model
            for index in range(found.iteration_indptr[layer], found.iteration_indptr[layer + 1]):
                tree = _rebuilt(found.trees[index], features, number=len(into.trees), share=len(parts))
                into.trees.append(msgspec.Raw(encode(tree)))
                into.tree_info.append(found.tree_info[index])
        into.iteration_indptr.append(len(into.trees))
    into.gbtree_model_param["num_trees"] = str(len(into.trees))
    return encode(joined)


def layers_of(ensemble: bytes) -> int:
    """How many layers of trees a model has."""
    return len(_read(ensemble, _ENSEMBLE).learner.gradient_booster.model.iteration_indptr) - 1


_PARAMS = {"base_score", "boost_from_average", "num_class", "num_feature", "num_target"}


def _read(model: bytes, decoder: msgspec.json.Decoder[_Model[T]]) -> _Model[T]:
    try:
        read = decoder.decode(model)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        try:
            name = msgspec.json.decode(model, type=_Kind).learner.gradient_booster.name
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            name = "gbtree"
        if name != "gbtree":
            raise ConfigError(f"its booster is {name!r:.40}: only gbtree can be joined") from error
        raise ConfigError(f"it is no XGBoost model in JSON: {error!s:.160}", hint='Send save_raw("json").') from error
    if read.learner.gradient_booster.name != "gbtree":
        raise ConfigError(f"its booster is {read.learner.gradient_booster.name!r:.40}: only gbtree can be joined")
    return read


def _header(model: _Model[T]) -> dict[str, Any]:
    """What two models that are to be joined must have in common. Raises ConfigError for what is no such thing."""
    learner, param = model.learner, model.learner.learner_model_param
    header: dict[str, Any] = {
        name: _count(param.get(name, default), name) for name, default in (("num_feature", ""), ("num_class", "0"), ("num_target", "1"))
    }
    header["objective"] = learner.objective
    header["base_score"] = _base_score(param.get("base_score", ""))
    header["feature_names"], header["feature_types"] = learner.feature_names, learner.feature_types
    for name in ("feature_names", "feature_types"):
        if len(header[name]) not in (0, header["num_feature"]):
            raise ConfigError(f"it has {header['num_feature']} features and {len(header[name])} {name}")
    if "c" in learner.feature_types:
        raise ConfigError(
            "it has categorical features, whose codes differ from site to site", hint="Encode them as numbers, alike everywhere."
        )
    return header


def _count(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise ConfigError(f"its {name} is {text!r:.40}: it must be a whole number")
    return int(text)


def _base_score(text: str) -> list[float]:
    """One number, or, from XGBoost 3.1, a list of one for each class."""
    try:
        found = json.loads(text[: 1 << 16])
    except (ValueError, RecursionError):
        found = None
    scores = found if isinstance(found, list) else [found]
    if not all(type(score) in (int, float) and abs(score) <= _FLOAT32_MAX for score in scores):
        raise ConfigError(f"its base_score is {text!r:.40}: it must be a number")
    return [float(score) for score in scores]


def _reachable(tree: _Tree, features: int) -> Array:
    """The numbers of the nodes below the root, rising: int64. Nodes that pruning has cut off are not among them.

    Raises ConfigError if it is not a tree, or if a node that is reached has a feature, a threshold or a value that there cannot be.
    """
    total = len(tree.left_children)
    if not 1 <= total <= MAX_NODES:
        raise ConfigError(f"{total} nodes: there can be 1 to {MAX_NODES}")
    numbers = ("split_conditions", "base_weights", "loss_changes", "sum_hessian")
    for name in ("right_children", "split_indices", "default_left", "split_type", *numbers):
        if len(getattr(tree, name)) != total:
            raise ConfigError(f"{name} has {len(getattr(tree, name))} entries, and left_children {total}")
    if tree.categories or any(tree.split_type):
        raise ConfigError("it splits by categories: only thresholds can be joined", hint="Encode categories as numbers.")
    if tree.tree_param.get("size_leaf_vector", "1") not in ("0", "1"):
        raise ConfigError("its leaves hold vectors", hint='Choose multi_strategy "one_output_per_tree".')
    if _count(tree.tree_param.get("num_feature", ""), "num_feature") != features:
        raise ConfigError(f"it is of {tree.tree_param['num_feature']} features, and the model of {features}")
    for name in numbers:
        if not all(abs(value) <= _FLOAT32_MAX for value in getattr(tree, name)):
            raise ConfigError(f"{name} holds what is no float32")
    seen, waiting = {0}, [0]
    while waiting:
        node = waiting.pop()
        children = tree.left_children[node], tree.right_children[node]
        if children == (-1, -1):
            continue
        for child in children:
            if not 0 < child < total or child in seen:
                raise ConfigError(f"node {node} has the child {child}: the nodes, of which there are {total}, form no tree")
            seen.add(child)
            waiting.append(child)
        if not 0 <= tree.split_indices[node] < features:
            raise ConfigError(f"node {node} splits by feature {tree.split_indices[node]}, of {features}")
        if tree.default_left[node] not in (0, 1):
            raise ConfigError(f"node {node} has default_left {tree.default_left[node]}")
    return np.array(sorted(seen), np.int64)


def _rebuilt(tree: _Tree, features: int, *, number: int, share: int) -> _Tree:
    """The tree without the nodes that pruning has cut off, its leaves' values divided by `share`."""
    nodes = _reachable(tree, features).tolist()
    place = {node: index for index, node in enumerate(nodes)} | {-1: -1}
    leaf = [tree.left_children[node] == -1 for node in nodes]
    left, right = ([place[children[node]] for node in nodes] for children in (tree.left_children, tree.right_children))
    parents = [_OF_ROOT] * len(nodes)
    for index, children in enumerate(zip(left, right, strict=True)):
        for child in children:
            if child != -1:
                parents[child] = index

    def of(name: str) -> list[Any]:
        values = getattr(tree, name)
        return [values[node] for node in nodes]

    def of_inner(name: str) -> list[int]:
        return [0 if is_leaf else value for is_leaf, value in zip(leaf, of(name), strict=True)]

    values = zip(leaf, of("split_conditions"), strict=True)
    return _Tree(
        left_children=left,
        right_children=right,
        parents=parents,
        split_indices=of_inner("split_indices"),
        split_conditions=[_divided(value, share) if is_leaf else value for is_leaf, value in values],
        default_left=of_inner("default_left"),
        split_type=[0] * len(nodes),
        base_weights=of("base_weights"),
        loss_changes=of("loss_changes"),
        sum_hessian=of("sum_hessian"),
        tree_param={"num_deleted": "0", "num_feature": str(features), "num_nodes": str(len(nodes)), "size_leaf_vector": "1"},
        id=number,
    )


def _divided(value: float, by: int) -> float:
    return value if by == 1 else float(np.float32(np.float32(value) / np.float32(by)))
