"""Sites with different models: three have a neural network, three a random forest. They learn from each other's scores on digits that all
of them have, and that nobody has labelled."""

import functools

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from torch import nn

from hanse import App, FedMDRecipe, FLModel, SimEnv
from hanse.partition import dirichlet

PUBLIC, TEST = 600, 297  # the rest of the 1,797 digits is the sites' own
app = App()


@functools.cache
def digits():
    x, y = load_digits(return_X_y=True)
    x, order = (x / 16).astype(np.float32), np.random.default_rng(0).permutation(len(y))
    return [(x[rows], y[rows]) for rows in np.split(order, [PUBLIC, PUBLIC + TEST])]


@functools.cache
def own_digits(rank, count):
    _, _, (x, y) = digits()
    rows = dirichlet(y, count, alpha=0.3, min_rows=30)[rank]  # few labels at each site
    return x[rows], y[rows]


def net_of(site):
    """The site's network, as it was left after the task before."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if "net" in site.state:
        net.load_state_dict({name: torch.tensor(array) for name, array in site.state["net"].items()})
    return net


def train(site, net, x, targets, epochs):
    """targets: labels, or for each row the probabilities of the labels."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(torch.tensor(x)[rows]), torch.tensor(targets)[rows]).backward()
            optimizer.step()
    site.state["net"] = {name: tensor.numpy() for name, tensor in net.state_dict().items()}


def forest_of(site):
    """The site's forest, grown anew from its own digits and the consensus: a public digit is there once for each label, with its weight."""
    x, y = own_digits(site.rank, site.count)
    weights = np.ones(len(y))
    if "scores" in site.state:
        public, scores = digits()[0][0][site.state["rows"]], site.state["scores"]
        x, y = np.concatenate([x, public.repeat(10, axis=0)]), np.concatenate([y, np.tile(range(10), len(public))])
        weights = np.concatenate([weights, scores.ravel()])
    return RandomForestClassifier(30, random_state=site.rank).fit(x[weights > 0], y[weights > 0], weights[weights > 0])


def scores_of(site, x):
    """Probabilities of the ten labels, from whichever model the site has."""
    scores = np.zeros((len(x), 10), np.float32)
    if site.rank % 2:
        forest = forest_of(site)
        scores[:, forest.classes_] = forest.predict_proba(x)
    else:
        with torch.no_grad():
            scores[:] = net_of(site)(torch.tensor(x)).softmax(1)
    return scores


@app.task("score")
def score(model, site):
    if site.rank % 2 == 0 and "net" not in site.state:
        train(site, net_of(site), *own_digits(site.rank, site.count), epochs=30)
    alone = {"alone": accuracy(site)} if model.current_round == 0 else {}
    return FLModel({"scores": scores_of(site, digits()[0][0][site.config["rows"]])}, metrics=alone)


@app.task("digest")
def digest(model, site):
    rows, scores = site.config["rows"], model.params["scores"]
    if site.rank % 2:
        site.state |= {"rows": rows, "scores": scores}
    else:
        net = net_of(site)
        train(site, net, digits()[0][0][rows], scores, epochs=10)
        train(site, net, *own_digits(site.rank, site.count), epochs=1)
    return FLModel()


def accuracy(site):
    x, y = digits()[1]
    return float(np.mean(scores_of(site, x).argmax(1) == y))


@app.evaluate
def evaluate(model, site):
    found = accuracy(site)
    return {"accuracy": found, "forests" if site.rank % 2 else "networks": found}


if __name__ == "__main__":
    recipe = FedMDRecipe(name="distillation", app=app, rounds=4, public_examples=PUBLIC, examples_per_round=400)
    run = recipe.execute(SimEnv(num_clients=6))
    first, last = run.metrics[0], run.metrics[-1]
    print(f"alone, a site's model is right on {first['alone']:.0%} of the test digits, and after {len(run.metrics)} rounds", end=" ")
    print(f"a network on {last['networks']:.0%}, a forest on {last['forests']:.0%}")
