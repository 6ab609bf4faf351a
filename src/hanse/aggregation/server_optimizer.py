"""How the server steps from its model to the next, given the mean of the updates: FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad.

The pseudo-gradient is Δ = mean - model of a FULL mean, and the mean itself of a DIFF one; it points to where the model should go.
The moments ride in the new model's `optimizer_params`, as arrays named `momentum/<tensor>` and `variance/<tensor>`, so that a restarted
job goes on with the same bits.

For every optimizer here: arithmetic is in float32 for float32 and narrower floats, in float64 for float64, and complex tensors take
SGD only. Integers and booleans have no gradient: a FULL mean replaces them, a DIFF one is added (a boolean is replaced). A tensor
that the mean lacks keeps its value and moments. A model without params becomes the first mean, which must be FULL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from hanse.aggregation.form import sum_dtype
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import flatten, unflatten

Array = np.ndarray[Any, np.dtype[Any]]
Moments = dict[str, Array]  # one tensor's: "momentum", "variance"; empty before the first step
Rule = Callable[[Array, Moments], Array]
"""From Δ and the moments, the change of the tensor. Puts the new moments in place of the old, and changes no array."""


class ServerOptimizer(Protocol):
    """Takes the server's model and the mean of the updates to the next model."""

    def step(self, model: FLModel, mean: FLModel) -> FLModel:
        """The next model, in the form, dtypes, rounds and meta of `model`. Changes neither argument; may share memory with both.

        Raises ConfigError if the mean has tensors that the model lacks, or none at all.
        """


@dataclass(frozen=True)
class SGD:
    """A step along Δ: m ← momentum · m + Δ, w ← w + learning_rate · m.

    SGD(1.0) is FedAvg: it takes a FULL mean as it is, bit for bit. With momentum it is FedAvgM (Hsu et al., 2019, arXiv:1909.06335).
    """

    learning_rate: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(learning_rate=self.learning_rate)
        _check_decay(momentum=self.momentum)

    def step(self, model: FLModel, mean: FLModel) -> FLModel:
        if self.learning_rate == 1.0 and self.momentum == 0.0:
            return _step(model, mean, None)
        return _step(model, mean, self._change)

    def _change(self, delta: Array, moments: Moments) -> Array:
        if self.momentum:
            delta = delta + self.momentum * moments.get("momentum", np.zeros_like(delta))
            moments["momentum"] = delta
        return np.asarray(self.learning_rate * delta)


@dataclass(frozen=True)
class Adagrad:
    """FedAdagrad of Reddi et al., Adaptive Federated Optimization, ICLR 2021, Algorithm 2: v ← v + Δ².

    All three of Algorithm 2: m ← beta1 · m + (1 - beta1) · Δ, then v, then w ← w + learning_rate · m / (√v + tau); m starts at 0 and v
    at tau². There is no bias correction. The paper runs FedAdagrad with beta1 = 0 and tunes the learning rate for each task.
    """

    learning_rate: float = 0.01
    beta1: float = 0.0
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive(learning_rate=self.learning_rate, tau=self.tau)
        _check_decay(beta1=self.beta1)

    def step(self, model: FLModel, mean: FLModel) -> FLModel:
        return _step(model, mean, _adaptive(self.learning_rate, self.beta1, self.tau, lambda v, square: v + square))


@dataclass(frozen=True)
class Adam:
    """FedAdam of Algorithm 2, as `Adagrad` says: v ← beta2 · v + (1 - beta2) · Δ². The defaults of beta1, beta2 and tau are the paper's."""

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive(learning_rate=self.learning_rate, tau=self.tau)
        _check_decay(beta1=self.beta1, beta2=self.beta2)

    def step(self, model: FLModel, mean: FLModel) -> FLModel:
        return _step(
            model, mean, _adaptive(self.learning_rate, self.beta1, self.tau, lambda v, square: self.beta2 * v + (1 - self.beta2) * square)
        )


@dataclass(frozen=True)
class Yogi:
    """FedYogi of Algorithm 2, as `Adagrad` says: v ← v - (1 - beta2) · Δ² · sign(v - Δ²). The defaults are the paper's, as in `Adam`."""

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive(learning_rate=self.learning_rate, tau=self.tau)
        _check_decay(beta1=self.beta1, beta2=self.beta2)

    def step(self, model: FLModel, mean: FLModel) -> FLModel:
        def second(v: Array, square: Array) -> Array:
            return np.asarray(v - (1 - self.beta2) * square * np.sign(v - square))

        return _step(model, mean, _adaptive(self.learning_rate, self.beta1, self.tau, second))


def _adaptive(learning_rate: float, beta1: float, tau: float, second: Callable[[Array, Array], Array]) -> Rule:
    """The rule of Algorithm 2; `second` gives the new v of the old and Δ²."""

    def change(delta: Array, moments: Moments) -> Array:
        if delta.dtype.kind == "c":
            raise ConfigError(f"a tensor has dtype {delta.dtype}: complex tensors can only be stepped by SGD")
        v: Array = second(moments.get("variance", np.full_like(delta, tau**2)), np.square(delta))
        moments["variance"] = v
        if beta1:
            delta = beta1 * moments.get("momentum", np.zeros_like(delta)) + (1 - beta1) * delta
            moments["momentum"] = delta
        return np.asarray(learning_rate * delta / (np.sqrt(v) + tau))

    return change


def _step(model: FLModel, mean: FLModel, rule: Rule | None) -> FLModel:
    """The next model. Rule None takes Δ as it is."""
    if mean.params is None:
        raise ConfigError("there is no mean to step with: no update brought params.", hint="Send FLModel(params=...) from the sites.")
    if model.params is None:
        if mean.params_type is not ParamsType.FULL:
            raise ConfigError("the model has no params yet, so a DIFF has nothing to be added to.", hint="Send FULL.")
        return replace(model, params=mean.params, params_type=ParamsType.FULL)
    old, structure = flatten(model.params)
    means, _ = flatten(mean.params)
    if unknown := means.keys() - old.keys():
        raise ConfigError(f"the mean has {len(unknown)} tensors that the model lacks, the first is {min(unknown)!r}.")
    is_full = mean.params_type is ParamsType.FULL
    state = dict(model.optimizer_params)
    new = dict(old)
    for name, value in means.items():
        weights = old[name]
        dtype = None if weights.dtype.kind in "iub" else sum_dtype(weights.dtype)
        if dtype is None or (rule is None and is_full):
            adds = not is_full and weights.dtype.kind in "iu"
            new[name] = np.asarray(weights + value) if adds else value
            continue
        wide = weights.astype(dtype, copy=False)
        delta = value.astype(dtype, copy=False)
        if is_full:
            delta = delta - wide
        if rule is not None:
            moments = {key: state[f"{key}/{name}"] for key in ("momentum", "variance") if f"{key}/{name}" in state}
            delta = rule(delta, moments)
            state |= {f"{key}/{name}": np.asarray(array) for key, array in moments.items()}
        new[name] = np.asarray(wide + delta).astype(weights.dtype, copy=False)
    return replace(model, params=unflatten(new, structure), params_type=ParamsType.FULL, optimizer_params=state)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise ConfigError(f"{name} is {value!r}: it must be a finite number above 0")


def _check_decay(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{name} is {value!r}: it must be at least 0 and below 1")
