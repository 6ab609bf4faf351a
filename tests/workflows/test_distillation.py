"""FedMD on real sites, against Algorithm 1 written out in NumPy, and with models of different kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.app import App, Site
from hanse.environments import SimEnv
from hanse.errors import ConfigError, JobFailed, TooFewUpdates
from hanse.jobs.distillation import FedMDRecipe
from hanse.jobs.loading import read_job
from hanse.messages.flmodel import FLModel
from hanse.workflows.distillation import fedmd

PUBLIC = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [2.0, -1.0]])
CLASSES = 3


def scores_of(rank: int, weights: Any) -> Any:
    """Two kinds of models: a linear one, and a table of scores for each public example."""
    return PUBLIC @ weights if rank % 2 == 0 else weights


def first_weights(rank: int) -> Any:
    rows = PUBLIC.shape[1] if rank % 2 == 0 else len(PUBLIC)
    return np.arange(rows * CLASSES, dtype=float).reshape(rows, CLASSES) * (rank + 1)


def digested(rank: int, weights: Any, rows: Any, consensus: Any) -> Any:
    """One step of 0.25 on ½ ‖f(x) − f̃(x)‖² over the drawn rows, then half of the way back to what the site began with."""
    gap = scores_of(rank, weights)[rows] - consensus
    if rank % 2 == 0:
        weights = weights - 0.25 * PUBLIC[rows].T @ gap
    else:
        weights = weights.copy()
        weights[rows] -= 0.25 * gap
    return (weights + first_weights(rank)) / 2


def app_of() -> App:
    app = App()

    @app.task("score")
    def score(model: FLModel, site: Site) -> FLModel:
        assert model.params is None
        assert site.config["lr"] == 1
        weights = site.state.setdefault("weights", first_weights(site.rank))
        return FLModel({"scores": scores_of(site.rank, weights)[site.config["rows"]]})

    @app.task("digest")
    def digest(model: FLModel, site: Site) -> FLModel:
        site.state["weights"] = digested(site.rank, site.state["weights"], site.config["rows"], model.params["scores"])
        return FLModel(metrics={"norm": float(np.linalg.norm(site.state["weights"]))})

    @app.evaluate
    def evaluate(model: FLModel, site: Site) -> dict[str, float]:
        return {"corner": float(site.state["weights"][0, 0])}

    return app


def reference(rounds: int, draws: list[list[int]], sites: int) -> tuple[Any, list[Any]]:
    """Algorithm 1, line by line: the last consensus and each site's weights."""
    weights, consensus = [first_weights(rank) for rank in range(sites)], None
    for _, rows in zip(range(rounds), draws, strict=True):
        consensus = np.mean([scores_of(rank, weights[rank])[rows] for rank in range(sites)], axis=0)
        weights = [digested(rank, weights[rank], rows, consensus) for rank in range(sites)]
    return consensus, weights


async def test_three_rounds_as_the_paper_has_them(federate: Any) -> None:
    async with federate(app_of(), sites=3) as federation:
        model = await fedmd(federation.cohort, FLModel(), rounds=3, public_examples=4, config={"lr": 1}, evaluate=True)
    consensus, weights = reference(3, [[0, 1, 2, 3]] * 3, sites=3)
    np.testing.assert_allclose(model.params["scores"], consensus, rtol=1e-14)
    assert model.params["rows"].tolist() == [0, 1, 2, 3]
    assert model.metrics == pytest.approx(
        {"norm": np.mean([np.linalg.norm(w) for w in weights]), "corner": np.mean([w[0, 0] for w in weights])}, rel=1e-12
    )
    assert [event["asked"] for event in federation.noted("round")] == [3] * 3


async def test_some_rows_are_drawn_anew_each_round(federate: Any) -> None:
    draws: list[list[int]] = []
    async with federate(app_of(), sites=2) as federation:
        model = FLModel()
        for rounds in range(1, 6):
            model = await fedmd(federation.cohort, model, rounds=rounds, public_examples=4, examples_per_round=2, config={"lr": 1})
            draws.append(model.params["rows"].tolist())
    assert all(rows == sorted(set(rows)) and len(rows) == 2 for rows in draws)
    assert len(set(map(tuple, draws))) > 1
    np.testing.assert_allclose(model.params["scores"], reference(5, draws, sites=2)[0], rtol=1e-14)


async def test_a_site_that_cannot_score_digests_nothing(federate: Any) -> None:
    app = App()

    @app.task("score")
    def score(model: FLModel, site: Site) -> FLModel:
        if site.rank == 1:
            raise ValueError("no model today")
        return FLModel({"scores": np.full((4, 2), float(site.rank))})

    @app.task("digest")
    def digest(model: FLModel, site: Site) -> FLModel:
        assert model.params["scores"].tolist() == [[1.0, 1.0]] * 4
        return FLModel(metrics={"rank": site.rank})

    async with federate(app, sites=3) as federation:
        model = await fedmd(federation.cohort, FLModel(), rounds=1, public_examples=4, min_updates=2)
        assert model.metrics == {"rank": 1.0}  # of ranks 0 and 2
        with pytest.raises(TooFewUpdates, match="no model today"):
            await fedmd(federation.cohort, FLModel(), rounds=1, public_examples=4)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (FLModel(), "the sites sent nothing for 4 public examples"),
        (FLModel({"scores": np.zeros((3, 2))}), r"'scores' of shape \(3, 2\) for 4"),
        (FLModel({"scores": np.zeros(4)}), r"'scores' of shape \(4,\) for 4"),
        (FLModel({"logits": np.zeros((4, 2))}), r"'logits' of shape \(4, 2\) for 4"),
    ],
)
async def test_sites_that_send_something_else(federate: Any, answer: FLModel, says: str) -> None:
    app = App()
    app.task("score")(lambda model, site: answer)
    async with federate(app, sites=2) as federation:
        with pytest.raises(ConfigError, match=says):
            await fedmd(federation.cohort, FLModel(), rounds=1, public_examples=4)


