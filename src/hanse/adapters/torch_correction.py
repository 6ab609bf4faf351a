"""SCAFFOLD and FedDyn at a PyTorch site: two lines that correct each local step, and one that makes the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hanse.adapters.torch_personal import tensors
from hanse.aggregation.control_variates import next_control, next_memory
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType


class Scaffold:
    """One task of SCAFFOLD (Karimireddy et al., ICML 2020, Algorithm 1, option II).

        corrections = Scaffold(net, optimizer, model, site.state)
        for x, y in batches:
            optimizer.zero_grad()
            criterion(net(x), y).backward()
            corrections.apply()
            optimizer.step()
        return corrections.finish(meta={"examples": examples})

    It loads the received model into `net`, and takes the server's control variate out of `model.params`, which is a plain state
    dictionary from then on. The site's own control variate lies in `state["scaffold"]` from one task to the next; a script gives a
    dictionary that it makes once, before its loop.

    optimizer: a new `torch.optim.SGD`, with momentum or without. Momentum makes a gradient count for more than one step, which is taken
        into account. Option II reads the mean gradient off the way that the parameters went, so other optimizers do not do.
    Raises ConfigError for another optimizer, or for a model without a control variate.
    """

    def __init__(self, net: torch.nn.Module, optimizer: torch.optim.Optimizer, model: FLModel, state: dict[str, Any]) -> None:
        if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
            raise ConfigError(f"SCAFFOLD's local steps are those of torch.optim.SGD with one group, not of {type(optimizer).__name__}")
        if not isinstance(model.params, dict) or "control" not in model.params:
            raise ConfigError("the received model has no control variate.", hint="Use ScaffoldRecipe, and Scaffold in training tasks only.")
        c = model.params.pop("control")
        net.load_state_dict(model.params)
        self._net, self._optimizer, self._received, self._state = net, optimizer, model.params, state
        own = tensors(state.get("scaffold", {}))
        self._c = tensors(c)
        self._c_i = {name: own[name] if name in own else torch.zeros_like(c) for name, c in self._c.items()}
        self._trained = {name: param for name, param in net.named_parameters() if param.requires_grad and name in self._c}
        self._shift = {name: (self._c[name] - self._c_i[name]).to(param) for name, param in self._trained.items()}
        self._way = self._speed = 0.0

    def apply(self) -> None:
        """Turn each gradient g into g − cᵢ + c. Call it after each `backward`, before the optimizer's step."""
        for name, param in self._trained.items():
            if param.grad is not None:
                param.grad += self._shift[name]
        # How far this step goes for a gradient of 1, from the start on: what momentum adds up to.
        [group] = self._optimizer.param_groups
        momentum = group["momentum"]
        grows = 1.0 if self._speed == 0.0 else 1.0 - group["dampening"]
        self._speed = momentum * self._speed + grows
        self._way += group["lr"] * (1.0 + momentum * self._speed if group["nesterov"] else self._speed)

    def finish(self, metrics: Mapping[str, Any] | None = None, meta: Mapping[str, Any] | None = None) -> FLModel:
        """The answer: Δy and, under "control", Δc; the site's control variate is in `state`. Raises ConfigError without a step."""
        if not self._way > 0:
            raise ConfigError("Scaffold.finish without a step: call apply() after each backward()")
        after = self._net.state_dict()
        delta_c = {name: torch.zeros_like(c) for name, c in self._c.items()}
        for name in self._trained:
            wide = self._c[name].dtype
            x, y = self._received[name].to(wide), after[name].detach().cpu().to(wide)
            renewed = next_control(self._c_i[name], self._c[name], x, y, way=self._way)
            delta_c[name] = renewed - self._c_i[name]
            self._c_i[name] = renewed
        self._state["scaffold"] = {name: self._c_i[name] for name in self._trained}
        params = {**_difference(after, self._received), "control": delta_c}
        return FLModel(params, ParamsType.DIFF, metrics=metrics or {}, meta=meta or {})


class FedDyn:
    """One task of FedDyn (Acar et al., ICLR 2021, Algorithm 1); used as `Scaffold` is, with any optimizer.

        corrections = FedDyn(net, model, site.state, site.config["feddyn_alpha"])

    It loads the received model into `net`. The gradient memory ∇Lₖ(θₖ) lies in `state["feddyn"]` from one task to the next.

    alpha: α, the server's. Raises ConfigError if it is not above 0.
    """

    def __init__(self, net: torch.nn.Module, model: FLModel, state: dict[str, Any], alpha: float) -> None:
        if not alpha > 0:
            raise ConfigError(f"alpha is {alpha}: it must be above 0, and the server's: site.config['feddyn_alpha']")
        net.load_state_dict(model.params)
        self._net, self._state, self._alpha = net, state, alpha
        own = tensors(state.get("feddyn", {}))
        self._trained = {name: param for name, param in net.named_parameters() if param.requires_grad}
        self._received = {name: param.detach().clone() for name, param in self._trained.items()}
        self._memory = {}
        for name, x in self._received.items():
            zero = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            self._memory[name] = own[name].to(zero) if name in own else zero

    @torch.no_grad()
    def apply(self) -> None:
        """Turn each gradient g into g − ∇Lₖ(θₖᵗ⁻¹) + α (θ − θᵗ⁻¹). Call it after each `backward`, before the optimizer's step."""
        for name, param in self._trained.items():
            if param.grad is not None:
                param.grad += self._alpha * (param - self._received[name]) - self._memory[name]

    @torch.no_grad()
    def finish(self, metrics: Mapping[str, Any] | None = None, meta: Mapping[str, Any] | None = None) -> FLModel:
        """The answer, with the network's parameters; the site's new gradient memory is in `state`."""
        self._state["feddyn"] = {
            name: next_memory(self._memory[name], self._received[name], param, alpha=self._alpha) for name, param in self._trained.items()
        }
        return FLModel(self._net.state_dict(), metrics=metrics or {}, meta=meta or {})


def _difference(after: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By name, what has to be added; a boolean tensor as it is now."""
    return {
        name: now.detach().cpu() if now.dtype == torch.bool else now.detach().cpu() - before[name].to(now.dtype)
        for name, now in after.items()
    }
