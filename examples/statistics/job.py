"""What do four banks' credit data look like together, and what do they say of default, if no row may leave a bank?

The data are 30,000 credit cards (credit_default.npz), looked for in $HANSE_DATA, or else in ../shared/data beside the repository. Where
they are missing, scikit-learn's breast cancer data take their place: fewer, but as real.
"""

import functools
import os
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

from hanse import Disclosure, KMeansRecipe, LogisticNewtonRecipe, SimEnv, StatisticsRecipe, table_app

REGIONS = {"hamburg": "eu/de", "luebeck": "eu/de", "riga": "eu/lv", "boston": "us"}


@functools.cache  # the table is asked for once a task
def table(path):
    """Columns by name, sorted by the first; the label is 1 for a default, or a malignant tumour."""
    if path:
        with np.load(path) as file:
            x, y = file["x"], file["y"]
        columns = {"age": x[:, 4], "log_limit": np.log10(x[:, 0]), "months_late": x[:, 5], "label": y}
    else:
        data = load_breast_cancer()
        columns = {"radius": data.data[:, 0], "texture": data.data[:, 1], "label": 1 - data.target}
    order = np.argsort(next(iter(columns.values())), kind="stable")
    return {name: column[order] for name, column in columns.items()}


def load(site):
    """The site's own rows: the youngest customers, the next, and so on."""
    return {name: np.array_split(column, site.count)[site.rank] for name, column in table(site.config["data"]).items()}


app = table_app(load, disclosure=Disclosure(min_count=20))

if __name__ == "__main__":
    folder = os.environ.get("HANSE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    data = Path(folder, "credit_default.npz").resolve()
    if not data.is_file():
        print(f"There is no {data}; HANSE_DATA names another folder. scikit-learn's breast cancer data take its place.\n")
    common = {"app": app, "config": {"data": str(data) if data.is_file() else ""}}
    measured = ["age", "log_limit", "months_late"] if data.is_file() else ["radius", "texture"]
    env = SimEnv(sites=list(REGIONS))

    run = StatisticsRecipe(name="statistics", groups=REGIONS, bins=12, **common).execute(env)
    for name, column in run.events("statistics")[-1]["columns"].items():
        whole = column["groups"][""]
        print(f"{name}: {whole['count']:,} values, mean {whole['mean']:.4g}, standard deviation {whole['variance'] ** 0.5:.4g}")

    run = KMeansRecipe(name="groups", clusters=3, columns=measured[:2], **common).execute(env)
    print("the middles of three groups:", run.get_result().params["centroids"].round(2).tolist())

    run = LogisticNewtonRecipe(name="risk", features=measured, target="label", **common).execute(env)
    print("weights:", dict(zip(measured, run.get_result().params["coef_"][0].round(4).tolist(), strict=True)))
