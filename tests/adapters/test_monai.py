"""MONAI's networks and tensors go by the torch adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.nets import UNet

from hanse.client.framework import adapter_for, from_arrays, params_of, to_arrays


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
