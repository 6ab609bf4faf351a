"""PyTorch networks in which a part is each site's own: names of normalization layers, head and body, a model out of a site's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from hanse.adapters.torch import ADAPTER
from hanse.errors import ConfigError


def norm_names(net: torch.nn.Module) -> list[str]:
    """The names of all that batch normalization learns and counts in `net`, as FedBN keeps them local (Li et al., ICLR 2021).

    Raises ConfigError if the network has no such layer.
    """
    kind = torch.nn.modules.batchnorm._BatchNorm
    layers = [name for name, module in net.named_modules() if isinstance(module, kind)]
    names = [name for name in net.state_dict() if name.rpartition(".")[0] in layers]
    if not names:
        raise ConfigError(
            f"{type(net).__name__} has no batch normalization that learns or counts: there is nothing for FedBN to keep local"
        )
    return names


def split(net: torch.nn.Module, local: Iterable[str]) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The parameters whose names match a pattern of `local`, and the others: head and body, for an optimizer each.

    Raises ConfigError if one of the two is empty.
    """
    patterns = list(local)
    parts: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]] = ([], [])
    for name, param in net.named_parameters():
        parts[not any(fnmatchcase(name, pattern) for pattern in patterns)].append(param)
    if not all(parts):
        raise ConfigError(
            f"{patterns} name {'no' if parts[1] else 'every'} parameter of {type(net).__name__}: a part must be shared, and a part not"
        )
    return parts


def tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Arrays or tensors, such as those in `site.state`, as a state dictionary that `net.load_state_dict` takes."""
    return {name: array if isinstance(array, torch.Tensor) else ADAPTER.from_array(np.asarray(array)) for name, array in arrays.items()}
