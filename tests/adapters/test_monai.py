"""MONAI's networks and tensors go by the torch adapter, and the example trains the same bits in processes of its own."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.nets import UNet

from hanse import FedAvgRecipe, PocEnv, Run, SimEnv
from hanse.client.framework import adapter_for, from_arrays, params_of, to_arrays

EXAMPLE = Path(__file__).parents[2] / "examples" / "monai" / "job.py"


def network() -> Any:
    return UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), norm="batch")


def test_a_network_goes_there_and_back() -> None:
    torch.manual_seed(0)
    net, other = network(), network()
    params, framework = params_of(net)
    assert framework == "torch"
    other.load_state_dict(from_arrays(to_arrays(params), framework))
    image = MetaTensor(torch.rand(1, 1, 16, 16), meta={"name": "Erika Mustermann"})
    with torch.no_grad():
        np.testing.assert_array_equal(net.eval()(image), other.eval()(image))


def test_of_a_meta_tensor_only_the_numbers_travel() -> None:
    image = MetaTensor(torch.arange(4.0), meta={"name": "Erika Mustermann"})
    adapter = adapter_for(image)
    assert adapter is not None
    assert adapter.name == "torch"
    array = to_arrays({"image": image})["image"]
    assert type(array) is np.ndarray
    np.testing.assert_array_equal(array, [0, 1, 2, 3])


def test_the_example_has_the_same_bits_in_processes_of_its_own(tmp_path: Path) -> None:
    """On the discs, with MONAI's network and random transforms."""
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    recipe = FedAvgRecipe(name="monai", app=example["app"], model=example["network"](), config={"data": ""}, rounds=1)
    simulated, real = (recipe.execute(env(num_clients=2, runs=tmp_path / env.__name__, console="quiet")) for env in (SimEnv, PocEnv))

    def bits(run: Run) -> dict[str, bytes]:
        return {name: np.asarray(array).tobytes() for name, array in run.get_result().params.items()}

    assert bits(simulated) == bits(real)
    assert simulated.metrics == real.metrics
    assert simulated.metrics[0]["loss"] < 0.69  # of two kinds, ln 2 is chance
