"""scikit-learn: a linear model for four branches of a bank, in script form."""

import os
from pathlib import Path

from hanse import FedAvgRecipe, SimEnv

if __name__ == "__main__":
    folder = os.environ.get("HANSE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    data = Path(folder, "credit_default.npz").resolve()
    if not data.is_file():
        print(f"There is no {data}; HANSE_DATA names another folder. Instead: scikit-learn's breast tumours.\n")
    recipe = FedAvgRecipe(
        name="linear",
        script=Path(__file__).with_name("train.py"),
        config={"data": str(data) if data.is_file() else ""},
        rounds=10,
        best="max auc",
    )
    recipe.execute(SimEnv(sites=["north", "east", "south", "west"]))
