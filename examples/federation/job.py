"""Three sites as processes of this machine, with certificates and mutual TLS, each with a policy that says what may leave. NumPy only."""

from pathlib import Path

import numpy as np

from hanse import App, FedAvgRecipe, FLModel, PocEnv

app = App()


@app.train
def train(model, site):
    rng = np.random.default_rng(site.rank)  # stands in for the site's own data, the same in every round
    x = rng.uniform(0, 8, size=50)
    y = 3 * x + rng.normal(size=50)
    slope = model.params["slope"]
    loss = np.mean((slope * x - y) ** 2)
    for _ in range(10):
        slope = slope - 0.01 * np.mean(2 * (slope * x - y) * x)
    largest = np.max(y)  # tells of a single record: the policy keeps it at the site
    return FLModel(params={"slope": slope}, metrics={"loss": loss, "largest": largest}, meta={"examples": len(x)})


if __name__ == "__main__":
    recipe = FedAvgRecipe(name="federation", app=app, model={"slope": np.zeros(1)}, rounds=3, best="min loss")
    run = recipe.execute(PocEnv(sites=["east", "north", "south"], policy=Path(__file__).with_name("policy.yaml")))
    print("the slope is", run.get_result().params["slope"], "and should be 3")
    print("known of each round:", ", ".join(sorted(run.metrics[-1])))
