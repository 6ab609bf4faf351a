"""Ten sites with two kinds of digits each: averaging after many local steps goes to and fro, SCAFFOLD goes on."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn

from hanse import App, FedAvgRecipe, FLModel, ScaffoldRecipe, SimEnv
from hanse.adapters.torch_correction import Scaffold

app = App()


@functools.cache
def digits(rank, count):
    """What lies at one site: images and labels to learn from. Site 0 has the digits 0 and 1, site 1 has 1 and 2, and so on."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[300:] / 16, dtype=torch.float32), torch.tensor(y[300:])
    rows = torch.cat([(y == rank % 10).nonzero()[::2, 0], (y == (rank + 1) % 10).nonzero()[1::2, 0]])
    return x[rows], y[rows]


@functools.cache
def unseen():
    """The first 300 images: all digits, at no site."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:300] / 16, dtype=torch.float32), torch.tensor(y[:300])


def make_net():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def batches(y):
    return [rows for _ in range(5) for rows in torch.randperm(len(y)).split(20)]


@app.train
def train(model, site):
    x, y = digits(site.rank, site.count)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    corrections = None
    if "control" in model.params:
        corrections = Scaffold(net, optimizer, model, site.state)
    else:  # FedAvg, to compare
        net.load_state_dict(model.params)
    for rows in batches(y):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        if corrections:
            corrections.apply()
        optimizer.step()
    if corrections:
        return corrections.finish(meta={"examples": len(y)})
    return FLModel(net.state_dict(), meta={"examples": len(y)})


@app.evaluate
def evaluate(model, site):
    x, y = unseen()
    net = make_net()
    net.load_state_dict(model.params)
    with torch.no_grad():
        return {"accuracy": (net(x).argmax(1) == y).float().mean().item()}


if __name__ == "__main__":
    env = SimEnv(num_clients=10)
    torch.manual_seed(0)  # for the first model, the same for both
    common = {"app": app, "model": make_net(), "rounds": 15}
    averaged = FedAvgRecipe(name="averaged", **common).execute(env)
    corrected = ScaffoldRecipe(name="scaffold", **common).execute(env)
    for name, run in (("FedAvg", averaged), ("SCAFFOLD", corrected)):
        accuracy = [metrics["accuracy"] for metrics in run.metrics]
        print(f"{name:8}  after 5 rounds {accuracy[4]:.1%}, after 15 {accuracy[14]:.1%}")
