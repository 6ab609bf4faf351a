from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from hanse.errors import ConfigError
from hanse.finetuning.contract import Model
from hanse.finetuning.models import embed, load_module, load_params, params_of, score
from hanse.finetuning.points import digest_of

CODE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Widths:
    hidden: int = 5

def build():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, Widths().hidden), nn.ReLU(),
                         nn.Linear(5, 2))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.py").write_text(CODE)
    return tmp_path


@pytest.fixture
def inputs():
    return np.random.default_rng(0).normal(size=(150, 1, 4, 4)).astype(np.float32)


def linear(*rows: list[float]) -> nn.Module:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    load_params(layer, {"weight": np.array(rows, np.float32)})
    return nn.Sequential(layer)


def test_the_module_comes_from_its_file_and_is_the_same_each_time(folder):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = load_module(folder, Model()), load_module(folder, Model())
    assert_array_equal(torch.get_rng_state(), before)
    assert not first.training
    assert digest_of(params_of(first)) == digest_of(params_of(second))
    assert [path.name for path in folder.iterdir()] == ["model.py"]
    assert str(folder) not in sys.path


def test_changed_code_is_seen_at_once(folder):
    load_module(folder, Model())
    (folder / "model.py").write_text(CODE.replace("= 5", "= 6").replace("Linear(5,", "Linear(6,"))
    assert params_of(load_module(folder, Model()))["6.weight"].shape == (2, 6)


@pytest.mark.parametrize(
    ("code", "model", "problem"),
    [
        (CODE, Model(code="net.py"), "has no net.py"),
        (CODE, Model(code="../model.py"), "has no ../model.py"),
        (CODE, Model(build="make"), r"no function make\(\)"),
        ("def build(:", Model(), "SyntaxError"),
        ("import nowhere_to_be_found", Model(), "ModuleNotFoundError"),
        ("raise SystemExit(3)", Model(), "SystemExit"),
        ("build = lambda: 3", Model(), "made a int"),
        ("def build(): return 1 / 0", Model(), "ZeroDivisionError"),
    ],
)
def test_code_that_does_not_do(tmp_path, code, model, problem):
    (tmp_path / "project").mkdir()
    (tmp_path / "model.py").write_text(CODE)
    (tmp_path / "project" / "model.py").write_text(code)
    with pytest.raises(ConfigError, match=problem):
        load_module(tmp_path / "project", model)


def test_params_are_copies_and_go_back(folder, inputs):
    module = load_module(folder, Model())
    params = params_of(module)
    assert params["1.num_batches_tracked"].dtype == np.int64
    expected = score(module, inputs)
    changed = {name: array + 1 for name, array in params.items()}
    load_params(module, changed)
    assert not np.array_equal(score(module, inputs), expected)
    changed["0.weight"][...] = 0
    load_params(module, params)
    assert_array_equal(score(module, inputs), expected)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"6.bias": None}, "lack 1 tensors that model.py has, such as '6.bias'"),
        ({"7.bias": np.zeros(2, np.float32)}, "hold 1 tensors that model.py does not have, such as '7.bias'"),
        ({"6.bias": np.zeros(3, np.float32)}, "'6.bias' is float32"),
        ({"6.bias": np.zeros(2)}, "'6.bias' is float64"),
        ({"6.bias": np.array([0, np.nan], np.float32)}, "'6.bias' holds numbers that are not finite"),
    ],
)
def test_weights_of_another_model_are_refused_whole(folder, change, problem):
    module = load_module(folder, Model())
    before = digest_of(params_of(module))
    params = {name: array + 1 for name, array in params_of(module).items()} | change
    with pytest.raises(ConfigError, match=problem):
        load_params(module, {name: array for name, array in params.items() if array is not None})
    assert digest_of(params_of(module)) == before


def test_the_digest_depends_on_names_shapes_and_numbers_and_not_on_their_order():
    a, b = np.ones((2, 3), np.float32), np.zeros(4, np.float32)
    digest = digest_of({"a": a, "b": b})
    assert digest == digest_of({"b": b.copy(), "a": a})
    assert digest.startswith("blake3:")
    others = [{"a": b, "b": a}, {"a": a.reshape(3, 2), "b": b}, {"a": a, "c": b}, {"a": a, "b": b + np.float32(1e-9)}, {"a": a}]
    assert len({digest, *map(digest_of, others)}) == 6


def test_scores_by_hand():
    inputs = np.array([[0, 0], [math.log(3), 0], [0, math.log(3)], [0, 900], [900, 0]], np.float32)
    two = score(linear([1, 0], [0, 1]), inputs)
    assert two.dtype == np.float64
    assert_allclose(two, [0.5, 0.25, 0.75, 1, 0], rtol=1e-7)
    assert_allclose(score(linear([-1, 1]), inputs), two)


def test_a_row_has_the_same_bits_whatever_is_scored_with_it(folder, inputs):
    module = load_module(folder, Model())
    together, embedded = score(module, inputs), embed(module, inputs)
    for rows in (slice(0, 1), slice(3, 6), slice(140, 150), slice(10, 90)):
        assert_array_equal(score(module, inputs[rows]), together[rows])
        assert_array_equal(embed(module, inputs[rows]), embedded[rows])


def test_embeddings(folder, inputs):
    module = load_module(folder, Model())
    with torch.inference_mode():
        assert_allclose(embed(module, inputs), module[:6](torch.from_numpy(inputs)).numpy(), atol=1e-6)
        assert_allclose(embed(module, inputs, "2"), module[:3](torch.from_numpy(inputs)).numpy().mean(axis=(2, 3)), atol=1e-6)
    assert not any(part._forward_hooks for part in module.modules())
    with pytest.raises(ConfigError, match="no submodule 'nine'"):
        embed(module, inputs, "nine")
    with pytest.raises(ConfigError, match="no linear layer"):
        embed(nn.Sequential(nn.ReLU()), inputs)


def test_nothing_to_score(folder):
    module, nothing = load_module(folder, Model()), np.zeros((0, 1, 4, 4), np.float32)
    assert score(module, nothing).shape == (0,)
    assert len(embed(module, nothing)) == 0


def test_outputs_that_are_no_scores():
    with pytest.raises(ConfigError, match="one or two logits"):
        score(linear([1, 0], [0, 1], [1, 1]), np.zeros((3, 2), np.float32))
    with pytest.raises(ConfigError, match="not finite"):
        score(linear([1, 0], [0, 1]), np.array([[0, np.nan]], np.float32))
