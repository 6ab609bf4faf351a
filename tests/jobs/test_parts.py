from __future__ import annotations

import json
from typing import Any

import pytest

from hanse.aggregation.fednova import FedNova
from hanse.aggregation.geometric_median import GeometricMedian
from hanse.aggregation.krum import Bulyan, Krum, MultiKrum
from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.norm_bound import NormBoundedMean
from hanse.aggregation.order_statistics import Median, TrimmedMean
from hanse.aggregation.qffl import QFFL
from hanse.aggregation.server_optimizer import SGD, Adagrad, Adam, Yogi
from hanse.errors import ConfigError, NotInstalled
from hanse.filters import CastTo, ClipNorm, Exclude, GaussianNoise
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.parts import describe_part, kinds, part_of


class OwnMean(WeightedMean):
    """Registered under no name."""


@pytest.mark.parametrize(
    ("group", "part", "description"),
    [
        ("aggregators", WeightedMean({"a": 2.0}, threads=3), {"kind": "weighted_mean", "by": {"a": 2.0}, "threads": 3}),
        ("aggregators", Median(), {"kind": "median"}),
        ("aggregators", TrimmedMean(0.2), {"kind": "trimmed_mean", "trim": 0.2}),
        ("aggregators", Krum(2), {"kind": "krum", "f": 2}),
        ("aggregators", MultiKrum(2), {"kind": "multi_krum", "f": 2}),
        ("aggregators", Bulyan(1), {"kind": "bulyan", "f": 1}),
        ("aggregators", GeometricMedian(iterations=9), {"kind": "geometric_median", "smoothing": 1e-6, "iterations": 9}),
        ("aggregators", NormBoundedMean(), {"kind": "norm_bounded_mean"}),
        ("aggregators", FedNova(0.9), {"kind": "fednova", "momentum": 0.9}),
        ("aggregators", QFFL(2.0), {"kind": "qffl", "q": 2.0, "learning_rate": 0.1, "metric": "loss"}),
        ("server_optimizers", SGD(0.5, momentum=0.9), {"kind": "sgd", "learning_rate": 0.5, "momentum": 0.9}),
        ("server_optimizers", Adagrad(0.1), {"kind": "adagrad", "learning_rate": 0.1, "beta1": 0.0, "tau": 0.001}),
        ("server_optimizers", Adam(tau=0.1), {"kind": "adam", "learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 0.1}),
        ("server_optimizers", Yogi(), {"kind": "yogi", "learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 0.001}),
        ("filters", Exclude(["head.*", "b"]), {"kind": "exclude", "patterns": ["head.*", "b"]}),
        ("filters", ClipNorm(1.5), {"kind": "clip_norm", "max_norm": 1.5}),
        ("filters", GaussianNoise(0.1), {"kind": "gaussian_noise", "stddev": 0.1}),
        ("filters", CastTo("bfloat16"), {"kind": "cast_to", "dtype": "bfloat16"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_part_as_data_and_back(group: str, part: Any, description: dict[str, Any]) -> None:
    written = json.dumps(describe_part(group, part))
    assert json.loads(written) == description
    again = part_of(group, json.loads(written))
    assert type(again) is type(part)
    assert json.dumps(describe_part(group, again)) == written
    if group != "aggregators":
        assert again == part


def test_every_registered_kind_is_tested_above() -> None:
    assert {group: len(kinds(group)) for group in ("aggregators", "server_optimizers", "filters")} == {
        "aggregators": 10, "server_optimizers": 4, "filters": 4,
    }  # fmt: skip
    assert kinds("recipes")["fedavg"] is FedAvgRecipe


def test_what_is_not_registered_has_no_description() -> None:
    assert describe_part("aggregators", OwnMean()) is None
    assert describe_part("filters", Adam()) is None


def test_a_whole_number_will_do_for_a_float() -> None:
    assert part_of("filters", {"kind": "clip_norm", "max_norm": 2}) == ClipNorm(2.0)


@pytest.mark.parametrize(
    ("description", "error", "says"),
    [
        ({"kind": "clip"}, NotInstalled, "no 'clip' among the filters; there are: cast_to, clip_norm, exclude, gaussian_noise"),
        ({}, NotInstalled, "no None among the filters"),
        ({"kind": "clip_norm"}, ConfigError, "clip_norm: .*max_norm"),
        ({"kind": "clip_norm", "max_norm": "high"}, ConfigError, "clip_norm: .*float"),
        ({"kind": "clip_norm", "max_norm": -1}, ConfigError, "max_norm is -1"),
        ({"kind": "clip_norm", "max_norm": 1, "by": 3}, ConfigError, "clip_norm: no argument 'by'; it takes max_norm"),
    ],
)
def test_what_describes_no_part(description: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        part_of("filters", description)


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({"kind": "weighted_mean", "by": "size"}, "by is 'size'"),
        ({"kind": "weighted_mean", "threads": 0}, "threads is 0"),
        ({"kind": "weighted_mean", "threads": "two"}, "weighted_mean"),
        ({"kind": "weighted_mean", "limit": 1}, "no argument 'limit'; it takes by, threads"),
    ],
)
def test_what_describes_no_aggregator(description: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        part_of("aggregators", description)
