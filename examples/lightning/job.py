"""Four sites train one network with Lightning."""

from pathlib import Path

import torch
from train import Digits

from hanse import FedAvgRecipe, SimEnv

if __name__ == "__main__":
    torch.manual_seed(0)  # for the first model
    script = Path(__file__).parent / "train.py"
    FedAvgRecipe(name="lightning", script=script, model=Digits(), rounds=5).execute(SimEnv(num_clients=4))
