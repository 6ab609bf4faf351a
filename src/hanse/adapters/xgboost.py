"""XGBoost: a site's share of a job by `XGBoostBaggingRecipe` or `XGBoostCyclicRecipe`, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import xgboost as xgb

from hanse.client.framework import Adapter
from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class XGBoostAdapter(Adapter):
    """See `hanse.client.framework.Adapter`. A model travels as XGBoost's own bytes; there are no tensors. `boost` draws its
    seed from NumPy's generator."""

    name = "xgboost"
    threads: int | None = None

    def params_of(self, model: Any) -> Mapping[str, Any] | None:
        return params_of(model)

    def to_array(self, value: Any) -> Array:
        raise ConfigError(f"a {type(value).__module__}.{type(value).__name__} cannot travel: send its params_of(…)")

    def limit_threads(self, threads: int) -> None:
        self.threads = threads
        xgb.set_config(nthread=threads)


ADAPTER = XGBoostAdapter()


def boost(model: FLModel, config: Mapping[str, Any], data: xgb.DMatrix, **about: Any) -> FLModel:
    """Add a round's trees to the received model, fitted to `data`: the answer to send, which holds the new trees alone.

    config: `site.config`, or `flare.get_config()`: the recipe puts its `params` and `local_trees` there. What they do not say of the seed
    and the number of threads is taken from the site's own. about: more of the answer, such as `metrics`.
    Raises ConfigError if the job is of no such recipe.
    """
    settings = config.get("xgboost")
    if not isinstance(settings, Mapping) or not {"params", "local_trees"} <= settings.keys():
        raise ConfigError("the config says nothing of XGBoost.", hint="Run the job by XGBoostBaggingRecipe or XGBoostCyclicRecipe.")
    params: dict[str, Any] = {"seed": int(np.random.randint(1 << 31)), "nthread": ADAPTER.threads or 0, **settings["params"]}
    before = booster_of(model)
    done = 0 if before is None else before.num_boosted_rounds()
    booster = xgb.train(params, data, num_boost_round=int(settings["local_trees"]), xgb_model=before)
    return FLModel(params=params_of(booster[done:]), meta={"examples": data.num_row()}, **about)


def booster_of(model: FLModel) -> xgb.Booster | None:
    """The ensemble in a model, to predict with; None if there is none yet."""
    if model.params is None:
        return None
    return xgb.Booster(model_file=bytearray(model.params["booster"]))


def params_of(model: xgb.Booster | xgb.XGBModel) -> dict[str, bytes] | None:
    """The model as XGBoost's own bytes, in JSON, under "booster"; None if it is an estimator that is not fitted.

    Raises ConfigError for anything but an XGBoost model.
    """
    if isinstance(model, xgb.XGBModel):
        if not model.__sklearn_is_fitted__():
            return None
        model = model.get_booster()
    if not isinstance(model, xgb.Booster):
        raise ConfigError(f"a {type(model).__name__} is no XGBoost model: give a Booster, or a fitted estimator such as XGBClassifier")
    return {"booster": bytes(model.save_raw("json"))}