CODE = """
from pathlib import Path
import numpy as np
from sklearn.datasets import load_digits
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from hanse import App, FLModel
from hanse.partition import dirichlet

app = App()
X, Y = load_digits(return_X_y=True)
PUBLIC, OWN = X[:300], (X[300:1200], Y[300:1200])


def model_of(site):
    '''A naive Bayes or a nearest-neighbour model of the site's digits and of what the others said.'''
    rows = dirichlet(OWN[1], site.count, alpha=0.3, min_rows=20)[site.rank]
    x, y = OWN[0][rows], OWN[1][rows]
    if "labels" in site.state:
        x, y = np.concatenate([x, PUBLIC[site.state["rows"]]]), np.concatenate([y, site.state["labels"]])
    return (GaussianNB(var_smoothing=1e-2) if site.rank % 2 else KNeighborsClassifier(5)).fit(x, y)


@app.task("score")
def score(model, site):
    if model.current_round == 2 and not Path(site.config.get("gate", "/")).exists():
        raise ValueError("not yet")
    found, scores = model_of(site), np.zeros((len(site.config["rows"]), 10), "f4")
    scores[:, found.classes_] = found.predict_proba(PUBLIC[site.config["rows"]])
    return FLModel({"scores": scores})


@app.task("digest")
def digest(model, site):
    before = model_of(site).score(X[1200:], Y[1200:])
    site.state |= {"rows": site.config["rows"], "labels": model.params["scores"].argmax(1)}
    return FLModel(metrics={"before": before})


@app.evaluate
def evaluate(model, site):
    return {"accuracy": model_of(site).score(X[1200:], Y[1200:])}
"""


def test_different_models_learn_from_each_other_to_the_same_bits(load: Any, tmp_path: Path) -> None:
    """With any number of workers, and when it is stopped half way."""
    gate = tmp_path / "gate"
    recipe = FedMDRecipe(
        name="fedmd",
        app=load(CODE).app,
        rounds=3,
        public_examples=300,
        examples_per_round=250,
        sites_per_round=4,
        config={"gate": str(gate)},
    )
    env = SimEnv(num_clients=5, runs=tmp_path / "runs", console="quiet")
    with pytest.raises(JobFailed, match="not yet") as failed:
        recipe.execute(env)
    gate.touch()
    one, two, resumed = (recipe.execute(replace(env, **how)) for how in ({"workers": 1}, {"workers": 2}, {"resume": failed.value.folder}))
    for other in (two, resumed):
        assert (other.folder / "model.safetensors").read_bytes() == (one.folder / "model.safetensors").read_bytes()
    assert one.metrics[-1]["accuracy"] > one.metrics[0]["before"] + 0.1
    assert one.get_result().params["scores"].shape == (250, 10)
    assert one.facts["best"] is None


# ------------------------------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"app": App()}, "needs an app with a function for 'score'"),
        ({"model": {"w": np.zeros(2)}}, "has a model, and in FedMD each site has its own"),
        ({"rounds": 0}, "rounds=0"),
        ({"public_examples": 0}, "public_examples=0"),
        ({"public_examples": None}, "public_examples=None"),
        ({"examples_per_round": 5}, "examples_per_round=5, and public_examples=4"),
        ({"sites_per_round": -1}, "sites_per_round=-1"),
        ({"within_s": 0}, "within_s=0"),
        ({"aggregator": "mean"}, "aggregator='mean'"),
        ({"stop_when": "norm"}, "'norm' is no condition"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FedMDRecipe(**{"name": "a", "app": app_of(), "rounds": 1, "public_examples": 4} | wrong)


def test_a_job_file_describes_it(load: Any, tmp_path: Path) -> None:
    recipe = FedMDRecipe(name="a", app=load(CODE).app, rounds=2, public_examples=300, examples_per_round=10, stop_when="accuracy > 0.9")
    read = read_job(recipe.export(tmp_path / "job"))
    assert isinstance(read, FedMDRecipe)
    assert (read.public_examples, read.examples_per_round, read.aggregator.by, read.stop_when) == (300, 10, "equal", "accuracy > 0.9")  # type: ignore[attr-defined]


async def test_more_rows_than_there_are(federate: Any) -> None:
    async with federate(app_of(), sites=2) as federation:
        with pytest.raises(ConfigError, match="5 of 4 public examples"):
            await fedmd(federation.cohort, FLModel(), rounds=1, public_examples=4, examples_per_round=5)
