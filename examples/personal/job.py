"""Twelve sites that name the same digits differently: one model for all cannot serve them, a shared body with a head for each can.

FedRep: in each round a site trains its own head first, then the body, and only the body leaves it.
"""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn

from hanse import App, FedAvgRecipe, FLModel, PersonalRecipe, SimEnv
from hanse.adapters.torch_personal import split

app = App()
SEEN = 30  # of the images at a site; the others are for the accuracy


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.body(x))


@functools.cache
def digits(rank, count):
    """A part of the digits. What one site calls 3, the next one calls 4."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[rank::count] / 16, dtype=torch.float32), torch.tensor((y[rank::count] + rank) % 10)


def epochs(net, params, x, y, number):
    optimizer = torch.optim.SGD(params, lr=0.2)
    for _ in range(number):
        for rows in torch.randperm(len(y)).split(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()


@app.train
def train(model, site):
    x, y = digits(site.rank, site.count)
    net = Net()
    net.load_state_dict(model.params)  # with the site's own head, from its last round
    if "local_params" in site.config:
        head, body = split(net, site.config["local_params"])
        epochs(net, head, x[:SEEN], y[:SEEN], 4)
        epochs(net, body, x[:SEEN], y[:SEEN], 4)
    else:  # FedAvg, to compare
        epochs(net, net.parameters(), x[:SEEN], y[:SEEN], 4)
    return FLModel(net.state_dict(), meta={"examples": SEEN})


def accuracy(net, x, y):
    with torch.no_grad():
        return (net(x[SEEN:]).argmax(1) == y[SEEN:]).float().mean().item()


@app.evaluate
def evaluate(model, site):
    net = Net()
    net.load_state_dict(model.params)
    return {"accuracy": accuracy(net, *digits(site.rank, site.count))}


def alone(rank, count):
    """The accuracy of a site that trains by itself."""
    x, y = digits(rank, count)
    net = Net()
    epochs(net, net.parameters(), x[:SEEN], y[:SEEN], 160)
    return accuracy(net, x, y)


if __name__ == "__main__":
    env = SimEnv(num_clients=12)
    torch.manual_seed(0)  # for the first model, the same for both
    common = {"app": app, "model": Net(), "rounds": 20}
    shared = FedAvgRecipe(name="shared", **common).execute(env)
    personal = PersonalRecipe(name="personal", local=["head.*"], **common).execute(env)
    print(f"one model for all {shared.metrics[-1]['accuracy']:.1%}, a head for each {personal.metrics[-1]['accuracy']:.1%},", end=" ")
    print(f"each site alone {sum(alone(rank, 12) for rank in range(12)) / 12:.1%}")
