from __future__ import annotations

import pytest

from hanse.errors import ConfigError
from hanse.messages.flmodel import FLModel, ParamsType


def test_defaults():
    model = FLModel()
    assert model.params is None
    assert model.params_type is ParamsType.FULL
    assert (model.start_round, model.current_round, model.total_rounds) == (0, None, None)
    assert model.optimizer_params == model.metrics == model.meta == {}


def test_models_do_not_share_their_default_dictionaries():
    assert FLModel().meta is not FLModel().meta


def test_none_stands_for_the_default():
    model = FLModel(params_type=None, optimizer_params=None, metrics=None, meta=None)
    assert model == FLModel()


def test_params_type_may_be_given_as_its_name():
    assert FLModel(params_type="DIFF").params_type is ParamsType.DIFF


@pytest.mark.parametrize("wrong", [{"params_type": "HALF"}, {"metrics": [0.5]}, {"meta": "examples"}])
def test_wrong_arguments_are_refused_at_once(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FLModel(**wrong)
