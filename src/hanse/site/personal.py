"""Parameters that a site keeps to itself: they come from its own last task, go into the next, and never leave.

A job names them by patterns, in the config key `local_params`. They are kept in the site's state under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import flatten, unflatten

LOCAL = "local_params"
"""The key of the patterns in a job's config, and of the values in a site's state."""

Array = np.ndarray[Any, np.dtype[Any]]


def recall(model: FLModel, config: Mapping[str, Any], state: Mapping[str, Any]) -> FLModel:
    """The model with this site's own values of the parameters that it keeps; itself if it has none yet."""
    own = state.get(LOCAL) if config.get(LOCAL) else None
    if not own or model.params is None:
        return model
    arrays, structure = flatten(model.params)
    return replace(model, params=unflatten(arrays | {name: own[name] for name in arrays if name in own}, structure))


def keep(answer: FLModel, given: FLModel, config: Mapping[str, Any]) -> tuple[FLModel, dict[str, Array]]:
    """The answer without the parameters that stay here, and those, copied, as they are after the task.

    given: the model as the site got it, in arrays. What stays is listed in `meta["excluded"]`, so that it is not missing by mistake.
    Raises ConfigError if no parameter has such a name: then nothing would be kept, and all would leave.
    """
    if not (patterns := config.get(LOCAL)) or answer.params is None:
        return answer, {}
    arrays, _ = flatten(answer.params)
    known = {} if given.params is None else flatten(given.params)[0]
    local = {name for name in (*arrays, *known) if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not local:
        raise ConfigError(f"{LOCAL} is {list(patterns)}, and no parameter has such a name: the first is {next(iter(arrays), None)!r}")
    is_diff = answer.params_type is ParamsType.DIFF
    kept = {name: np.array(known[name] + arrays[name] if is_diff else arrays[name]) for name in local if name in arrays}
    sent = {name: array for name, array in arrays.items() if name not in local}
    excluded = sorted(local | set(answer.meta.get("excluded", ())))
    return replace(answer, params=sent, meta={**answer.meta, "excluded": excluded}), kept
