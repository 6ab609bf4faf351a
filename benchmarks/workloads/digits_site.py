"""`silo` in script form: what a site runs."""

from __future__ import annotations

import torch
from digits import RATE, Net, accuracy, site_data, train_epoch

import hanse.client as flare

flare.init()
rank = flare.system_info()["rank"]
images, labels, held_out, held_out_labels = site_data(rank)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
while flare.is_running():
    model = flare.receive()
    net.load_state_dict(model.params)
    metrics = {"accuracy": accuracy(net, held_out, held_out_labels)}
    train_epoch(net, optimizer, images, labels, rank=rank, round=model.current_round)
    flare.send(flare.FLModel(params=net.state_dict(), metrics=metrics, meta={"examples": len(images)}))
