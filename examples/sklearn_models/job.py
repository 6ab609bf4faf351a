"""scikit-learn's models, by what each allows: sums over the records where they suffice, support vectors where they may be shown.

The three sites are simulated; `python job.py poc` makes them processes of their own, with certificates and mutual TLS.
"""

import sys

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import Ridge
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import SVC

from hanse import App, FedAvgRecipe, FLModel, PocEnv, SimEnv, SVMRecipe, WeightedMean
from hanse.adapters.sklearn import fit_sums, fit_support, sums_of, support_of

CLASSES = [0, 1]
bayes, ridge, machine = App(), App(), App()


def share(site):
    """A site's breast tumours: measures to learn from and to test with. They are scaled alike everywhere, by constants that all know."""
    x, y = load_breast_cancer(return_X_y=True)
    x = x / np.array([20, 25, 130, 1000, *[0.2] * 6, 1, 2, 5, 60, *[0.02] * 6, 25, 35, 160, 1500, *[0.4] * 6])
    mine = np.random.default_rng(0).permutation(len(y))[site.rank :: site.count]
    seen = len(mine) * 4 // 5
    return x[mine[:seen]], y[mine[:seen]], x[mine[seen:]], y[mine[seen:]]


@bayes.train
def count(model, site):
    x, y, _, _ = share(site)
    return FLModel(params=sums_of(GaussianNB(), x, y, classes=CLASSES, sites=site.count))


@bayes.evaluate
def score_bayes(model, site):
    _, _, x, y = share(site)
    return {"accuracy": fit_sums(GaussianNB(), model.params, classes=CLASSES).score(x, y)}


@ridge.train
def add_up(model, site):
    x, y, _, _ = share(site)
    return FLModel(params=sums_of(Ridge(), x, y, sites=site.count))


@ridge.evaluate
def score_ridge(model, site):
    _, _, x, y = share(site)
    return {"accuracy": ((fit_sums(Ridge(), model.params).predict(x) > 0.5) == y).mean()}


@machine.train
def support(model, site):
    x, y, _, _ = share(site)
    return FLModel(params=support_of(SVC(gamma=0.5), x, y))


@machine.evaluate
def score_machine(model, site):
    _, _, x, y = share(site)
    return {"accuracy": fit_support(SVC(gamma=0.5), model.params).score(x, y)}


if __name__ == "__main__":
    Env = PocEnv if "poc" in sys.argv[1:] else SimEnv
    env = Env(num_clients=3)
    FedAvgRecipe(name="bayes", app=bayes, rounds=1, aggregator=WeightedMean("equal")).execute(env)
    FedAvgRecipe(name="ridge", app=ridge, rounds=1, aggregator=WeightedMean("equal")).execute(env)
    run = SVMRecipe(name="svm", app=machine, share_support_vectors=True).execute(env)
    print(f"{len(run.get_result().params['y'])} of 455 records are support vectors, and every site has seen them")
