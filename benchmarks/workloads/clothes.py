"""Fashion-MNIST, spread unevenly over sites, and a small network; the training code knows every algorithm of `convergence.py`."""

import functools

import numpy as np
import torch
from torch import nn

from hanse import App, FLModel
from hanse.adapters.torch import proximal_term
from hanse.adapters.torch_correction import FedDyn, Scaffold
from hanse.adapters.torch_personal import split, tensors

app = App()
BATCH = 50


class Net(nn.Module):
    """Grey pictures, float of shape (n, 784), to scores of shape (n, 10)."""

    def __init__(self, norm=False):
        super().__init__()
        self.body = nn.Linear(784, 64)
        self.norm = nn.BatchNorm1d(64) if norm else nn.Identity()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.body(x))))


@functools.cache  # a process reads the pictures once, for all its sites
def pictures(path):
    """Pictures and labels to learn from, pictures and labels to test with."""
    with np.load(path) as file:
        return [torch.from_numpy(file[name].reshape(-1, 784)).float() / 255 - 0.3 for name in ("x_train", "x_test")] + [
            torch.from_numpy(file[name].astype(np.int64)) for name in ("y_train", "y_test")
        ]


@functools.cache
def share(path, spread, seed, rank, count):
    """What lies at one site. How each label spreads over the sites is drawn from a Dirichlet distribution; for both parts alike."""
    parts = np.random.default_rng(seed).dirichlet([spread] * count, size=10).cumsum(axis=1)  # by label and site
    x, x_test, y, y_test = pictures(path)

    def rows(labels):
        of_each = [np.flatnonzero(labels == label) for label in range(10)]
        return np.concatenate([np.split(of, (len(of) * ends[:-1]).astype(int))[rank] for of, ends in zip(of_each, parts, strict=True)])

    seen, unseen = rows(y.numpy()), rows(y_test.numpy())
    return x[seen], y[seen], x_test[unseen], y_test[unseen]


def of_site(site):
    return share(site.config["data"], site.config["spread"], site.config["split"], site.rank, site.count)


def accuracy(net, x, y):
    with torch.no_grad():
        return (net.eval()(x).argmax(1) == y).float().mean().item()


def epoch(net, optimizer, x, y, steps, extra=None, corrections=None):
    """So many steps of SGD, each on a batch, through all pictures before any comes again."""
    order = torch.cat([torch.randperm(len(y)) for _ in range(-(-steps * BATCH // len(y)))])
    for step in range(steps):
        rows = order[step * BATCH : (step + 1) * BATCH]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        (loss + extra(net) if extra else loss).backward()
        if corrections:
            corrections.apply()
        optimizer.step()


@app.train
def train(model, site):
    x, y, _, _ = of_site(site)
    config, steps = site.config, max(1, len(y) // BATCH)
    rate, algorithm, meta = config["rate"], config["algorithm"], {"examples": len(y), "steps": steps}
    net = Net(config["norm"])
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    if algorithm in ("scaffold", "feddyn"):
        site_part = Scaffold(net, optimizer, model, site.state) if algorithm == "scaffold" else None
        site_part = site_part or FedDyn(net, model, site.state, config["feddyn_alpha"])
        epoch(net, optimizer, x, y, steps, corrections=site_part)
        return site_part.finish(meta=meta)
    net.load_state_dict(model.params)
    if algorithm == "fedrep":  # the head first, then the body, which it shares; half of the steps each
        for part in split(net, config["local_params"]):
            epoch(net, torch.optim.SGD(part, lr=rate), x, y, max(1, steps // 2))
        return FLModel(net.state_dict(), meta=meta)
    near = (lambda net: proximal_term(net, model.params, config["proximal_mu"])) if "proximal_mu" in config else None
    epoch(net, optimizer, x, y, steps, near)
    if algorithm == "ditto":
        own = Net(config["norm"])
        own.load_state_dict(tensors(site.state.get("personal", model.params)))
        local = torch.optim.SGD(own.parameters(), lr=rate)
        epoch(own, local, x, y, steps, lambda own: proximal_term(own, model.params, config["ditto_lambda"]))
        site.state["personal"] = own.state_dict()
    return FLModel(net.state_dict(), meta=meta)


@app.task("examples")
def examples(model, site):
    return FLModel(meta={"examples": len(of_site(site)[1])})


@app.evaluate
def evaluate(model, site):
    """Each site on its own unseen pictures, with its own model where it has one."""
    _, _, x, y = of_site(site)
    if not len(y):
        return FLModel(metrics={"own": float("nan")}, meta={"examples": 1e-9})
    net = Net(site.config["norm"])
    net.load_state_dict(tensors(site.state.get("personal", model.params)))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(net.eval()(x), y).item()
    return FLModel(metrics={"own": accuracy(net, x, y), "loss": loss}, meta={"examples": len(y)})
