"""The Client API: what a training script calls. Names and meanings are NVIDIA FLARE's, so that only the import changes.

    import hanse.client as flare

    flare.init()
    while flare.is_running():                       # waits for the next task; False once the job is over
        model = flare.receive()
        net.load_state_dict(model.params)
        ...
        flare.send(flare.FLModel(params=net.state_dict(), metrics={"accuracy": accuracy}, meta={"steps": steps}))

A script started alone (`python script.py`) runs the same loop as a single site: see `hanse.client.standalone`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from hanse.client.framework import number
from hanse.client.session import Session, entered
from hanse.client.standalone import StandaloneSession
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.task import EVALUATE, SUBMIT_MODEL, TRAIN
from hanse.messages.update import Record

__all__ = [
    "FLModel",
    "ParamsType",
    "evaluate",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_state",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "receive",
    "send",
    "shutdown",
    "system_info",
    "train",
]


@dataclass(slots=True)
class _Use:
    """What one script has done with its session."""

    session: Session
    received: FLModel | None = None  # and not yet answered
    metrics: Mapping[str, float] | None = None  # from @evaluate, to go with the next answer
    shut_down: bool = False


_use: ContextVar[_Use] = ContextVar("hanse_use")
_standalone: _Use | None = None  # a script started alone has its process to itself: all its threads share this


def init(rank: str | int | None = None) -> None:
    """Begin to use the Client API. Calling it again does nothing.

    rank: of this process among those that `hanse.adapters.torchrun` has started, which know it anyway; else 0 or None.
    """
    global _standalone
    known = "0" if entered() is None else os.environ.get("RANK", "0")
    if rank is not None and str(rank) != known:
        raise ConfigError(f"init(rank={rank!r}): this process is a site's process {known}; hanse.adapters.torchrun starts several")
    if session := entered():
        if _use.get(None) is None:
            _use.set(_Use(session))
    elif _standalone is None:
        _standalone = _Use(StandaloneSession())


def receive(timeout: float | None = None) -> FLModel | None:
    """The model of the task at hand, waiting for the next one if the last was answered; None once the job is over.

    timeout: seconds to wait at most, None if none came by then; a simulated site's waiting takes no time and is not counted.
    Parameters are in the framework's tensors if the job's model came from it. NumPy arrays are read-only: copy one before changing it.
    """
    use = _current()
    if use.received is None and not use.shut_down:
        use.received = use.session.receive(timeout)
    return use.received


def send(model: FLModel, clear_cache: bool = True) -> None:
    """Answer the task at hand, once, with parameters, metrics or both; meta["steps"] or meta["examples"] is the answer's weight.

    clear_cache: let go of the parameters, by setting `params` to None in `model` and in the model received.
    """
    use = _current()
    if not isinstance(model, FLModel):
        raise ConfigError(f"send got a {type(model).__name__}: it takes an FLModel")
    if use.received is None:
        raise ConfigError("send was called with no task at hand: call receive() first, and send once for each model received")
    if model.params is None and not model.metrics:
        raise ConfigError("the model to send has neither params nor metrics")
    meta = dict(model.meta)
    if "NUM_STEPS_CURRENT_ROUND" in meta:  # FLARE's name
        meta.setdefault("steps", meta.pop("NUM_STEPS_CURRENT_ROUND"))
    answer = replace(model, meta=meta, metrics=dict(model.metrics))
    received, use.received, use.metrics = use.received, None, None
    if clear_cache:
        received.params = model.params = None
        received.optimizer_params = model.optimizer_params = {}
    use.session.send(answer)


def is_running() -> bool:
    """Wait for the next task. False once the job is over. A task that was received and not answered by then counts as failed."""
    use = _current()
    use.received = use.metrics = None
    return not use.shut_down and use.session.is_running()


def is_train() -> bool:
    """Whether the task at hand is to train."""
    return get_task_name() == TRAIN


def is_evaluate() -> bool:
    """Whether the task at hand is to evaluate the received model and send metrics only."""
    return get_task_name() == EVALUATE


def is_submit_model() -> bool:
    """Whether the task at hand is to send the site's own model."""
    return get_task_name() == SUBMIT_MODEL


def get_task_name() -> str:
    """The name of the task at hand; empty before the first."""
    return _current().session.task_name


def get_job_id() -> str:
    """The job's id."""
    return _current().session.info.job_id


def get_site_name() -> str:
    """This site's name."""
    return _current().session.info.name


def get_config() -> dict[str, Any]:
    """The site's configuration with that of the task at hand laid over it: JSON values."""
    return dict(_current().session.info.config)


