"""PyTorch: tensors to arrays and back, and FedProx's proximal term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import torch

from hanse.client.framework import Adapter
from hanse.errors import ConfigError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")

# What NumPy does not know goes through integers of the same width: torch's dtype, the integer both know, the dtype of ml_dtypes.
_FOREIGN = [(torch.bfloat16, torch.int16, np.dtype(ml_dtypes.bfloat16))] + [
    (getattr(torch, name), torch.uint8, np.dtype(getattr(ml_dtypes, name))) for name in _FLOAT8 if hasattr(torch, name)
]
_TO_ARRAY = {foreign: (integer, dtype) for foreign, integer, dtype in _FOREIGN}
_FROM_ARRAY = {dtype: (np.dtype(np.int16 if integer is torch.int16 else np.uint8), foreign) for foreign, integer, dtype in _FOREIGN}


class TorchAdapter(Adapter):
    """See `hanse.client.framework.Adapter`."""

    name = "torch"

    def params_of(self, model: Any) -> Mapping[str, Any] | None:
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"a {type(model).__name__} is no torch.nn.Module: give a module or named tensors")
        return model.state_dict()

    def to_array(self, value: Any) -> Array:
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"a {type(value).__module__}.{type(value).__name__} cannot travel: send tensors, arrays, numbers or strings")
        try:
            if foreign := _TO_ARRAY.get(value.dtype):
                integer, dtype = foreign
                return np.asarray(value.detach().cpu().view(integer).numpy().view(dtype))
            return np.asarray(value.numpy(force=True))  # detached, on the CPU, conjugated and negated as it says
        except (TypeError, RuntimeError, NotImplementedError) as error:
            what = f"a tensor of dtype {value.dtype}, layout {value.layout}, on device {value.device}"
            raise ConfigError(f"{what} has no form as an array: {error}", hint="Send a dense tensor, such as x.to_dense().") from error

    def from_array(self, array: Array) -> Any:
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        elif any(stride < 0 for stride in array.strides):  # torch does not know them
            array = array.copy()
        make = torch.from_numpy if array.flags.writeable else torch.tensor  # which copies
        if foreign := _FROM_ARRAY.get(array.dtype):
            integer, dtype = foreign
            return make(array.view(integer)).view(dtype)
        try:
            return make(array)
        except TypeError as error:
            raise ConfigError(f"an array of dtype {array.dtype} has no form as a tensor: {error}") from error

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        try:
            return tensor._lazy_clone()  # torch copies before the first write, even one by `.data`, `numpy()` or a raw pointer
        except RuntimeError:  # memory that is not torch's own
            return tensor.clone()

    def seed(self, seed: int) -> None:
        if torch.cuda.is_initialized() or torch.backends.mps.is_available():  # type: ignore[no-untyped-call]
            torch.manual_seed(seed)
        else:  # the same for the CPU, without 90 µs of asking after every kind of device; CUDA seeds itself from here when it starts
            torch.default_generator.manual_seed(seed)

    def limit_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def preload(self) -> None:
        torch.optim.SGD([torch.zeros(1)])  # the first optimizer of a process imports 800 modules

    def thread_state(self) -> bool:
        return torch.is_grad_enabled()

    def set_thread_state(self, state: bool) -> None:
        torch.set_grad_enabled(state)


ADAPTER = TorchAdapter()


def proximal_term(net: torch.nn.Module, reference_params: Mapping[str, torch.Tensor], mu: float) -> torch.Tensor:
    """FedProx's addition to the local loss, μ/2 ‖w - wᵗ‖² (Li et al., MLSys 2020, Eq. 2): a differentiable scalar.

    net: w, its parameters that require gradients. reference_params: wᵗ, the received model's, by the same names; buffers are not used.
    Raises ConfigError if mu < 0 or a parameter has no reference.
    """
    if mu < 0:
        raise ConfigError(f"mu is {mu}: it must be 0 or above; 0.001 to 1 is usual")
    term = torch.zeros(())
    for name, param in net.named_parameters():
        if param.requires_grad:
            if name not in reference_params:
                raise ConfigError(f"parameter {name!r} has no reference: give the received model's params")
            distance = (param - reference_params[name].detach().to(param)).square().sum()
            term = term.to(distance) + distance
    return term * (mu / 2)
