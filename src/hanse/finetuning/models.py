"""The model of a project: the vendor's code from its file, its weights as named arrays, and the scores and embeddings it gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeAlias

import blake3
import numpy as np
import torch
from torch import Tensor, nn

from hanse.errors import ConfigError
from hanse.finetuning.contract import Model

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

BATCH = 64
"""So many rows at a time, the last ones filled up with zeros: the last bits of a row's output depend on how many are computed together."""


class _Loader(SourceFileLoader):
    """Compiles the file that is there: its digest is in every version, and a bytecode cache beside it would go unseen."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_module(folder: Path, model: Model) -> nn.Module:
    """What the vendor's `build` makes, in eval mode, with first weights that are the same at every call.

    It is a file of its own: it may import what is installed, and nothing beside it.
    Raises ConfigError, naming the file, when it is not there, fails, or makes no torch.nn.Module.
    """
    path = (folder / model.code).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ConfigError(f"{folder} has no {model.code}", hint="`model.code` in project.yaml names a Python file in the project folder.")
    try:
        build = getattr(_executed(path), model.build, None)
        if not callable(build):
            raise ConfigError(f"{path} has no function {model.build}()", hint="`model.build` in project.yaml says its name.")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = build()
    except (Exception, SystemExit) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{path}: {model.build}() made a {type(module).__name__}, it must make a torch.nn.Module")
    return module.eval()


def _executed(path: Path) -> ModuleType:
    name = f"hanse_model_{blake3.blake3(path.read_bytes() + str(path).encode()).hexdigest(8)}"
    spec = spec_from_file_location(name, path, loader=_Loader(name, str(path)))
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and annotations look for their own module
    spec.loader.exec_module(module)
    return module


def params_of(module: nn.Module) -> dict[str, Array]:
    """A copy of its state_dict: parameters and buffers by name. Raises ConfigError for an entry that is no tensor."""
    params = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"the model's state has {name!r}, a {type(value).__name__}: only tensors can be kept in a version")
        params[name] = np.array(value.numpy(force=True))
    return params


def load_params(module: nn.Module, params: Mapping[str, Array]) -> None:
    """Give the module these weights, all of them. Raises ConfigError, naming the tensor, before anything is changed."""
    state = module.state_dict()
    hint = "These weights belong to other model code."
    if missing := state.keys() - params.keys():
        raise ConfigError(f"the weights lack {len(missing)} tensors that model.py has, such as {min(missing)!r}", hint=hint)
    if extra := params.keys() - state.keys():
        raise ConfigError(f"the weights hold {len(extra)} tensors that model.py does not have, such as {min(extra)!r}", hint=hint)
    arrays = {name: np.asarray(array) for name, array in params.items()}
    for name, array in arrays.items():
        here = state[name].numpy(force=True)
        if array.shape != here.shape or array.dtype != here.dtype:
            raise ConfigError(f"tensor {name!r} is {array.dtype} {array.shape} and model.py has {here.dtype} {here.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConfigError(f"tensor {name!r} holds numbers that are not finite")
    with torch.no_grad():
        for name, array in arrays.items():
            state[name].copy_(torch.from_numpy(array.copy()))


def score(module: nn.Module, inputs: Array, batch: int = BATCH) -> Array:
    """The probability of class 1 for each input: float64, shape (n,). The module is left in eval mode.

    inputs: float32, shape (n, …), as `hanse.finetuning.data.prepared` makes them.
    One output is a logit; of two, the second is class 1's: 1 / (1 + exp(-z)) with z the logit, or the second less the first, in float64.
    Raises ConfigError for other outputs, and for outputs that are not finite.
    """
    module.eval()
    with torch.inference_mode():
        outputs = [module(part).numpy(force=True)[:rows] for part, rows in _parts(inputs, batch)]
    logits = np.concatenate(outputs).astype(np.float64).reshape(len(inputs), -1) if outputs else np.zeros((0, 1))
    if logits.shape[1] not in (1, 2) or not np.isfinite(logits).all():
        raise ConfigError(f"the model gave outputs of shape {outputs[0].shape}, or not finite: it must give one or two logits a row")
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-logits[:, 0] if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1])))


def embed(module: nn.Module, inputs: Array, embedding: str = "", batch: int = BATCH) -> Array:
    """Embeddings: float32, shape (n, d). The module is left in eval mode.

    embedding: the submodule whose output it is; empty: the input of the last nn.Linear. Axes after the second are averaged.
    Raises ConfigError if there is no such submodule.
    """
    modules = dict(module.named_modules())
    name = embedding or next((name for name in reversed(modules) if isinstance(modules[name], nn.Linear)), None)
    if name is None or name not in modules:
        raise ConfigError(f"the model has no submodule {embedding!r}" if embedding else "the model has no linear layer to embed with")
    taken: list[Array] = []

    def take(_: nn.Module, given: Any, output: Any) -> None:
        value = (output if embedding else given[0]).numpy(force=True)
        taken.append(value.reshape(*value.shape[:2], -1).mean(axis=2, dtype=np.float32))

    module.eval()
    hook = modules[name].register_forward_hook(take)
    try:
        with torch.inference_mode():
            for part, _ in _parts(inputs, batch):
                module(part)
    finally:
        hook.remove()
    return np.concatenate(taken)[: len(inputs)] if taken else np.zeros((0, 0), np.float32)


def _parts(inputs: Array, batch: int) -> Iterator[tuple[Tensor, int]]:
    """Shape (batch, …) each, and how many rows of it are inputs."""
    for start in range(0, len(inputs), batch):
        rows = inputs[start : start + batch]
        part = np.zeros((batch, *inputs.shape[1:]), np.float32)
        part[: len(rows)] = rows
        yield torch.from_numpy(part), len(rows)
