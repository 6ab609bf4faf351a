"""Training at one party: what of a model is trained, a few local steps of it, or one gradient.

The module runs in eval mode while it is trained: batch-norm statistics stay frozen (few images would spoil them), their affine parameters
are trained, and dropout is off. All randomness comes from the given generator, so with the same number of threads the same bits come out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hanse.errors import ConfigError, SiteFailed, UpdateRejected
from hanse.finetuning.augmentation import augmented
from hanse.finetuning.contract import Schema
from hanse.seeds import generator

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Adapter: TypeAlias = Literal["full", "lora", "norms-and-head"]

MAX_NORM = 1.0
"""Of a batch's gradient, L2 over all that is trained; a longer one is scaled down (Pascanu et al., ICML 2013, Algorithm 1). A model that is
sure and wrong about a new device's inputs has long ones, and would diverge or forget in the first steps."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Trainable:
    """A model's weights, and which of them are trained; the module gives the code and the first weights, and keeps its own.

    adapter: "full": every parameter. "norms-and-head": the affine parameters of the norm layers and the head. "lora": those, and for every
        other linear or convolutional layer a correction of low rank, W + B·A (Hu et al., ICLR 2022, Eq. 3 with α = r); a convolution's
        W is a matrix of shape (out, in · k · k). A starts as in a new linear layer, the same at both parties, B at zero.
    head: name patterns of the head's parameters; empty: the last nn.Linear.
    """

    def __init__(self, module: nn.Module, adapter: Adapter = "full", *, rank: int = 4, head: Sequence[str] = (), seed: int = 0) -> None:
        """Raises ConfigError if nothing, or a parameter that is not float32, would be trained."""
        self._module = module
        every = dict(module.named_parameters())
        direct = {*every} if adapter == "full" else _norms(module) | _head(module, head)
        self._fixed = {name: value.detach().clone() for name, value in (*every.items(), *module.named_buffers())}
        self._direct = {name: self._fixed.pop(name).requires_grad_() for name in every if name in direct}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        if adapter == "lora":
            for name in _of(module, _MATRICES, "weight"):
                if name in self._fixed:
                    self._factors[name] = _factors(name, self._fixed[name], rank, seed)
        self._trained = dict(self._direct)
        for name, (a, b) in self._factors.items():
            self._trained |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        if not self._trained:
            raise ConfigError(f"adapter {adapter!r} trains nothing in this model", hint="Name the head in `model.head`, or choose full.")
        for name, tensor in self._trained.items():
            if tensor.dtype != torch.float32:
                raise ConfigError(f"parameter {name!r} is {tensor.dtype}: only float32 is trained")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is trained, by name, itself."""
        return self._trained

    def arrays(self) -> dict[str, Array]:
        """Copies of what is trained and travels: float32, by name; factors of low rank as NAME.lora_a and NAME.lora_b."""
        return {name: tensor.detach().numpy().copy() for name, tensor in self._trained.items()}

    def load(self, arrays: Mapping[str, Array]) -> None:
        """Take these in place of `arrays()`. Raises UpdateRejected, naming the tensor, before anything is changed."""
        if odd := self._trained.keys() ^ arrays.keys():
            raise UpdateRejected(f"tensor {min(odd)!r} is {'missing' if min(odd) in self._trained else 'not one that is trained'}")
        for name, array in arrays.items():
            shape = tuple(self._trained[name].shape)
            if array.dtype != np.float32 or array.shape != shape:
                raise UpdateRejected(f"tensor {name!r} is {array.dtype} {array.shape}: it must be float32 {shape}")
            if not np.isfinite(array).all():
                raise UpdateRejected(f"tensor {name!r} holds numbers that are not finite")
        with torch.no_grad():
            for name, array in arrays.items():
                self._trained[name].copy_(torch.from_numpy(np.array(array)))

    def merged(self) -> dict[str, Array]:
        """The whole model, as `params_of` names it, with factors of low rank merged into their weights."""
        with torch.no_grad():
            weights = self._weights()
        first_names = {id(value): name for name, value in (*self._module.named_parameters(), *self._module.named_buffers())}
        state = self._module.state_dict(keep_vars=True)
        return {name: weights[first_names[id(value)]].detach().numpy().copy() for name, value in state.items()}

    def __call__(self, inputs: Tensor) -> Tensor:
        """The model's outputs in eval mode, differentiable in what is trained."""
        outputs: Tensor = functional_call(self._module.eval(), self._weights(), (inputs,))
        return outputs

    def _weights(self) -> dict[str, Tensor]:
        corrected = {name: self._fixed[name] + (b @ a).view_as(self._fixed[name]) for name, (a, b) in self._factors.items()}
        return {**self._fixed, **self._direct, **corrected}


