"""`silo` in plain PyTorch, one thread: the last model goes to the file that is given."""

from __future__ import annotations

import sys

import numpy as np
import torch
from digits import RATE, ROUNDS, SITES, Net, accuracy, first_model, site_data, train_epoch

torch.set_num_threads(1)
params = first_model().state_dict()
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
for round in range(ROUNDS):
    total = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    examples, score = 0, 0.0
    for rank in range(SITES):
        images, labels, held_out, held_out_labels = site_data(rank)
        net.load_state_dict(params)
        score += len(images) * accuracy(net, held_out, held_out_labels)
        train_epoch(net, optimizer, images, labels, rank=rank, round=round)
        for name, tensor in net.state_dict().items():
            total[name].add_(tensor, alpha=len(images))
        examples += len(images)
    params = {name: tensor / examples for name, tensor in total.items()}
    print(f"round {round + 1}: accuracy {score / examples:.4f}")
np.savez(sys.argv[1], **{name: tensor.numpy() for name, tensor in params.items()})
