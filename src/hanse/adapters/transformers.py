"""Hugging Face: a `Trainer`, or TRL's `SFTTrainer`, that takes the global model before it trains and sends the site's after it.

    import hanse.adapters.transformers as flare

    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()   # of the global model, before it is trained
        trainer.train()

All of the Client API is here too. Of a PEFT model only the adapters travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hanse.adapters.exchange import Exchange, one_process
from hanse.client import *  # noqa: F403
from hanse.client import __all__ as _client
from hanse.errors import ConfigError

__all__ = [*_client, "load_params", "params_of", "patch"]

_CLOCKED = ("_runtime", "_per_second", "_time", "epoch")  # metrics that tell how long it took


def params_of(model: Any) -> dict[str, torch.Tensor]:
    """What of a model travels: the adapters of a `peft.PeftModel`, all of any other; tensors by name, sharing the model's memory."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"a {type(model).__name__} is no model: give a torch.nn.Module, such as a PreTrainedModel or a PeftModel")
    if _has_adapters(model):
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    return dict(model.state_dict())


def load_params(model: Any, params: Mapping[str, torch.Tensor]) -> None:
    """Put in what `params_of` gave. Raises ConfigError if names or shapes are not the model's."""
    own = params_of(model)
    if wrong := [
        name for name in own.keys() | params.keys() if name not in own or name not in params or own[name].shape != params[name].shape
    ]:
        some = f"{len(wrong)} of {len(own)} tensors, such as {min(wrong)!r},"
        raise ConfigError(
            f"{some} are not the same in the model received and in this site's.", hint="Make both from the same configuration."
        )
    if _has_adapters(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, dict(params))
    else:
        model.load_state_dict(params)


def patch(trainer: Any) -> None:
    """Change `train` and `evaluate` of a `transformers.Trainer`, or one derived from it, so that they speak for the site; begins the Client
    API.

    Both load the parameters of the task at hand into `trainer.model` before they do what they did. `train` sends them afterwards, weighted
    by optimizer steps, with the metrics of an `evaluate` before it; its epochs and steps count for each round, and its optimizer begins
    anew in each. In a task to evaluate, `evaluate` is the answer. Metrics of time are left out.
    Raises ConfigError if it is no such trainer, was patched before, or runs in several processes.
    """
    for name in ("train", "evaluate", "model", "args", "state"):
        if not hasattr(trainer, name):
            raise ConfigError(f"patch got a {type(trainer).__name__}: it takes a transformers.Trainer")
    if "train" in vars(trainer):
        raise ConfigError("this trainer is patched already: call patch once, before the loop")
    one_process(trainer.args.world_size)
    exchange = Exchange()
    train, evaluate = trainer.train, trainer.evaluate
    own_optimizer = trainer.optimizer is not None
    training = False

    def load(params: Mapping[str, torch.Tensor]) -> None:
        load_params(trainer.model, params)

    def federated_train(*args: Any, **kwargs: Any) -> Any:
        nonlocal training
        exchange.take(load)
        if not own_optimizer:
            trainer.optimizer = trainer.lr_scheduler = None
        training = True
        try:
            done = train(*args, **kwargs)
        finally:
            training = False
        exchange.trained(params_of(trainer.model), int(trainer.state.global_step))
        return done

    def federated_evaluate(*args: Any, **kwargs: Any) -> Any:
        if training:  # by the trainer itself, of the model as it is then
            return evaluate(*args, **kwargs)
        exchange.take(load)
        found = evaluate(*args, **kwargs)
        exchange.measured({name: value for name, value in found.items() if not name.endswith(_CLOCKED)})
        return found

    trainer.train, trainer.evaluate = federated_train, federated_evaluate


def _has_adapters(model: Any) -> bool:
    """Whether it is a PEFT model, without importing PEFT for one that is not."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(model).__mro__)
