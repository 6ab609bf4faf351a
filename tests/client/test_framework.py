from __future__ import annotations

import random
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from hanse.client.framework import adapter_for, from_arrays, load_adapter, loaded, params_of, seed_all, to_arrays
from hanse.errors import ConfigError, NotInstalled

torch = pytest.importorskip("torch")
linear_model = pytest.importorskip("sklearn.linear_model")


def test_an_adapter_is_found_by_the_classes_a_value_is_made_of() -> None:
    class Mine(torch.nn.Linear):  # type: ignore[misc]
        pass

    class Other(linear_model.LogisticRegression):  # type: ignore[misc]
        pass

    names = [adapter.name if (adapter := adapter_for(value)) else None for value in (Mine(1, 1), torch.ones(1), Other(), np.ones(1), {}, 3)]
    assert names == ["torch", "torch", "sklearn", None, None, None]


def test_an_unknown_adapter_names_those_installed() -> None:
    with pytest.raises(NotInstalled, match=r"no adapter 'mxnet'; installed: .*sklearn.*torch"):
        load_adapter("mxnet")


@pytest.mark.parametrize(
    ("model", "names", "framework"),
    [
        (None, None, None),
        ({"w": np.ones(2)}, ["w"], None),
        ({"w": torch.ones(2)}, ["w"], "torch"),
        (torch.nn.Linear(2, 1), ["weight", "bias"], "torch"),
        (linear_model.LogisticRegression(), None, "sklearn"),
        (OrderedDict(b=torch.ones(1), a=np.ones(1)), ["b", "a"], "torch"),
    ],
    ids=["nothing", "arrays", "tensors", "module", "unfitted estimator", "mixed"],
)
def test_params_of(model: Any, names: list[str] | None, framework: str | None) -> None:
    params, found = params_of(model)
    assert (params and list(params), found) == (names, framework)


@pytest.mark.parametrize("model", ["net", 3, torch.ones(2), linear_model, torch.nn.Linear])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"no model|no torch\.nn\.Module|no scikit-learn"):
        params_of(model)


def test_nested_parameters_to_arrays_and_back() -> None:
    net = torch.nn.Linear(3, 2)
    params = {"net": net.state_dict(), "rest": [torch.ones(1), np.zeros(2), "name", None, (1.5, b"x")]}
    arrays = to_arrays(params)
    assert arrays["net"]["weight"].ctypes.data == net.weight.data_ptr()  # not copied
    assert [type(leaf) for leaf in arrays["rest"][:2]] == [np.ndarray, np.ndarray]
    assert arrays["rest"][2:] == ["name", None, (1.5, b"x")]
    back = from_arrays(arrays, "torch")
    assert torch.equal(back["net"]["weight"], net.weight)
    assert isinstance(back["rest"][1], torch.Tensor)
    assert from_arrays(arrays, None)["net"]["weight"] is arrays["net"]["weight"]


def test_a_seed_fixes_every_global_generator() -> None:
    def draws() -> tuple[Any, ...]:
        seed_all(2**64 - 3)
        return random.random(), np.random.random(), torch.rand(1).item()

    first = draws()
    assert first == draws()
    seed_all(2**64 - 4)
    assert (random.random(), np.random.random(), torch.rand(1).item()) != first
    assert {adapter.name for adapter in loaded()} >= {"torch", "sklearn"}


def test_seeding_loads_no_framework() -> None:
    code = "import sys; from hanse.client.framework import seed_all; seed_all(1); print('torch' in sys.modules, 'sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
