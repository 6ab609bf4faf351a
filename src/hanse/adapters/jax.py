"""JAX: arrays in any pytree of dictionaries, lists and tuples, Flax's modules, and random keys.

JAX starts threads with its first array, and a process forked after that hangs. So nothing here makes one before a site trains.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from hanse.client.framework import Adapter
from hanse.errors import ConfigError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


class JaxAdapter(Adapter):
    """See `hanse.client.framework.Adapter`. It is Flax's too.

    Nobody can write its arrays, so that a tensor is its own twin; it has no generator of its own, see `key`; and it puts off nothing that
    starts no threads.
    """

    name = "jax"

    def params_of(self, model: Any) -> Mapping[str, Any] | None:
        return params_of(model)

    def to_array(self, value: Any) -> Array:
        value = value.get_value() if hasattr(value, "get_value") else value  # a variable of Flax
        if not isinstance(value, jax.Array):
            raise ConfigError(f"a {type(value).__module__}.{type(value).__name__} cannot travel: send arrays, numbers or strings")
        try:
            return np.asarray(value)
        except (TypeError, RuntimeError) as error:
            hint = "Send the arrays that come out of a jitted function, and of a random key jax.random.key_data(key)."
            raise ConfigError(f"a jax.Array of dtype {value.dtype} has no form as an array: {error!s:.160}", hint=hint) from error

    def from_array(self, array: Array) -> Any:
        """Shares the memory of a read-only array where JAX can, and copies any other: nobody may write a JAX array."""
        array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
        try:
            dtype = jax.dtypes.canonicalize_dtype(array.dtype)
            if dtype == array.dtype:
                return jnp.array(array) if array.flags.writeable else jnp.asarray(array)
        except TypeError as error:
            raise ConfigError(f"an array of dtype {array.dtype} has no form as a jax.Array: {error!s:.160}") from error
        hint = f"Cast the model to {dtype}, or set JAX_ENABLE_X64=1 at the sites."
        raise ConfigError(f"an array of dtype {array.dtype} would become {dtype} as a jax.Array.", hint=hint)

    def limit_threads(self, threads: int) -> None:
        flags = os.environ.get("XLA_FLAGS", "")
        if threads == 1 and _ONE_THREAD not in flags:  # read when the first array is made
            os.environ["XLA_FLAGS"] = f"{flags} {_ONE_THREAD}".strip()

    def may_fork(self) -> bool:
        from jax._src import xla_bridge

        return not xla_bridge.backends_are_initialized()


ADAPTER = JaxAdapter()


def key() -> jax.Array:
    """A random key for the task at hand. It comes from NumPy's global generator, which is seeded anew for each site and task: the first key
    of a task is the same when the task is run again, and each call gives another."""
    return jax.random.key(int(np.random.randint(1 << 31)))


def params_of(model: Any) -> dict[str, Any]:
    """The parameters of a Flax module as nested dictionaries of arrays: `nnx.Param` and batch statistics, but no random states.

    model: an `nnx.Module`, or the variables of a `linen` module in a mapping, such as a `FrozenDict`. The keys of `nnx`'s lists become
    strings. Raises ConfigError for anything else.
    """
    from flax import nnx

    if isinstance(model, Mapping):
        return {str(name): _plain(leaf) for name, leaf in model.items()}
    if not isinstance(model, nnx.Module):
        raise ConfigError(f"a {type(model).__name__} is no model: give arrays in dictionaries, lists and tuples, or an nnx.Module")
    plain: dict[str, Any] = _plain(nnx.to_pure_dict(_state_of(model)))
    return plain


def set_params_of(model: Any, params: Mapping[str, Any]) -> None:
    """Write parameters as `params_of` gives them into an `nnx.Module`. Raises ConfigError if their names or shapes are not the module's."""
    from flax import nnx

    state = _state_of(model)
    own = dict(_leaves(nnx.to_pure_dict(state)))
    given = dict(_leaves(params))
    if own.keys() != given.keys():
        raise ConfigError(f"the params do not fit the {type(model).__name__}: {sorted(own.keys() ^ given.keys())} is in one of them only")
    for name, old in own.items():
        if np.shape(given[name]) != np.shape(old):
            raise ConfigError(f"{name!r} has shape {np.shape(given[name])}, and in the {type(model).__name__} it is {np.shape(old)}")
    nnx.replace_by_pure_dict(state, _like(nnx.to_pure_dict(state), params))
    nnx.update(model, state)


def _state_of(model: Any) -> Any:
    from flax import nnx

    return nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))


def _plain(node: Any) -> Any:
    return {str(name): _plain(leaf) for name, leaf in node.items()} if isinstance(node, Mapping) else node


def _like(node: Any, params: Any) -> Any:
    """`params` with the keys of `node`, some of which may be integers."""
    return {name: _like(leaf, params[str(name)]) for name, leaf in node.items()} if isinstance(node, Mapping) else params


def _leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        return [(path, node)]
    return [leaf for name, child in node.items() for leaf in _leaves(child, f"{path}/{name}" if path else str(name))]
