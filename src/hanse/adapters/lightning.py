"""Lightning: a `Trainer` that takes the global model before it fits and sends the site's after it. All of the Client API is here too.

    import hanse.adapters.lightning as flare

    flare.patch(trainer)
    while flare.is_running():
        trainer.validate(model, data)   # of the global model, before it is trained
        trainer.fit(model, data)

The names are those of NVIDIA FLARE's `nvflare.client.lightning`.
"""

from __future__ import annotations

from typing import Any

from hanse.adapters.exchange import Exchange, one_process
from hanse.client import *  # noqa: F403
from hanse.client import __all__ as _client
from hanse.errors import ConfigError

__all__ = [*_client, "patch"]


def patch(trainer: Any) -> None:
    """Change `trainer.fit` and `trainer.validate`, of a `lightning.Trainer`, so that they speak for the site; begins the Client API.

    Both load the parameters of the task at hand into the LightningModule, by its `state_dict` names, before they do what they did. `fit`
    sends the state dict afterwards, weighted by optimizer steps, with the metrics of a `validate` before it; its `max_epochs` and
    `max_steps` count for each round, and optimizers begin anew in each. In a task to evaluate, `validate` is the answer.
    Raises ConfigError if it is no such trainer, was patched before, or runs in several processes.
    """
    for name in ("fit", "validate", "fit_loop"):
        if not hasattr(trainer, name):
            raise ConfigError(f"patch got a {type(trainer).__name__}: it takes a lightning.Trainer")
    if "fit" in vars(trainer):
        raise ConfigError("this trainer is patched already: call patch once, before the loop")
    one_process(trainer.world_size)
    exchange = Exchange()
    fit, validate, loop = trainer.fit, trainer.validate, trainer.fit_loop
    max_epochs, max_steps = loop.max_epochs, loop.epoch_loop.max_steps

    def federated_fit(model: Any, *args: Any, **kwargs: Any) -> None:
        exchange.take(model.load_state_dict)
        before = trainer.global_step
        if max_epochs is not None and max_epochs >= 0:
            loop.max_epochs = loop.epoch_progress.current.processed + max_epochs
        if max_steps >= 0:
            loop.epoch_loop.max_steps = before + max_steps
        fit(model, *args, **kwargs)
        if trainer.interrupted:  # Lightning takes Ctrl-C for an ordinary end
            raise KeyboardInterrupt
        exchange.trained(model.state_dict(), trainer.global_step - before)

    def federated_validate(model: Any = None, *args: Any, **kwargs: Any) -> Any:
        module = trainer.lightning_module if model is None else model
        if module is None:
            raise ConfigError("trainer.validate() has no model yet: give it one")
        exchange.take(module.load_state_dict)
        found = validate(module, *args, **kwargs)
        exchange.measured(trainer.callback_metrics)
        return found

    trainer.fit, trainer.validate = federated_fit, federated_validate
