"""Handwritten digits and a small network: an ordinary training script, before anything is federated."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.layers(x)


def digits(part, parts):
    """One of so many equal parts of the 1,797 digits, as images and labels."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[part::parts] / 16, dtype=torch.float32), torch.tensor(y[part::parts])


def accuracy(net, x, y):
    with torch.no_grad():
        return (net(x).argmax(1) == y).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    x, y = digits(args.part, args.parts)
    seen = len(y) * 4 // 5  # the others are for the accuracy
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(10):
        before = accuracy(net, x[seen:], y[seen:])
        for rows in torch.randperm(seen).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        print(f"accuracy {before:.3f} before, {accuracy(net, x[seen:], y[seen:]):.3f} after")


if __name__ == "__main__":
    main()
