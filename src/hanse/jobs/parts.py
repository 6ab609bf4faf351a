"""Parts of a job that a file can describe: aggregators, server optimizers, filters, recipes, each registered under a short name.

A part is described by its kind and its constructor's arguments, which it keeps under the same names. Kinds are entry points, so another
package's parts are found as ours are, and a job file never names a class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import msgspec

from hanse.errors import ConfigError, NotInstalled


@functools.cache
def kinds(group: str) -> Mapping[str, type]:
    """The classes registered in `hanse.<group>`, by kind."""
    return {point.name: point.load() for point in entry_points(group=f"hanse.{group}")}


def part_of(group: str, description: Mapping[str, Any]) -> Any:
    """The part that `describe_part` described. Raises ConfigError for wrong arguments, NotInstalled for an unknown kind."""
    arguments = dict(description)
    kind = arguments.pop("kind", None)
    if kind not in kinds(group):
        raise NotInstalled(f"no {kind!r} among the {group.replace('_', ' ')}; there are: {', '.join(sorted(kinds(group)))}.")
    part = kinds(group)[kind]
    try:
        known = inspect.signature(part).parameters
        if unknown := arguments.keys() - known.keys():
            raise TypeError(f"no argument {min(unknown)!r}; it takes {', '.join(known) or 'none'}")
        return msgspec.convert(arguments, part) if hasattr(part, "__dataclass_fields__") else part(**arguments)
    except (TypeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{kind}: {error}") from error


def describe_part(group: str, part: Any) -> dict[str, Any] | None:
    """The part as JSON values, without what is None by default, as TOML has no such value; None if its class is not registered."""
    for kind, registered in kinds(group).items():
        if type(part) is registered:
            arguments = {name: (getattr(part, name), about.default) for name, about in inspect.signature(registered).parameters.items()}
            return {"kind": kind} | {
                name: msgspec.to_builtins(value) for name, (value, usual) in arguments.items() if (value, usual) != (None, None)
            }
    return None
