"""Two sites, two processes each. `python job.py poc` makes the sites processes of their own, with certificates and mutual TLS."""

import sys
from pathlib import Path

import torch
from train import net

from hanse import FedAvgRecipe, PocEnv, SimEnv

if __name__ == "__main__":
    torch.manual_seed(0)  # for the first model
    for layer in net[::2]:
        layer.reset_parameters()
    Env = PocEnv if "poc" in sys.argv[1:] else SimEnv
    recipe = FedAvgRecipe(name="torchrun", script=Path(__file__).with_name("train.py"), argv=["2"], model=net, rounds=5)
    recipe.execute(Env(num_clients=2))
