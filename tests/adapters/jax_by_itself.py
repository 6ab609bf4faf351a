"""What `test_jax.py` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import freeze

from hanse import FedAvgRecipe, FLModel, PocEnv, SimEnv, resume
from hanse.adapters.jax import ADAPTER, key, params_of, set_params_of
from hanse.client.framework import adapter_for, from_arrays, may_fork, to_arrays, twins
from hanse.client.framework import params_of as framework_params_of
from hanse.errors import ConfigError, JobFailed

CODE = """
import jax
import jax.numpy as jnp
import numpy as np
from hanse import App, FLModel
from hanse.adapters.jax import key

app = App()

@app.train
def train(model, site):
    leaves, form = jax.tree.flatten(model.params)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves), form
    if site.config.get("fails") and model.current_round == 1:
        raise OSError(f"no data, {form}")
    noise = jax.random.normal(key(), (3,)) + jax.random.normal(key(), (3,)) + np.random.normal()
    params = jax.tree.map(lambda leaf: (leaf @ leaf.T @ leaf * 0.1 if leaf.ndim == 2 else leaf + noise).astype(leaf.dtype), model.params)
    return FLModel(params=params, metrics={"loss": noise.sum()}, meta={"examples": site.rank + 1})
"""


def pytree(array: Callable[..., Any]) -> dict[str, Any]:
    return {
        "dense": {"kernel": array(np.arange(6, dtype="f4").reshape(2, 3)), "bias": array(np.zeros(3, ml_dtypes.bfloat16))},
        "blocks": [array(np.ones(3, "f4")), (array(np.ones(3, "f2")),)],
    }


def test_before_the_first_array_it_may_fork() -> None:
    """Has to be the first test here."""
    assert may_fork()
    jnp.ones(1)
    assert not may_fork()


def bits(run: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.get_result().params)]


def test_a_pytree_goes_round_to_the_same_bits_everywhere(load: Callable[[str], Any], tmp_path: Path) -> None:
    """This process has arrays, so its simulated sites are fresh interpreters; the job given as NumPy arrays starts from the same bits."""
    recipe = FedAvgRecipe(name="tree", app=load(CODE).app, model=pytree(jnp.asarray), rounds=2)
    assert recipe.first_model()[1] == "jax"
    runs = [recipe.execute(SimEnv(num_clients=2, workers=workers, runs=tmp_path, console="quiet")) for workers in (1, 2)]
    same = replace(recipe, model=pytree(np.asarray), framework="jax")
    runs.append(same.execute(PocEnv(num_clients=2, runs=tmp_path, console="quiet")))
    params = runs[0].get_result().params
    assert jax.tree.structure(params) == jax.tree.structure(pytree(np.asarray))
    assert [leaf.dtype.name for leaf in jax.tree.leaves(params)] == ["float32", "float16", "bfloat16", "float32"]
    assert bits(runs[0]) == bits(runs[1]) == bits(runs[2])
    assert runs[0].metrics == runs[2].metrics


def test_a_job_that_broke_goes_on(load: Callable[[str], Any], tmp_path: Path) -> None:
    app = load(CODE).app
    recipe = FedAvgRecipe(name="tree", app=app, model=pytree(jnp.asarray), rounds=3)
    env = SimEnv(num_clients=2, runs=tmp_path, console="quiet")
    with pytest.raises(JobFailed, match="no data, PyTreeDef") as failed:
        replace(recipe, config={"fails": True}).execute(env)
    folder = Path(failed.value.folder)
    job = folder / "job" / "job.yaml"
    job.write_text(job.read_text().replace("fails: true", "fails: false"))
    assert bits(resume(folder, console="quiet")) == bits(recipe.execute(env))


def test_an_app_in_no_file_says_why_it_cannot_run(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "cell"}
    exec(CODE, names)  # noqa: S102, as a notebook does
    recipe = FedAvgRecipe(name="cell", app=names["app"], model={"w": jnp.ones(3)}, rounds=1)
    with pytest.raises(ConfigError, match="This process holds a framework's threads, such as JAX's"):
        recipe.execute(SimEnv(num_clients=2, runs=tmp_path, console="quiet"))


@pytest.mark.parametrize("dtype", ["f2", "f4", "i4", "u1", "?", "c8", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_there_and_back(dtype: Any) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    back = to_arrays({"x": from_arrays({"x": array}, "jax")["x"]})["x"]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_nobody_can_change_what_a_site_was_given() -> None:
    array = np.zeros(1000, "f4")
    given = ADAPTER.from_array(array)
    array += 1
    assert float(given.sum()) == 0
    assert twins({"x": given}, "jax")["x"] is given
    with pytest.raises(ValueError, match="read-only"):
        ADAPTER.to_array(given)[0] = 1


def test_byte_order_is_mended() -> None:
    np.testing.assert_array_equal(ADAPTER.from_array(np.array([1, 2], ">f4")), [1, 2])


@pytest.mark.parametrize(("array", "says"), [(np.zeros(2), "float64 would become float32"), (np.array(["a"]), "<U1 has no form")])
def test_what_has_no_form_in_jax(array: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ADAPTER.from_array(array)


def test_what_cannot_travel() -> None:
    with pytest.raises(ConfigError, match="key_data"):
        to_arrays({"key": jax.random.key(0)})
    with pytest.raises(ConfigError, match="no form as an array"):
        jax.jit(lambda x: ADAPTER.to_array(x))(jnp.ones(2))
    with pytest.raises(ConfigError, match="cannot travel"):
        ADAPTER.to_array(jax.ShapeDtypeStruct((1,), jnp.float32))


def test_mixed_frameworks_are_refused_below_the_top_too() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="mixes tensors of jax and torch"):
        framework_params_of({"a": [jnp.ones(1), {"b": torch.ones(1)}]})


def test_keys_follow_the_seed() -> None:
    def drawn(seed: int) -> list[Any]:
        np.random.seed(seed)
        return [jax.random.key_data(key()).tolist() for _ in range(2)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1)[0] != drawn(1)[1]


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.layers[1](self.dropout(self.norm(jnp.tanh(self.layers[0](x)))))


def test_flax_nnx() -> None:
    first, second = Net(0), Net(1)
    params, framework = framework_params_of(first)
    assert framework == "jax"
    assert set(params) == {"layers", "norm"}  # the state of dropout's generator stays
    assert set(params["layers"]) == {"0", "1"}
    assert set(params["norm"]) == {"scale", "bias", "mean", "var"}
    travelled = FLModel(to_arrays(params)).params
    set_params_of(second, from_arrays(travelled, "jax"))
    for net in (first, second):
        net.eval()
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("f4")
    np.testing.assert_array_equal(first(x), second(x))
    with pytest.raises(ConfigError, match="the params do not fit the Net"):
        set_params_of(second, {**params, "other": np.zeros(1)})
    with pytest.raises(ConfigError, match=r"'norm/bias' has shape \(3,\), and in the Net it is \(4,\)"):
        set_params_of(second, {**params, "norm": {**params["norm"], "bias": np.zeros(3)}})


def test_flax_linen() -> None:
    net = linen.Dense(2)
    variables = net.init(jax.random.key(0), jnp.ones((1, 3)))
    for given in (variables, freeze(variables)):
        params, framework = framework_params_of(given)
        assert framework == "jax"
        back = from_arrays(to_arrays(params), "jax")
        np.testing.assert_array_equal(net.apply(back, jnp.ones((1, 3))), net.apply(variables, jnp.ones((1, 3))))
    with pytest.raises(ConfigError, match="Dense is no model"):
        params_of(net)
    assert adapter_for(net) is ADAPTER
