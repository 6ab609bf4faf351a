"""The Client API behind a script that was started alone: `python script.py` is a job with one site, for debugging.

    HANSE_ROUNDS    how many rounds, 2 if not set
    HANSE_MODEL     a .safetensors file with the first model

Without a file, the first model is that of the one model object (a torch.nn.Module, a fitted scikit-learn estimator) among the variables of
the code that asks for it; a printed line says which. With none, or several, the first model has no parameters.
Each round's model is what the round before it sent: FULL parameters as they are, DIFF added to those it got.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np

from hanse.client.framework import adapter_for, from_arrays, map_leaves, params_of, to_arrays
from hanse.client.session import SiteInfo
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.task import TRAIN
from hanse.messages.update import Record


class StandaloneSession:
    """See `hanse.client.session.Session`. Prints one line a round; logged values are dropped, and counted in that line."""

    def __init__(self) -> None:
        self.info = SiteInfo("site-1")
        self.task_name = ""
        self.state: dict[str, Any] = {}
        self._rounds = _rounds()
        self._round = 0
        self._arrays: Any = None
        self._framework: str | None = None
        self._received = False
        self._logged = 0
        self._began_s = 0.0

    def is_running(self) -> bool:
        if self._round < self._rounds:
            self.task_name = TRAIN
            return True
        return False

    def receive(self, within_s: float | None = None) -> FLModel | None:
        if not self.is_running():
            return None
        if self._round == 0 and not self._received:
            self._arrays, self._framework = _first_model()
        self._received = True
        self._began_s = time.perf_counter()
        return FLModel(from_arrays(self._arrays, self._framework), current_round=self._round, total_rounds=self._rounds)

    def send(self, model: FLModel) -> None:
        if not self._received:
            raise ConfigError("send was called with no task at hand: call receive() first")
        arrays = to_arrays(model.params)
        if arrays is not None:
            added = model.params_type is ParamsType.DIFF
            self._arrays = _read_only(_sum(self._arrays, arrays) if added else arrays)
        self._round, self._received = self._round + 1, False
        said = [f"{name} {float(value):.6g}" for name, value in model.metrics.items()]
        said += [f"{self._logged} logged values"] if self._logged else []
        seconds = time.perf_counter() - self._began_s
        print(f"hanse: round {self._round} of {self._rounds}: {', '.join(said) or 'no metrics'} ({seconds:.2f} s)", flush=True)
        self._logged = 0

    def record(self, record: Record) -> None:
        self._logged += 1


def _rounds() -> int:
    text = os.environ.get("HANSE_ROUNDS", "2")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"HANSE_ROUNDS is {text!r}: it must be a whole number of rounds, 1 or more")
    return int(text)


def _first_model() -> tuple[Any, str | None]:
    """The first model's arrays, and the framework whose tensors the script wants."""
    models = {id(value): (name, *given) for name, value in _variables() if (given := _params(value))}
    start = f"hanse: one site, {_rounds()} rounds; the first model"
    if path := os.environ.get("HANSE_MODEL"):
        from hanse.messages.codec import read  # not needed by a script that runs in a job

        frameworks = {framework for _, _, framework in models.values()}
        print(f"{start} is {path}", flush=True)
        return read(path)[0].params, frameworks.pop() if len(frameworks) == 1 else None
    if len(models) == 1:
        [(name, params, framework)] = models.values()
        print(f"{start} is that of variable {name!r}", flush=True)
        return _read_only(to_arrays(params)), framework
    names = ", ".join(sorted(name for name, _, _ in models.values()))
    why = f"the variables {names} all are models" if models else "no variable is a model"
    print(f"{start} has no parameters: {why}. HANSE_MODEL=FILE gives one.", flush=True)
    return None, None


def _params(value: Any) -> tuple[Any, str | None] | None:
    """The parameters of a model object; None for any other value, a class, or a model that has none (a loss, an unfitted estimator)."""
    if isinstance(value, type) or adapter_for(value) is None:
        return None
    try:
        params, framework = params_of(value)
    except ConfigError:
        return None
    return (params, framework) if params else None


def _variables() -> Iterator[tuple[str, Any]]:
    """The variables of every function that is being called, and of their modules, outermost first; not the Client API's own."""
    frames = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("hanse.client"):
            frames.append(frame)
        frame = frame.f_back
    for frame in reversed(frames):
        yield from [*frame.f_globals.items(), *frame.f_locals.items()]


def _read_only(params: Any) -> Any:
    """Copies that nobody else writes to."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = leaf.copy()
            leaf.flags.writeable = False
        return leaf

    return map_leaves(copy, params)


def _sum(params: Any, difference: Any) -> Any:
    """params + difference, in the dtypes of params; what has no difference stays."""
    if isinstance(difference, dict):
        known = params.keys() if isinstance(params, dict) else {}
        if missing := difference.keys() - known:
            raise ConfigError(f"a DIFF was sent for parameters that the model does not have, {sorted(missing)}: send FULL")
        return params | {name: _sum(params[name], part) for name, part in difference.items()}
    if isinstance(difference, list | tuple):
        return [_sum(old, part) for old, part in zip(params, difference, strict=True)]
    return (params + difference).astype(params.dtype) if isinstance(params, np.ndarray) else params + difference
