"""`LocalSGD`: a site's training as a value. A simulation can train many small models in one product; a real site trains as ever."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hanse.adapters.stacked_sgd import LOSSES, Descent, Kind, Loss, Prepared, Stacked, fits_layers, kind_of, train_layers, train_vmap
from hanse.adapters.torch import ADAPTER, proximal_term
from hanse.app import Site, Stack
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel
from hanse.seeds import seed_for

MOST_PARAMETERS = 50_000
"""On a CPU, models of more are quicker one after the other: a stack of them leaves the cache."""
STACK_NUMBERS = 400_000
"""So many parameters make a stack on a CPU, of all its sites together."""
STACK_NUMBERS_GPU = 100_000_000
FEWEST, FEWEST_VMAP, MOST = 4, 16, 256
"""Sites in a stack, layer by layer; in one that goes through `vmap`, whose steps take longer to set up; and at most."""

_NAMES: dict[Any, str] = {function: name for name, function in LOSSES.items()}
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """A site's training as a value: so many epochs of SGD, from the task's parameters. Register it: `app.train(LocalSGD(…))`.

    module: a `torch.nn.Module`, or a function or class that makes one. There is one in a process, which gets each site's tensors in place.
    data: `(site) -> (inputs, labels)`, tensors with one row an example. It may keep what it gives; randomness it takes from `site.rng`.
    loss: "cross_entropy", "mse", "bce_with_logits", or a function `(outputs, labels) -> mean loss`.
    lr, momentum, weight_decay: of SGD, as in `torch.optim.SGD`. optimizer: `(parameters) -> torch.optim.Optimizer`, in place of these.
    epochs: passes over the site's data. steps: so many steps instead, in as many epochs as they take.
    batch_size: examples a step, and in the last step of an epoch what is left; None: all.
    shuffle: whether each epoch has an order of its own, drawn for site and round; where one batch holds all, it stays as it is.
    mu: the μ of FedProx, whose term μ/2 ‖w - wᵗ‖² is added to the loss. `proximal_mu` in the task's config comes before it.
    stacked: whether a simulation trains many sites in one product, if it can; None: where that is quicker. The numbers agree but for
        rounding.
    device: where to train, such as "cuda".

    The update has every tensor of the state dict; the metric `loss`, the mean over the examples of all steps, each before the step; and in
    its meta `examples` and `steps`. Buffers, such as BatchNorm's, are the site's own: before it trains they are set from the task, or,
    where the task lacks them (`Exclude`), as the module was made. So are parameters.
    Raises ConfigError, at once, for settings that cannot be.
    """

    module: nn.Module | Callable[[], nn.Module]
    data: Callable[[Site], tuple[Tensor, Tensor]]
    loss: str | Loss = "cross_entropy"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None
    epochs: int = 1
    steps: int | None = None
    batch_size: int | None = 32
    shuffle: bool = True
    mu: float = 0.0
    stacked: bool | None = None
    device: str = "cpu"
    _made: list[_Resident] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.module) or not callable(self.data):
            raise ConfigError("LocalSGD needs module=, a torch.nn.Module or what makes one, and data=, a function of the site")
        if self.loss in _NAMES:
            object.__setattr__(self, "loss", _NAMES[self.loss])
        if not callable(self.loss) and self.loss not in LOSSES:
            raise ConfigError(f"loss is {self.loss!r}: it must be a function (outputs, labels) or one of {', '.join(map(repr, LOSSES))}")
        for name in ("epochs", "steps", "batch_size"):
            value = getattr(self, name)
            if (value is None and name == "epochs") or (value is not None and (type(value) is not int or value < 1)):
                raise ConfigError(f"{name} is {value!r}: it must be a whole number above 0")
        for name in ("lr", "momentum", "weight_decay", "mu"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not (0 <= value < math.inf)
                or (name == "lr" and value == 0)
            ):
                raise ConfigError(f"{name} is {value!r}: it must be a number from 0, and lr above it")
        if self.optimizer is not None and not callable(self.optimizer):
            raise ConfigError(f"optimizer is {self.optimizer!r}: it must be a function (parameters) -> torch.optim.Optimizer")
        if self.optimizer is not None and (self.momentum or self.weight_decay):
            raise ConfigError("momentum and weight_decay are those of SGD: give them to your own optimizer instead")
        if self.stacked and self.optimizer is not None:
            raise ConfigError("stacked=True cannot go with an optimizer of your own: only SGD is done for many sites at once")

    def __call__(self, model: FLModel, site: Site) -> FLModel:
        """Train at one site: the update, whose tensors are those of the process's one module until the next call.

        Raises ConfigError if the task's tensors are not the module's, or the site's data is none.
        """
        inputs, labels = self._data_of(site)
        resident = self._resident()
        resident.load(model.params)
        descent = self._descent()
        rows = descent.rows(len(inputs), _seed(site))
        losses = self._train_one(resident, inputs.to(self.device), labels.to(self.device), rows, self._mu(site))
        examples, steps = len(inputs), descent.count(len(inputs))
        return FLModel(params=resident.module.state_dict(), metrics={"loss": float(losses)}, meta={"examples": examples, "steps": steps})

    def stacks(self) -> bool:
        """Whether a simulation trains many sites of this in one product."""
        if self.stacked is False or self.optimizer is not None:
            return False
        resident = self._resident()
        if resident.kind is None:
            return False
        return bool(self.stacked) or self.device != "cpu" or resident.size <= MOST_PARAMETERS

    def together(self, model: FLModel, sites: Iterable[Site]) -> Iterator[Stack]:
        """Train at many sites, as stacks; see `hanse.app.Together`."""
        resident = self._resident()
        start = resident.start(model.params)
        descent = self._descent()
        for mu, stack in self._split(resident, sites):
            try:
                done = self._train_stack(resident, start, stack, descent, mu)
            except RuntimeError:  # one by one, it works, or says what is wrong
                continue
            examples = [site.examples for site in stack]
            meta = {"examples": examples, "steps": [descent.count(count) for count in examples]}
            yield Stack([site.row for site in stack], done.params, {"loss": done.losses.tolist()}, meta)

    def _descent(self) -> Descent:
        return Descent(
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            epochs=self.epochs,
            steps=self.steps,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
        )

    def _resident(self) -> _Resident:
        if not self._made:
            module = copy.deepcopy(self.module) if isinstance(self.module, nn.Module) else self.module()
            if not isinstance(module, nn.Module):
                raise ConfigError(f"module made a {type(module).__name__}: it must make a torch.nn.Module")
            try:
                module.to(self.device)
            except (RuntimeError, AssertionError) as error:
                raise ConfigError(f"LocalSGD(device={self.device!r}) cannot train here: {error}") from error
            self._made.append(_Resident(module, self.loss))
        return self._made[0]

    def _data_of(self, site: Site) -> tuple[Tensor, Tensor]:
        given = self.data(site)
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ConfigError(f"data gave a {type(given).__name__}: it must give (inputs, labels), two tensors with one row an example")
        inputs, labels = given
        if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor) or inputs.shape[:1] != labels.shape[:1] or not inputs.shape:
            raise ConfigError("data must give (inputs, labels), two tensors with as many rows, one for each example")
        if not inputs.shape[0]:
            raise ConfigError(f"site {site.name!r} has no data to train on")
        return inputs, labels

    def _mu(self, site: Site) -> float:
        return float(site.config.get("proximal_mu", self.mu))

    def _mean_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        function = LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        return function(outputs, labels)

    def _train_one(self, resident: _Resident, inputs: Tensor, labels: Tensor, rows: Iterator[slice | Tensor], mu: float) -> float:
        """The plain loop. Returns the mean loss."""
        weights = resident.learnt
        start = {name: weight.detach().clone() for name, weight in weights.items()} if mu else {}
        optimizer = None if self.optimizer is None else self.optimizer(weights.values())
        descent = self._descent()
        moving: list[Tensor] = []
        summed, seen = torch.zeros((), device=self.device), 0
        for at in rows:
            x, y = inputs[at], labels[at]
            if resident.convolves and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            loss = self._mean_loss(resident.module(x), y)
            summed += loss.detach() * len(x)
            seen += len(x)
            if optimizer is not None:
                optimizer.zero_grad()
                torch.autograd.backward(loss + proximal_term(resident.module, start, mu) if mu else loss)
                optimizer.step()
                continue
            grads = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            with torch.no_grad():
                descent.apply(list(weights.values()), grads, list(start.values()), mu, moving)
        return summed.item() / seen

    def _split(self, resident: _Resident, sites: Iterable[Site]) -> Iterator[tuple[float, list[Prepared]]]:
        """The sites in stacks, each with their μ. Left out: those whose data cannot be had so, and those with too few like them."""
        alike: dict[tuple[Any, ...], list[Prepared]] = {}
        layered, descent = resident.kind == "layers", self._descent()
        for row, site in enumerate(sites):
            try:
                inputs, labels = self._data_of(site)
            except Exception:  # it will fail by itself, and tell why
                continue
            if site.state or site.records:
                continue
            examples = inputs.shape[0]
            mixes = self.shuffle and descent.batch(examples) < examples  # else no seed is needed
            count = None if layered else examples
            key = (self._mu(site), count, inputs.shape[1:], inputs.dtype, labels.shape[1:], labels.dtype)
            alike.setdefault(key, []).append(Prepared(row, inputs, labels, examples, _seed(site) if mixes else 0))
        fewest = 2 if self.stacked else FEWEST if layered else FEWEST_VMAP
        numbers = STACK_NUMBERS if self.device == "cpu" else STACK_NUMBERS_GPU
        width = min(max(numbers // resident.size, fewest), MOST)
        for (mu, *_), group in alike.items():
            if layered and not fits_layers(resident.module, group[0].inputs, group[0].labels, str(self.loss)):
                continue
            group.sort(key=lambda site: -site.examples)  # stable: those with as many steps train side by side
            for low in range(0, len(group), width):
                if len(stack := group[low : low + width]) >= fewest:
                    yield mu, stack

    def _train_stack(
        self, resident: _Resident, start: Mapping[str, Tensor], stack: Sequence[Prepared], descent: Descent, mu: float
    ) -> Stacked:
        device = torch.device(self.device)
        if resident.kind == "layers":
            return train_layers(resident.module, start, stack, str(self.loss), descent, mu, device)
        return train_vmap(resident.module, start, stack, self._mean_loss, descent, mu, device)


class _Resident:
    """The one module of a process, which takes each site's parameters in place, and what it was when it was made."""

    def __init__(self, module: nn.Module, loss: str | Loss) -> None:
        self.convolves = any(isinstance(part, _CONVOLUTIONS) for part in module.modules())
        if self.convolves:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = module.train()
        self.kind: Kind | None = kind_of(module, loss)
        self.learnt = {name: param for name, param in module.named_parameters() if param.requires_grad}
        self.size = max(1, sum(param.numel() for param in module.parameters()))
        self._tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
        self._first = {name: tensor.detach().clone() for name, tensor in (self._tensors | dict(module.named_buffers())).items()}
        self._buffered = len(self._first) > len(list(module.parameters()))

    def start(self, params: Any) -> dict[str, Tensor]:
        """Every tensor of the state dict: the task's, or as the module was made. Raises ConfigError if the task's are not the module's."""
        if not isinstance(params, Mapping):
            raise ConfigError("the task brings no named tensors: give the recipe a first model, such as model=Net()")
        if unknown := [name for name in params if name not in self._tensors]:
            raise ConfigError(f"the task's tensor {unknown[0]!r} is none of the module's: {', '.join(self._tensors)}")
        start = {}
        for name, tensor in self._tensors.items():
            given = params.get(name, self._first[name])
            given = ADAPTER.from_array(given) if isinstance(given, np.ndarray) else given
            if given.shape != tensor.shape:
                raise ConfigError(f"the task's tensor {name!r} has shape {tuple(given.shape)}, the module's {tuple(tensor.shape)}")
            start[name] = given.to(tensor.device, tensor.dtype)
        return start

    def load(self, params: Any) -> None:
        """Set every tensor, in place: nothing is left of the site before."""
        start = self.start(params)
        if self._buffered:  # a module may put new tensors in place of its buffers
            self._tensors = self.module.state_dict(keep_vars=True)
            start |= {name: self._first[name] for name, _ in self.module.named_buffers() if name not in start}
        tensors = self._tensors | dict(self.module.named_buffers()) if self._buffered else self._tensors
        with torch.no_grad():
            torch._foreach_copy_([tensors[name] for name in start], list(start.values()))


def _seed(site: Site) -> int:
    """What the orders of the site's examples come from, in this task."""
    return seed_for(site.seed, *site.stream, "order")
