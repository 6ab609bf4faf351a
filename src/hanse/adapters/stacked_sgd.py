"""SGD at many sites at once: their models stacked, each step one batched product for all of them.

Letters: S = sites, N = examples of the site that has most, B = examples in the largest batch.

Each site's numbers are those of the plain loop but for rounding: the same batches in the same order, whatever sites it is stacked with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Kind: TypeAlias = Literal["layers", "vmap"]

LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "mse": functional.mse_loss,
    "bce_with_logits": functional.binary_cross_entropy_with_logits,
}
_POINTWISE = {
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU,
    nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink,
}  # fmt: skip
_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.RNNBase, nn.MultiheadAttention)
_FEW_CLASSES = 16  # fewer do not fill a vector register
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How a site descends; see `LocalSGD`."""

    lr: float
    momentum: float
    weight_decay: float
    epochs: int
    steps: int | None
    batch_size: int | None
    shuffle: bool

    def batch(self, examples: int) -> int:
        """Examples in a batch of a site that has so many."""
        return examples if self.batch_size is None else min(self.batch_size, examples)

    def count(self, examples: int) -> int:
        """How many steps a site of so many examples takes."""
        return self.epochs * -(-examples // self.batch(examples)) if self.steps is None else self.steps

    def rows(self, examples: int, seed: int) -> Iterator[slice | Tensor]:
        """The rows of each step's batch, at one site."""
        batch = self.batch(examples)
        per_epoch = -(-examples // batch)
        order: Tensor | None = None
        for step in range(self.count(examples)):
            epoch, at = divmod(step, per_epoch)
            rows = slice(at * batch, min((at + 1) * batch, examples))
            if not self.shuffle or per_epoch == 1:
                yield rows
                continue
            if at == 0 or order is None:
                order = torch.from_numpy(orders(np.array([seed], np.uint64), np.array([examples]), epoch)[0])
            yield order[rows]

    def apply(self, weights: Sequence[Tensor], grads: Sequence[Tensor], start: Sequence[Tensor], mu: float, moving: list[Tensor]) -> None:
        """One step of SGD in place, as `torch.optim.SGD` takes it, with FedProx's μ (w - wᵗ) in the gradient. `moving`: the momentum."""
        change = list(grads)
        if mu:
            torch._foreach_add_(change, torch._foreach_sub(list(weights), list(start)), alpha=mu)
        if self.weight_decay:
            torch._foreach_add_(change, list(weights), alpha=self.weight_decay)
        if self.momentum:
            if moving:
                torch._foreach_mul_(moving, self.momentum)
                torch._foreach_add_(moving, change)
            else:
                moving += change
            change = moving
        torch._foreach_add_(list(weights), change, alpha=-self.lr)


class Prepared(NamedTuple):
    """One site's part in a stack: where it stands among the sites given, its data, how many examples, and the seed of its orders."""

    row: int
    inputs: Tensor
    labels: Tensor
    examples: int
    seed: int


def orders(seeds: Array, examples: Array, epoch: int) -> Array:
    """An order of each site's examples for one epoch: those with the lowest hash first.

    seeds: uint64, shape (S,). examples: how many each site has, shape (S,).
    Returns: int64, shape (S, N), row s a permutation of range(examples[s]) and then what is left of range(N). A row hangs on its seed and
    its number of examples alone, by SplitMix64 (Steele et al., OOPSLA 2014), which can be computed for all sites at once.
    """
    longest = int(examples.max())
    counter = np.arange(1, longest + 1, dtype=np.uint64) + np.uint64(epoch << 32)
    z = seeds[:, None] + counter * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    if int(examples.min()) < longest:
        z[np.arange(longest) >= examples[:, None]] = np.iinfo(np.uint64).max
    return np.argsort(z, axis=1, kind="stable")


def kind_of(net: nn.Module, loss: str | Loss) -> Kind | None:
    """How models like `net` can be stacked. "layers": linear layers and what works on each number by itself, with a named loss: sites may
    have any number of examples. "vmap": anything without buffers or randomness, for sites of equally many. None: not at all."""
    if not any(param.requires_grad for param in net.parameters()):
        return None
    if isinstance(loss, str) and _layers(net) is not None:
        return "layers"
    if any(True for _ in net.buffers()) or any(isinstance(part, _RANDOM) for part in net.modules()):
        return None
    return "vmap"


def _layers(net: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The layers in order, with their names, if they are such that stacked models can be computed layer by layer."""
    found: list[tuple[str, nn.Module]] = []

    def walk(name: str, part: nn.Module) -> bool:
        if any((part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)):
            return False
        if type(part) is nn.Sequential:
            return all(walk(f"{name}{key}.", child) for key, child in part.named_children())
        found.append((name, part))
        flattens = type(part) is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1)
        return type(part) is nn.Linear or type(part) in _POINTWISE or flattens

    walks = walk("", net)
    shared = len({id(part) for _, part in found}) < len(found) or len(list(net.parameters())) < len(list(_all_params(net)))
    return found if walks and not shared else None


def _all_params(net: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return net.named_parameters(remove_duplicate=False)


class Stacked(NamedTuple):
    """What a stack of sites came to: tensors of shape (S, …), and each site's mean loss, shape (S,)."""

    params: dict[str, Tensor]
    losses: Array


def train_layers(
    net: nn.Module, start: Mapping[str, Tensor], sites: Sequence[Prepared], loss: str, descent: Descent, mu: float, device: torch.device
) -> Stacked:
    """Train copies of `net`, of kind "layers", from `start` at `sites`, whose inputs have one shape but for the number of examples.

    Raises RuntimeError if a label is below 0, which is torch's sign for an example that does not count.
    """
    layers = _layers(net)
    assert layers is not None
    inputs = torch.cat([site.inputs for site in sites]).to(device)  # (examples of all sites, …)
    labels = torch.cat([site.labels for site in sites]).to(device)
    if loss == "cross_entropy" and int(labels.min()) < 0:
        raise RuntimeError("examples that do not count are no part of a stack")
    learnt = [name for name, param in net.named_parameters() if param.requires_grad]
    stack = {name: tensor.detach().expand(len(sites), *tensor.shape) for name, tensor in start.items()}
    for name in learnt:
        stack[name] = stack[name].clone().requires_grad_()
    weights, before = [stack[name] for name in learnt], [start[name] for name in learnt]
    moving: list[Tensor] = []
    summed = torch.zeros(len(sites), device=device)  # losses, times examples
    seen = np.zeros(len(sites))
    for rows, share, counts, active in _batches(sites, descent):
        at = torch.from_numpy(rows).to(device)
        losses = _loss_of_each(_forward(layers, stack, inputs[at]), labels[at], loss)
        means = (losses * torch.from_numpy(share).to(losses)).sum(1)
        grads = torch.autograd.grad(means.sum(), weights, materialize_grads=True)
        with torch.no_grad():
            still = None if active is None else torch.from_numpy(~active).to(device)
            kept = [] if still is None else [weight[still] for weight in weights]  # sites that are through stay where they are
            descent.apply(weights, grads, before, mu, moving)
            for weight, old in zip(weights, kept, strict=False):
                weight[still] = old
            summed += means.detach() * torch.from_numpy(counts).to(summed)
        seen += counts
    return Stacked({name: tensor.detach() for name, tensor in stack.items()}, summed.cpu().numpy() / seen)


def _batches(sites: Sequence[Prepared], descent: Descent) -> Iterator[tuple[Array, Array, Array, Array | None]]:
    """Each step's rows among the examples of all sites, one site's after the other's, int64, shape (S, B); the share of each in its batch's
    mean, float32, shape (S, B), 0 where there is no example; how many there are, shape (S,); and which sites still take part, None if
    all do."""
    examples = np.array([site.examples for site in sites])
    seeds = np.array([site.seed for site in sites], np.uint64)
    totals = np.array([descent.count(site.examples) for site in sites])
    first = (np.cumsum(examples) - examples)[:, None]
    batch = examples if descent.batch_size is None else np.minimum(examples, descent.batch_size)
    per_epoch = -(-examples // batch)
    width = np.arange(int(batch.max()))
    drawn: dict[int, Array] = {}
    for step in range(int(totals.max())):
        epoch, at = np.divmod(step, per_epoch)
        places = (at * batch)[:, None] + width  # in the site's order
        there = (places < np.minimum((at + 1) * batch, examples)[:, None]) & (step < totals)[:, None]
        counts = there.sum(1)
        rows = np.where(there, places, 0)
        if descent.shuffle and int(per_epoch.max()) > 1:
            drawn = {number: drawn[number] if number in drawn else orders(seeds, examples, number) for number in np.unique(epoch).tolist()}
            for number, order in drawn.items():
                mixed = (epoch == number) & (per_epoch > 1)
                rows[mixed] = np.take_along_axis(order[mixed], rows[mixed], 1)
        share = (there / np.maximum(counts, 1)[:, None]).astype(np.float32)
        yield first + rows, share, counts, None if step < totals.min() else step < totals


def _forward(layers: Sequence[tuple[str, nn.Module]], stack: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The outputs of each site's model, shape (S, B, …), for inputs of that shape."""
    for name, layer in layers:
        if isinstance(layer, nn.Linear):
            rows = x.reshape(len(x), -1, layer.in_features)
            weight = stack[f"{name}weight"].transpose(1, 2)
            has_bias = layer.bias is not None
            out = torch.baddbmm(stack[f"{name}bias"].unsqueeze(1), rows, weight) if has_bias else torch.bmm(rows, weight)
            x = out.reshape(*x.shape[:-1], layer.out_features)
        else:
            x = x.flatten(2) if isinstance(layer, nn.Flatten) else layer(x)
    return x


def _loss_of_each(outputs: Tensor, labels: Tensor, loss: str) -> Tensor:
    """The loss of each example, shape (S, B)."""
    if loss == "cross_entropy":
        if outputs.shape[2] < _FEW_CLASSES <= outputs.shape[1]:  # along the examples: up to four times as quick
            return functional.cross_entropy(outputs.transpose(1, 2).contiguous(), labels, reduction="none")
        return functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return LOSSES[loss](outputs, labels, reduction="none").flatten(2).mean(2)


def fits_layers(net: nn.Module, inputs: Tensor, labels: Tensor, loss: str) -> bool:
    """Whether `train_layers` computes the loss of a site with such data as the plain loop does: for each example a class, or a number for
    each output."""
    if inputs.dim() < 2 or not inputs.is_floating_point():
        return False
    try:
        with torch.no_grad():
            outputs = net(inputs[:1])
    except RuntimeError:  # of another shape than the module takes: each site is told by itself
        return False
    if loss == "cross_entropy":
        return outputs.dim() == 2 and labels.dim() == 1 and labels.dtype == torch.int64
    return bool(outputs.shape == labels[:1].shape and labels.dtype == outputs.dtype)


def train_vmap(
    net: nn.Module, start: Mapping[str, Tensor], sites: Sequence[Prepared], loss: Loss, descent: Descent, mu: float, device: torch.device
) -> Stacked:
    """Train copies of `net`, of kind "vmap", from `start` at `sites`, whose inputs and labels have one shape.

    Raises RuntimeError for what `torch.func.vmap` cannot do, such as a `forward` that looks at numbers or draws them.
    """
    inputs = torch.stack([site.inputs for site in sites]).to(device)
    labels = torch.stack([site.labels for site in sites]).to(device)
    learnt = [name for name, param in net.named_parameters() if param.requires_grad]
    fixed = {name: tensor for name, tensor in start.items() if name not in learnt}
    weights = {name: start[name].detach().expand(len(sites), *start[name].shape).clone() for name in learnt}

    def mean_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(net, (weights, fixed), (x,)), y)

    gradients = vmap(grad_and_value(mean_loss), randomness="error")
    moving: list[Tensor] = []
    summed, seen = torch.zeros(len(sites), device=device), 0
    every = torch.arange(len(sites), device=device)[:, None]
    for rows in zip(*(descent.rows(site.examples, site.seed) for site in sites), strict=True):
        at = rows[0]
        if isinstance(at, slice):
            x, y = inputs[:, at], labels[:, at]
        else:
            drawn = torch.stack([each for each in rows if isinstance(each, Tensor)]).to(device)
            x, y = inputs[every, drawn], labels[every, drawn]
        grads, means = gradients(weights, x, y)
        with torch.no_grad():
            descent.apply(list(weights.values()), [grads[name] for name in learnt], [start[name] for name in learnt], mu, moving)
            summed += means.detach() * x.shape[1]
        seen += x.shape[1]
    stack = {name: weights[name] if name in weights else tensor.expand(len(sites), *tensor.shape) for name, tensor in start.items()}
    return Stacked(stack, summed.cpu().numpy() / seen)
