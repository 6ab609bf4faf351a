"""Hostile sites who know what the honest ones send: attacks that each rule withstands, and one that it does not.

Ways to attack, by (honest updates, how many hostile ones) to one vector that all hostile sites send, or one each:
the sign flip and scaled noise send what no honest site would; "a little is enough" (Baruch et al., NeurIPS 2019) stays so close that no
rule can tell, and may move each number by little; the "hidden vulnerability" (El Mhamdi et al., ICML 2018) hides a long step in one number.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from hanse.aggregation.geometric_median import GeometricMedian
from hanse.aggregation.krum import Bulyan, Krum, MultiKrum
from hanse.aggregation.mean import WeightedMean
from hanse.aggregation.norm_bound import NormBoundedMean
from hanse.aggregation.order_statistics import Median, TrimmedMean

SIZE = 400


def honest_updates(count: int) -> np.ndarray:
    """Changes of norm about 20, which agree: each number is 1, give or take 0.3."""
    return 1 + 0.3 * np.random.default_rng(3).standard_normal((count, SIZE))


def sign_flip(honest: np.ndarray, hostile: int) -> np.ndarray:
    return np.tile(-10 * honest.mean(axis=0), (hostile, 1))


def scaled_noise(honest: np.ndarray, hostile: int) -> np.ndarray:
    return np.random.default_rng(4).normal(0, 100, (hostile, SIZE))


def a_little_is_enough(honest: np.ndarray, hostile: int) -> np.ndarray:
    """Section 3.2: z such that so many honest sites lie farther out that together they are the majority."""
    sites = len(honest) + hostile
    supporters = sites // 2 + 1 - hostile
    z = NormalDist().inv_cdf((len(honest) - supporters) / len(honest))
    return np.tile(honest.mean(axis=0) - z * honest.std(axis=0), (hostile, 1))


def hidden(honest: np.ndarray, hostile: int) -> np.ndarray:
    """The mean of the honest, and in the first number more than half as far away as honest updates are from each other."""
    sent = honest.mean(axis=0)
    sent[0] -= 0.6 * np.linalg.norm(honest[0] - honest[1])
    return np.tile(sent, (hostile, 1)) + 1e-3 * np.random.default_rng(5).standard_normal((hostile, SIZE))


def far_away(honest: np.ndarray, hostile: int) -> np.ndarray:
    return np.full((hostile, SIZE), -1e6)


def outcome(combine, rule, attack, sites: int, hostile: int) -> tuple[np.ndarray, np.ndarray]:
    honest = honest_updates(sites - hostile)
    result = combine(rule, [*attack(honest, hostile), *honest], params_type="DIFF")  # the hostile are first in the order of names
    return result.params["w"], honest


# rule, sites, how many hostile ones it withstands as the documentation says
RULES = [
    (Median(), 11, 5),
    (TrimmedMean(0.2), 11, 3),
    (Krum(4), 11, 4),
    (MultiKrum(4), 11, 4),
    (Bulyan(2), 11, 2),
    (GeometricMedian(), 11, 5),
]
ids = lambda value: getattr(value, "__name__", None) or (None if isinstance(value, int) else type(value).__name__)  # noqa: E731


@pytest.mark.parametrize("attack", [sign_flip, scaled_noise, far_away, a_little_is_enough], ids=ids)
@pytest.mark.parametrize(("rule", "sites", "most"), RULES, ids=ids)
def test_attacks_that_are_withstood(combine, rule, sites, most, attack):
    result, honest = outcome(combine, rule, attack, sites, most)
    middle = honest.mean(axis=0)
    farthest = np.linalg.norm(honest - middle, axis=1).max()
    assert np.linalg.norm(result - middle) < 1.5 * farthest  # what an honest site might have sent
    assert result @ middle > 0.4 * middle @ middle  # and it leads the same way
    mean, _ = outcome(combine, WeightedMean(), attack, sites, most)
    if attack is not a_little_is_enough:
        assert np.linalg.norm(mean - middle) > 5 * farthest  # which does not withstand it


@pytest.mark.parametrize(
    ("rule", "sites", "hostile"),
    [
        (WeightedMean(), 11, 1),
        (Median(), 11, 6),
        (TrimmedMean(0.2), 11, 4),
        (Krum(4), 11, 6),
        (MultiKrum(4), 11, 6),
        (Bulyan(2), 11, 6),
        (GeometricMedian(), 11, 6),
    ],
    ids=ids,
)
def test_more_hostile_sites_than_that_take_the_result_as_far_as_they_like(combine, rule, sites, hostile):
    result, honest = outcome(combine, rule, far_away, sites, hostile)
    assert np.linalg.norm(result - honest.mean(axis=0)) > 1000 * np.linalg.norm(honest[0])


@pytest.mark.parametrize("rule", [Krum(2), MultiKrum(2), GeometricMedian()], ids=ids)
def test_a_step_in_one_number_is_hidden_from_distances(combine, rule):
    result, honest = outcome(combine, rule, hidden, 11, 2)
    assert result[0] < honest[:, 0].min()


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.2), Bulyan(2)], ids=ids)
def test_but_not_from_those_that_look_at_each_number(combine, rule):
    result, honest = outcome(combine, rule, hidden, 11, 2)
    assert honest[:, 0].min() <= result[0] <= honest[:, 0].max()


def test_a_little_is_enough_to_move_every_rule_a_little(combine):
    """In each round, in the same direction: no rule that sees one round can tell. That is why these rules do not replace trust."""
    for rule, sites, most in RULES:
        if most < 4:
            continue  # for so few there is no z above 0
        result, honest = outcome(combine, rule, a_little_is_enough, sites, most)
        off = (result - honest.mean(axis=0)) / honest.std(axis=0)
        assert -1.5 < off.mean() < -0.1


def test_a_bound_on_norms_limits_what_is_sent_and_not_how_many_send_it(combine):
    result, honest = outcome(combine, NormBoundedMean(), far_away, 11, 2)
    middle = honest.mean(axis=0)
    assert np.linalg.norm(result - middle) < 0.5 * np.linalg.norm(middle)  # 2 of 11 sites, twice their share
    assert result @ middle > 0.5 * middle @ middle
    result, honest = outcome(combine, NormBoundedMean(25.0), sign_flip, 11, 6)
    assert result @ honest.mean(axis=0) < 0  # a majority turns it round
