"""A thousand small sites, trained many at once: handwritten digits, each site with a few images."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn

from hanse import App, FedAvgRecipe, SimEnv
from hanse.adapters.local_sgd import LocalSGD

SITES = 1000


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


@functools.cache
def data(rank):
    """Stands in for what a site has: 4 to 12 of the 1,500 images for training, drawn for it."""
    drawn = torch.Generator().manual_seed(rank)
    images, labels = digits()
    rows = torch.randint(1500, (4 + rank % 9,), generator=drawn)
    return images[rows], labels[rows]


app = App()
app.train(LocalSGD(module=net, data=lambda site: data(site.rank), lr=0.3, epochs=2, batch_size=4))


def accuracy(params):
    """Over the 297 images that no site has."""
    model = net()
    model.load_state_dict({name: torch.tensor(array) for name, array in params.items()})
    images, labels = (part[1500:] for part in digits())
    return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    recipe = FedAvgRecipe(name="local-sgd", app=app, model=net(), rounds=15, sites_per_round=200, best="min loss")
    run = recipe.execute(SimEnv(num_clients=SITES))
    print(f"accuracy on images that no site has: {accuracy(run.get_result().params):.3f}")