def get_state() -> dict[str, Any]:
    """What the site keeps between tasks, always the same dictionary: JSON values and arrays under names, as in `hanse.Site.state`.

    It is filled when a task is received, and kept as it is when the answer is sent, also if the script's process is killed after that.
    Tensors come back as arrays.
    """
    return _current().session.state


def system_info() -> dict[str, Any]:
    """job_id, site_name, the site's rank among the job's sites, counted from 0, and their count."""
    info = _current().session.info
    return {"job_id": info.job_id, "site_name": info.name, "rank": info.rank, "count": info.count}


def log(key: str, value: Any, data_type: object = "SCALAR", **kwargs: Any) -> None:
    """Send one logged value to the server. The writers in `hanse.client.tracking` are nicer to use.

    data_type: SCALAR, METRIC, TEXT, PARAMETER or TAG, as text or as a FLARE enumeration; or the plural with a mapping of names to values.
    kwargs: `global_step`, the trainer's own counter; others are taken and not used.
    """
    session = _current().session
    step = kwargs.get("global_step")
    for name, one, kind in _spread(key, value, str(getattr(data_type, "name", data_type)).upper()):
        session.record(Record(name, _plain(name, one, kind), None if step is None else int(step), kind))


def shutdown() -> None:
    """Take no more tasks: `is_running` is False and `receive` gives None from here on."""
    use = _current()
    use.shut_down, use.received = True, None


def train(_func: Callable[..., FLModel] | None = None, **root_kwargs: Any) -> Callable[..., Any]:
    """Decorate a training function: each call receives a model, hands it over as the first argument, and sends the FLModel returned.

    Metrics of a function decorated with `evaluate` and called before it go with the answer.
    """

    def decorate(function: Callable[..., FLModel]) -> Callable[..., FLModel]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> FLModel:
            answer = _with_received(function, args, kwargs)
            if not isinstance(answer, FLModel):
                raise ConfigError(f"{function.__qualname__} returned a {type(answer).__name__}: a @train function returns an FLModel")
            if (metrics := _current().metrics) is not None:
                answer.metrics = metrics
            kept = replace(answer)  # what the caller gets is whole
            send(answer)
            return kept

        return wrapped

    return decorate if _func is None else decorate(_func)


def evaluate(_func: Callable[..., Any] | None = None, **root_kwargs: Any) -> Callable[..., Any]:
    """Decorate an evaluation function that returns a number, known as metric "metric", or a mapping of names to numbers.

    Each call receives a model and hands it over as the first argument. In a training task the metrics wait for the answer of the function
    decorated with `train`; in any other they are the answer.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = _with_received(function, args, kwargs)
            if result is None:
                raise ConfigError(f"{function.__qualname__} returned None: an @evaluate function returns a number or a mapping of metrics")
            metrics = result if isinstance(result, Mapping) else {"metric": result}
            if is_train():
                _current().metrics = metrics
            else:
                send(FLModel(metrics=metrics))
            return result

        return wrapped

    return decorate if _func is None else decorate(_func)


def _current() -> _Use:
    use = _use.get(None) if entered() else _standalone
    if use is None:
        raise ConfigError(
            "the Client API is used before init().",
            hint="Call init() first, in the thread that runs the script; other threads cannot use it.",
        )
    return use


def _with_received(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call it with the received model in the place of its first parameter, whatever the caller put there."""
    first = next(iter(inspect.signature(function).parameters))
    kwargs.pop(first, None)
    return function(receive(), *args[1:], **kwargs)


_KINDS = {"SCALAR": "scalar", "METRIC": "scalar", "TEXT": "text", "PARAMETER": "param", "TAG": "tag"}


def _spread(key: str, value: Any, data_type: str) -> list[tuple[str, Any, str]]:
    """One (key, value, kind) for each logged value. Scalars are named "key/name" as TensorBoard does, the other plurals by name."""
    kind = _KINDS.get(data_type) or _KINDS.get(data_type.removesuffix("S"))
    if kind is None:
        raise ConfigError(f"log({key!r}): data_type is {data_type}; it must be one of {', '.join(_KINDS)}, or the plural of one")
    if data_type in _KINDS:
        return [(key, value, kind)]
    if not isinstance(value, Mapping):
        raise ConfigError(f"log({key!r}): {data_type} takes a mapping of names to values, not a {type(value).__name__}")
    prefix = f"{key}/" if data_type == "SCALARS" else ""
    return [(f"{prefix}{name}", one, kind) for name, one in value.items()]


def _plain(key: str, value: Any, kind: str) -> Any:
    """A JSON value: a number for a scalar, text for what has no other form."""
    plain = number(value)
    if kind != "scalar":
        return str(value) if plain is None else plain
    if plain is None:
        raise ConfigError(f"log({key!r}): a {type(value).__name__}, {value!r:.60}, is no number")
    return float(plain)
