"""Which customers will not pay next month? A linear model, trained where the customers' records are."""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import roc_auc_score

import hanse.client as flare
from hanse.adapters.sklearn import params_of, set_params_of


def records(path, rank, count):
    """A site's records, scaled by its own mean and spread, and their labels: customers of a bank, or breast tumours if there is no path."""
    if path:
        with np.load(path) as file:
            x, y = file["x"], file["y"]
        order = np.argsort(x[:, 4], kind="stable")  # by age: each site has a generation of its own
    else:
        x, y = load_breast_cancer(return_X_y=True)
        order = np.arange(len(y))
    mine = np.random.default_rng(0).permutation(np.array_split(order, count)[rank])
    x, y = x[mine], y[mine]
    return (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6), y


def main():
    flare.init()
    info = flare.system_info()
    x, y = records(flare.get_config().get("data", ""), info["rank"], info["count"])
    seen = len(y) * 4 // 5  # the others are for the score
    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.001)
    while flare.is_running():
        received = flare.receive()
        metrics = {}
        if received.params is not None:  # there is no model before the first round: the sites bring it
            set_params_of(model, received.params)
            metrics["auc"] = roc_auc_score(y[seen:], model.decision_function(x[seen:]))
        model.partial_fit(x[:seen], y[:seen], classes=[0, 1])
        flare.send(flare.FLModel(params=params_of(model), metrics=metrics, meta={"examples": seen}))


if __name__ == "__main__":
    main()
