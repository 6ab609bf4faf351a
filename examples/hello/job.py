"""The smallest job: eight sites fit one line, y = slope · x, each to points that no one else sees. NumPy only."""

import numpy as np

from hanse import App, FedAvgRecipe, FLModel, SimEnv

app = App()


@app.train
def train(model, site):
    rng = np.random.default_rng(site.rank)  # stands in for the site's own data, the same in every round
    x = rng.uniform(0, 8, size=50) * (site.rank + 1) / site.count  # of another range at each site
    y = 3 * x + rng.normal(size=50)
    slope = model.params["slope"]
    loss = np.mean((slope * x - y) ** 2)  # of the model as it came
    for _ in range(10):
        slope = slope - 0.01 * np.mean(2 * (slope * x - y) * x)
    return FLModel(params={"slope": slope}, metrics={"loss": loss}, meta={"examples": len(x)})


if __name__ == "__main__":
    recipe = FedAvgRecipe(name="hello", app=app, model={"slope": np.zeros(1)}, rounds=5, best="min loss")
    run = recipe.execute(SimEnv(num_clients=8))
    print("the slope is", run.get_result().params["slope"], "and should be 3")
