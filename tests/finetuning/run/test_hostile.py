"""A client whose software answers something else than it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hanse.errors import ConfigError, JobFailed
from hanse.finetuning.contract import read_project
from hanse.finetuning.party import Party, app
from hanse.finetuning.points import digest_of
from hanse.messages.flmodel import FLModel

Pair = Any  # of conftest.py
MIX = {"mode": "gradient-mix", "iterations": 3}


@contextmanager
def answering(task: str, change: Callable[[FLModel], FLModel]) -> Iterator[None]:
    """The client's answers to this task are changed before they leave."""
    original = app._handlers[task]
    app._handlers[task] = lambda model, site: change(original(model, site)) if site.name == "north" else original(model, site)
    try:
        yield
    finally:
        app._handlers[task] = original


@pytest.mark.parametrize(
    "change",
    [
        lambda params: None,
        lambda params: {},
        lambda params: params | {"more": np.zeros(1, np.float32)},
        lambda params: params | {"0.weight": np.zeros((2, *params["0.weight"].shape), np.float32)},
        lambda params: params | {"0.weight": np.zeros(6, np.float32)},
        lambda params: params | {"0.weight": params["0.weight"].astype(np.float64)},
        lambda params: params | {"0.weight": np.full_like(params["0.weight"], np.nan)},
    ],
    ids=["nothing", "no names", "another name", "a longer shape", "a shape that broadcasts", "another dtype", "not finite"],
)
def test_a_gradient_of_another_form_ends_the_run(pair: Pair, change: Callable[[Any], Any]) -> None:
    with answering("gradient", lambda answer: replace(answer, params=change(answer.params))), pytest.raises(JobFailed, match="model"):
        pair.execute(**MIX)


def test_a_difference_that_is_not_finite_ends_the_run(pair: Pair) -> None:
    def change(answer: FLModel) -> FLModel:
        scales = {name: np.array(np.nan, np.float32) for name in answer.params["scales"]}
        return replace(answer, params={**answer.params, "scales": scales})

    with answering("train", change), pytest.raises(JobFailed, match="scale"):
        pair.execute(round_trips=1, client_steps=1)


def test_what_is_trained_is_the_vendors_to_say(pair: Pair) -> None:
    expected = pair.execute(**MIX).get_result().params
    with answering("prepare", lambda answer: replace(answer, params={name: array + 1 for name, array in expected.items()})):
        assert digest_of(pair.execute(**MIX).get_result().params) == digest_of(expected)


def test_a_client_that_is_none_of_the_project_names_no_folder(pair: Pair) -> None:
    digest = read_project(pair.client).digest
    with pytest.raises(ConfigError, match="north"):
        Party(pair.client, "north", digest, "blake3:" + "0" * 64, "../../elsewhere")
    assert not (pair.client.parent / "elsewhere").exists()
