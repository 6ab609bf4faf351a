"""Which customers will not pay next month? Boosted trees, grown where the customers' records are.

The four sites are simulated; `python job.py poc` makes them processes of their own, with certificates and mutual TLS.
"""

import functools
import os
import sys
from pathlib import Path

import numpy as np
import xgboost as xgb
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score

from hanse import App, FLModel, PocEnv, SimEnv, XGBoostBaggingRecipe
from hanse.adapters.xgboost import boost, booster_of

app = App()


@functools.cache
def records(path, rank, count):
    """A site's records to learn from, and others to test with: customers of a bank by age, or breast tumours if there is no path."""
    if path:
        with np.load(path) as file:
            x, y = file["x"], file["y"]
        order = np.argsort(x[:, 4], kind="stable")
    else:
        x, y = load_breast_cancer(return_X_y=True)
        order = np.arange(len(y))
    mine = np.random.default_rng(0).permutation(np.array_split(order, count)[rank])
    seen = len(mine) * 4 // 5
    return [xgb.DMatrix(x[rows], y[rows]) for rows in (mine[:seen], mine[seen:])]


@app.train
def train(model, site):
    data, _ = records(site.config["data"], site.rank, site.count)
    return boost(model, site.config, data)


@app.evaluate
def evaluate(model, site):
    _, data = records(site.config["data"], site.rank, site.count)
    return FLModel(metrics={"auc": roc_auc_score(data.get_label(), booster_of(model).predict(data))}, meta={"examples": data.num_row()})


if __name__ == "__main__":
    folder = os.environ.get("HANSE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    data = Path(folder, "credit_default.npz").resolve()
    if not data.is_file():
        print(f"There is no {data}; HANSE_DATA names another folder. Instead: scikit-learn's breast tumours.\n")
    recipe = XGBoostBaggingRecipe(
        name="xgboost",
        app=app,
        params={"objective": "binary:logistic", "max_depth": 4, "eta": 0.2, "subsample": 0.8},
        rounds=20,
        config={"data": str(data) if data.is_file() else ""},
    )
    Env = PocEnv if "poc" in sys.argv[1:] else SimEnv
    run = recipe.execute(Env(sites=["north", "east", "south", "west"]))
    print(f"{booster_of(run.get_result()).num_boosted_rounds()} layers of trees, four in each")