def local_steps(
    trainable: Trainable,
    inputs: Array,
    labels: Array,
    *,
    steps: int,
    batch_size: int,
    learning_rates: Sequence[float] | Array,
    momentum: float,
    rng: np.random.Generator,
    balanced: bool,
    augment: Schema | None = None,
) -> float:
    """Steps of SGD with momentum, which begins at zero, on batches drawn from the data; the mean loss over them. See MAX_NORM.

    inputs: float32, shape (n, …), as the model takes them. labels: shape (n,), 0 and 1; rows with others are never drawn.
    learning_rates: one a step. balanced: half of each batch from either class. augment: the schema, to vary each batch; see `augmented`.
    Raises ConfigError if there is nothing to draw from; SiteFailed, with the weights as they were, if the loss is not finite.
    """
    if len(learning_rates) != steps:
        raise ConfigError(f"{len(learning_rates)} learning rates for {steps} steps")
    before, pools = trainable.arrays(), _pools(labels, balanced)
    trained = list(trainable.tensors.values())
    velocities = [torch.zeros_like(tensor) for tensor in trained]
    total = 0.0
    for rate in learning_rates:
        loss, gradients = _loss_and_gradients(trainable, *_batch(inputs, labels, pools, batch_size, rng, augment))
        total += loss
        if not math.isfinite(total):
            trainable.load(before)
            raise SiteFailed("the loss is not finite: training has diverged.", hint="Lower the learning rate.")
        with torch.no_grad():
            for tensor, velocity, gradient in zip(trained, velocities, gradients, strict=True):
                tensor.sub_(velocity.mul_(momentum).add_(gradient), alpha=float(rate))
    return total / steps if steps else 0.0


def gradient(
    trainable: Trainable,
    inputs: Array,
    labels: Array,
    *,
    batch_size: int,
    rng: np.random.Generator,
    balanced: bool,
    augment: Schema | None = None,
) -> dict[str, Array]:
    """The gradient of the mean loss of one batch, drawn and clipped as in `local_steps`, by the names of `Trainable.arrays`."""
    _, gradients = _loss_and_gradients(trainable, *_batch(inputs, labels, _pools(labels, balanced), batch_size, rng, augment))
    return {name: value.numpy() for name, value in zip(trainable.tensors, gradients, strict=True)}


def cosine(rate: float, step: int, total: int) -> float:
    """The learning rate of a step: `rate` at step 0, along half a cosine to 0 at step `total` (Loshchilov & Hutter, ICLR 2017, Eq. 5)."""
    return rate * (1 + math.cos(math.pi * step / total)) / 2


def _loss_and_gradients(trainable: Trainable, inputs: Tensor, labels: Tensor) -> tuple[float, list[Tensor]]:
    outputs = trainable(inputs)
    if outputs.ndim == 2 and outputs.shape[1] == 2:
        loss = nn.functional.cross_entropy(outputs, labels)
    else:
        loss = nn.functional.binary_cross_entropy_with_logits(outputs.reshape(len(labels)), labels.to(outputs.dtype))
    trained = tuple(trainable.tensors.values())
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    gradients = [torch.zeros_like(tensor) if gradient is None else gradient for tensor, gradient in zip(trained, found, strict=True)]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    scale = min(1.0, MAX_NORM / norm) if norm else 1.0
    return loss.item(), [gradient * scale for gradient in gradients]


def _batch(
    inputs: Array, labels: Array, pools: list[Array], batch_size: int, rng: np.random.Generator, augment: Schema | None
) -> tuple[Tensor, Tensor]:
    """Rows drawn evenly from the pools, without replacement where a pool has enough."""
    drawn = []
    for nth, pool in enumerate(pools):
        share = (batch_size + nth) // len(pools)
        drawn.append(pool[rng.choice(len(pool), share, replace=share > len(pool))])
    rows = np.concatenate(drawn)
    batch = torch.from_numpy(inputs[rows])
    return batch if augment is None else augmented(batch, augment, rng), torch.from_numpy(labels[rows])


def _pools(labels: Array, balanced: bool) -> list[Array]:
    """Row numbers to draw from: one pool a class, or one of all."""
    pools = [np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)]
    if not balanced:
        pools = [np.concatenate(pools)]
    if not all(len(pool) for pool in pools):
        raise ConfigError(
            f"of {len(labels)} rows, {np.count_nonzero(labels == 0)} have class 0 and {np.count_nonzero(labels == 1)} class 1.",
            hint="Balanced batches need rows of both." if balanced else "Training needs labelled rows.",
        )
    return pools


def _of(module: nn.Module, kinds: tuple[type[nn.Module], ...], *which: str) -> list[str]:
    """The names of the own parameters of submodules of these kinds; all, or those called `which`."""
    return [
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, kinds)
        for name, _ in part.named_parameters(recurse=False)
        if not which or name in which
    ]


def _norms(module: nn.Module) -> set[str]:
    return set(_of(module, _NORMS))


def _head(module: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Raises ConfigError for a pattern that no parameter has."""
    names = [name for name, _ in module.named_parameters()]
    if unknown := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]:
        raise ConfigError(f"no parameter is called {unknown[0]!r}; there are {', '.join(names[-4:])} and {max(0, len(names) - 4)} more")
    if patterns:
        return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    linear = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    return {name for name in names if linear and name.rpartition(".")[0] == linear[-1]}


def _factors(name: str, weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A, uniform within ±1 / √columns, and B, zero; of as many ranks as the matrix can have at most."""
    rows, columns = weight.flatten(1).shape
    rank, bound = min(rank, rows, columns), 1 / math.sqrt(columns)
    a = generator(seed, "lora", name).uniform(-bound, bound, (rank, columns)).astype(np.float32)
    return torch.from_numpy(a).requires_grad_(), torch.zeros(rows, rank, requires_grad=True)
