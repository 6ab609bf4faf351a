from __future__ import annotations

import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

from hanse.errors import ConfigError

torch = pytest.importorskip("torch")
from hanse.adapters.torch import ADAPTER, proximal_term  # noqa: E402

SHARED_DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "complex128"]
FOREIGN_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


@pytest.mark.parametrize("name", SHARED_DTYPES + FOREIGN_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_tensors_to_arrays_and_back_without_a_copy(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape).to(getattr(torch, name))
    array = ADAPTER.to_array(tensor)
    assert array.dtype == np.dtype(getattr(ml_dtypes, name, None) or name)
    assert array.shape == shape
    np.testing.assert_array_equal(array.astype(np.complex128), tensor.to(torch.complex128).numpy())
    back = ADAPTER.from_array(array)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    if tensor.numel():
        assert array.ctypes.data == tensor.data_ptr() == back.data_ptr()


def test_a_parameter_and_a_transposed_tensor() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(ADAPTER.to_array(weight), [[0, 1, 2], [3, 4, 5]])
    turned = torch.arange(6.0).to(torch.bfloat16).reshape(2, 3).T
    np.testing.assert_array_equal(ADAPTER.to_array(turned).astype(np.float32), [[0, 3], [1, 4], [2, 5]])


def test_a_read_only_array_is_copied_silently() -> None:
    array = np.frombuffer(np.arange(4.0).tobytes(), np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = ADAPTER.from_array(array)
    tensor += 1
    np.testing.assert_array_equal(array, [0, 1, 2, 3])


@pytest.mark.parametrize("array", [np.arange(3, dtype=">f4"), np.arange(3, dtype="f4")[::-1], np.arange(6, dtype="f4").reshape(2, 3).T])
def test_any_layout(array: np.ndarray) -> None:
    np.testing.assert_array_equal(ADAPTER.from_array(array).numpy(), array)


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), torch.float32], ids=["s", "m", "d"])
def test_what_has_no_form_as_an_array(tensor: object) -> None:
    with pytest.raises(ConfigError, match=r"no form as an array|cannot travel"):
        ADAPTER.to_array(tensor)


def test_what_has_no_form_as_a_tensor() -> None:
    with pytest.raises(ConfigError, match="no form as a tensor"):
        ADAPTER.from_array(np.array(["a"]))


def test_a_seed_is_torchs_own() -> None:
    ADAPTER.seed(2**64 - 1)
    ours = torch.rand(3)
    torch.manual_seed(2**64 - 1)
    assert torch.equal(ours, torch.rand(3))


def test_threads_are_limited_for_the_process() -> None:
    code = "import torch; from hanse.adapters.torch import ADAPTER; ADAPTER.limit_threads(1); print(torch.get_num_threads())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["1"]


def test_proximal_term_and_its_gradient_by_hand() -> None:
    net = torch.nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0]]))
        net.bias.fill_(3.0)
    reference = {"weight": torch.tensor([[0.0, 4.0]]), "bias": torch.tensor([3.0])}
    term = proximal_term(net, reference, mu=0.5)
    assert term.item() == 0.25 * (1 + 4)  # μ/2 · (1² + 2² + 0²)
    term.backward()
    assert net.weight.grad.tolist() == [[0.5, -1.0]]  # μ (w - wᵗ)
    assert net.bias.grad.tolist() == [0.0]


def test_proximal_term_leaves_out_what_is_not_trained() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    reference = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net[1].running_mean += 9
    net[0].bias.requires_grad_(False)
    with torch.no_grad():
        net[0].bias += 9
        net[0].weight += 2
    assert proximal_term(net, reference, mu=1.0).item() == pytest.approx(2.0)
    assert proximal_term(net, reference, mu=0.0).item() == 0.0


def test_proximal_term_refuses() -> None:
    net = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="mu is -1"):
        proximal_term(net, net.state_dict(), mu=-1)
    with pytest.raises(ConfigError, match="'bias' has no reference"):
        proximal_term(net, {"weight": net.weight.detach()}, mu=1)
