"""Function form: the same digits and network, written as functions that take the model and the site."""

import functools
from pathlib import Path

import torch
from torch import nn
from train import Net, accuracy, digits

from hanse import App, FedAvgRecipe, FLModel, SimEnv

app = App()
digits = functools.cache(digits)  # a process reads each site's digits once


@app.train
def train(model, site):
    x, y = digits(site.rank, site.count)
    seen = len(y) * 4 // 5
    net = Net()
    net.load_state_dict(model.params)
    optimizer = torch.optim.SGD(net.parameters(), lr=site.config["lr"], momentum=0.9)
    for _ in range(2):
        for rows in torch.randperm(seen).split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
    return FLModel(params=net.state_dict(), metrics={"loss": loss}, meta={"examples": seen})


@app.evaluate
def evaluate(model, site):
    x, y = digits(site.rank, site.count)
    seen = len(y) * 4 // 5
    net = Net()
    net.load_state_dict(model.params)
    return {"accuracy": accuracy(net, x[seen:], y[seen:])}


if __name__ == "__main__":
    torch.manual_seed(0)  # for the first model
    code = [Path(__file__).with_name("train.py")]  # which this file imports, so that it is in the job folder too
    config = {"lr": 0.1}
    recipe = FedAvgRecipe(name="digits-function", app=app, code=code, model=Net(), config=config, rounds=20, stop_when="accuracy >= 0.88")
    recipe.execute(SimEnv(num_clients=8))
