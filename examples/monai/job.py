"""Pneumonia on chest X-rays (PneumoniaMNIST) with a network and transforms of MONAI, at three hospitals.

The data are looked for in $HANSE_DATA, or else in ../shared/data beside the repository. Where they are missing, bright discs on noise
take their place. A MONAI network is a torch module, so nothing here is special to Hanse. `python job.py poc` makes the sites processes of
their own, with certificates and mutual TLS.
"""

import functools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import DenseNet
from monai.transforms import Compose, RandFlip, RandRotate, ScaleIntensity

from hanse import App, FedAvgRecipe, FLModel, PocEnv, SimEnv

app = App()
IMAGES = 240  # of each site
folder = os.environ.get("HANSE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"


def network():
    return DenseNet(spatial_dims=2, in_channels=1, out_channels=2, init_features=8, growth_rate=8, block_config=(2, 2), norm="instance")


def discs(count):
    """Images like the X-rays in form: every second one has a bright disc."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % 2
    at = rng.integers(8, 20, (count, 2, 1, 1))
    inside = ((np.indices((28, 28)) - at) ** 2).sum(1) < 25
    return (rng.integers(0, 100, (count, 28, 28)) + 120 * (inside & (y == 1)[:, None, None])).astype("u1"), y


@functools.cache
def share(rank, count, path):
    """The site's images, shape (images, 1, 28, 28), and labels: 1 is pneumonia. The last fifth is for the accuracy."""
    if path:
        data = np.load(path)
        x, y = data["x_train"], data["y_train"].reshape(-1)
        each = [np.flatnonzero(y == label)[rank * IMAGES // 2 : (rank + 1) * IMAGES // 2] for label in (0, 1)]
        rows = np.stack(each, axis=1).reshape(-1)  # as many of both, in turn
        x, y = x[rows], y[rows]
    else:
        x, y = discs(IMAGES * count)
        x, y = x[rank::count], y[rank::count]
    images = torch.stack([torch.as_tensor(ScaleIntensity()(image[None].astype("f4"))) for image in x])
    seen = len(y) * 4 // 5
    return images[:seen], torch.tensor(y[:seen]), images[seen:], torch.tensor(y[seen:])


@app.train
def train(model, site):
    x, y, _, _ = share(site.rank, site.count, site.config["data"])
    augment = Compose([RandFlip(prob=0.5, spatial_axis=1), RandRotate(range_x=0.1, prob=0.5)])
    augment.set_random_state(seed=int(site.rng.integers(1 << 31)))  # MONAI's transforms do not follow a global generator
    net = network()
    net.load_state_dict(model.params)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(2):
        for rows in torch.randperm(len(y)).split(16):
            images = torch.stack([torch.as_tensor(augment(x[row])) for row in rows])
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(images), y[rows])
            loss.backward()
            optimizer.step()
    return FLModel(params=net.state_dict(), metrics={"loss": loss}, meta={"examples": len(y)})


@app.evaluate
def evaluate(model, site):
    _, _, x, y = share(site.rank, site.count, site.config["data"])
    net = network().eval()
    net.load_state_dict(model.params)
    with torch.no_grad():
        return {"accuracy": (net(x).argmax(1) == y).float().mean().item()}


if __name__ == "__main__":
    torch.manual_seed(0)  # for the first model
    data = Path(folder, "pneumoniamnist.npz")
    if not data.is_file():
        print(f"There is no {data}; HANSE_DATA names another folder. Instead: bright discs on noise.\n")
    Env = PocEnv if "poc" in sys.argv[1:] else SimEnv
    config = {"data": str(data) if data.is_file() else ""}
    recipe = FedAvgRecipe(name="monai", app=app, model=network(), config=config, rounds=4)
    recipe.execute(Env(num_clients=3))
