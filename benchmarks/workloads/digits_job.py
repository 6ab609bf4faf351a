"""`silo` in Hanse: run it in the folder where its runs shall be. The number of workers may be given, or `poc` for real processes."""

from __future__ import annotations

import sys
from pathlib import Path

from digits import ROUNDS, SITES, first_model

from hanse import FedAvgRecipe, PocEnv, SimEnv

HERE = Path(__file__).parent
how = sys.argv[1] if len(sys.argv) > 1 else None
recipe = FedAvgRecipe(name="silo", script=HERE / "digits_site.py", code=[HERE / "digits.py"], model=first_model(), rounds=ROUNDS)
recipe.execute(PocEnv(num_clients=SITES) if how == "poc" else SimEnv(num_clients=SITES, workers=int(how) if how else None))
