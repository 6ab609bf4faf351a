"""Eight sites, each with a mix of clothes of its own, train one network to tell ten kinds of clothes apart.

The pictures are Fashion-MNIST, looked for in $HANSE_DATA, or else in ../shared/data beside the repository. Where they are missing,
scikit-learn's handwritten digits take their place: fewer and smaller, but as real.
"""

import functools
import os
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from hanse import App, FedAvgRecipe, FLModel, SimEnv

app = App()


class Net(nn.Module):
    """Grey pictures, bytes of shape (n, side, side), to scores of shape (n, 10)."""

    def __init__(self, side):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.scores = nn.Linear(16 * (side // 4) ** 2, 10)

    def forward(self, pictures):
        return self.scores(self.features(pictures[:, None].float() / 255))


@functools.cache  # a process reads the pictures once, for all its sites
def pictures(path):
    """Pictures and labels to learn from, pictures and labels to test with. Digits if there is no path."""
    if path:
        with np.load(path) as file:
            arrays = [file[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    else:
        x, y = (load_digits().images * 15).astype(np.uint8), load_digits().target
        arrays = [x[300:], y[300:], x[:300], y[:300]]
    return [torch.tensor(array) for array in arrays]


@functools.cache
def share(path, rank, count):
    """The part of the pictures that lies at one site. How each label spreads over the sites is drawn from a Dirichlet distribution."""
    spread = np.random.default_rng(0).dirichlet([0.5] * count, size=10).cumsum(axis=1)  # by label and site

    def rows(labels):
        of_each = [np.flatnonzero(labels == label) for label in range(10)]
        return np.concatenate([np.split(of, (len(of) * ends[:-1]).astype(int))[rank] for of, ends in zip(of_each, spread, strict=True)])

    x, y, x_test, y_test = pictures(path)
    seen, unseen = rows(y.numpy()), rows(y_test.numpy())
    return x[seen], y[seen].long(), x_test[unseen], y_test[unseen].long()


def received(model, x):
    net = Net(x.shape[-1])
    net.load_state_dict(model.params)
    return net


@app.train
def train(model, site):
    x, y, _, _ = share(site.config["data"], site.rank, site.count)
    net = received(model, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(site.config["steps"]):
        rows = torch.randint(len(y), (32,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return FLModel(params=net.state_dict(), metrics={"loss": np.mean(losses)}, meta={"examples": len(y)})


@app.evaluate
def evaluate(model, site):
    _, _, x, y = share(site.config["data"], site.rank, site.count)
    with torch.no_grad():
        right = received(model, x)(x).argmax(1) == y
    return FLModel(metrics={"accuracy": right.float().mean()}, meta={"examples": len(y)})


if __name__ == "__main__":
    folder = os.environ.get("HANSE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    data = Path(folder, "fashion_mnist.npz").resolve()
    if data.is_file():
        print("Fashion-MNIST: 60,000 pictures to learn from and 10,000 to test with, at eight sites.\n")
    else:
        print(f"There is no {data}; HANSE_DATA names another folder.")
        print("Instead, scikit-learn's handwritten digits: 1,497 to learn from and 300 to test with, at eight sites.\n")
    config = {"data": str(data) if data.is_file() else "", "steps": 50}
    torch.manual_seed(0)  # for the first model
    model = Net(side=pictures(config["data"])[0].shape[-1])
    FedAvgRecipe(name="demo", app=app, model=model, rounds=10, config=config).execute(SimEnv(num_clients=8))
