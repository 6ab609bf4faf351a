"""Script form: train.py at eight sites, each with an eighth of the digits."""

from pathlib import Path

import torch
from train import Net

from hanse import FedAvgRecipe, SimEnv

if __name__ == "__main__":
    torch.manual_seed(0)  # for the first model
    script = Path(__file__).with_name("train.py")
    recipe = FedAvgRecipe(name="digits", script=script, argv=["--part", "{rank}", "--parts", "{count}"], model=Net(), rounds=20)
    recipe.execute(SimEnv(num_clients=8))
