"""Handwritten digits, trained by PyTorch's DDP in two processes a site. Alone, `python train.py` starts them too.

Each step's gradient is the mean over the processes' halves of a batch: that of the whole batch, as one process would compute it.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import hanse.client as flare
from hanse.adapters.torchrun import torchrun

BATCH = 32
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits(part, parts):
    """One of so many equal parts of the 1,797 digits, as images and labels."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[part::parts] / 16, dtype=torch.float32), torch.tensor(y[part::parts])


def main():
    flare.init()
    site = flare.system_info()
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    x, y = digits(site["rank"], site["count"])
    seen = len(y) * 4 // 5 // BATCH * BATCH  # whole batches; the others are for the accuracy
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    while flare.is_running():
        model = flare.receive()
        net.load_state_dict(model.params)
        with torch.no_grad():
            accuracy = (net(x[seen:]).argmax(1) == y[seen:]).float().mean().item()
        shuffled = torch.randperm(seen, generator=torch.Generator().manual_seed(model.current_round))  # the same in each process
        for rows in shuffled.split(BATCH):
            mine = rows[rank::processes]
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(x[mine]), y[mine]).backward()
            optimizer.step()
        print(f"process {rank} of {processes}: accuracy {accuracy:.3f} before")
        flare.send(flare.FLModel(params=net.state_dict(), metrics={"accuracy": accuracy}, meta={"examples": seen}))


if __name__ == "__main__":
    torchrun(main, processes=int(sys.argv[1]) if len(sys.argv) > 1 else 2)
