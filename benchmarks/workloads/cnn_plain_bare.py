"""`device` as the textbook has it, in two bare processes of one thread each: the seconds of each round but the first, as JSON.

The same module, loaded for each site, with a DataLoader and an optimizer made for it; tensors are laid out as they come. The rest, shared
memory and a barrier a round, is that of `cnn_bare.py`. Takes the number of rounds.
"""

from __future__ import annotations

import functools
import json
import sys

import cnn
import cnn_bare
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

net = functools.cache(cnn.Net)


@functools.cache
def site_data(rank: int) -> TensorDataset:
    """The same images and labels, as they come."""
    images, labels = cnn.site_data(rank)
    return TensorDataset(torch.from_numpy(np.ascontiguousarray(images.numpy())), labels)


def fit(params: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """Train one epoch from `params` on a site's data: the new parameters and the last loss."""
    model = net()
    model.load_state_dict(params)
    optimizer = torch.optim.SGD(model.parameters(), lr=cnn.RATE)
    for images, labels in DataLoader(site_data(rank), batch_size=cnn.BATCH, shuffle=True):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    return model.state_dict(), loss.item()


if __name__ == "__main__":
    cnn_bare.fit = fit
    print(json.dumps(cnn_bare.main(int(sys.argv[1]) + 1)))
