"""An algorithm of your own: the median of each weight (Yin et al., ICML 2018), which a site that lies cannot move far."""

import numpy as np
from sklearn.datasets import load_digits

from hanse import App, FLModel, SimEnv, Task, WorkflowRecipe

app = App()


@app.train
def train(model, site):
    x, y = (array[site.rank :: site.count] for array in load_digits(return_X_y=True))
    x, truth, seen, w = x / 16, np.eye(10)[y], len(y) // 2, model.params["w"]
    accuracy = np.mean((x @ w).argmax(1)[seen:] == y[seen:])
    for _ in range(20):
        odds = np.exp(x[:seen] @ w)
        w = w - x[:seen].T @ (odds / odds.sum(1, keepdims=True) - truth[:seen]) / seen
    if site.rank < 2:
        w = site.rng.normal(scale=10, size=w.shape)  # two of the eight lie
    return FLModel(params={"w": w}, metrics={"accuracy": accuracy})


async def median(cohort, model, *, rounds):
    async for _ in cohort.rounds(model, rounds):
        updates = [update async for update in cohort.ask(Task("train", model), min_updates=5)]
        good = [update.model for update in updates if update.failure is None]
        metrics = {"accuracy": float(np.median([each.metrics["accuracy"] for each in good]))}
        await cohort.keep_best(model, metrics, "accuracy")
        model = await cohort.commit(FLModel(params={"w": np.median([each.params["w"] for each in good], axis=0)}), metrics)
    return model


if __name__ == "__main__":
    recipe = WorkflowRecipe(name="median", app=app, run=median, arguments={"rounds": 10}, model={"w": np.zeros((64, 10))})
    recipe.execute(SimEnv(num_clients=8))
