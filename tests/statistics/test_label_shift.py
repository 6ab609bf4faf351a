from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from hanse.errors import ConfigError
from hanse.statistics.label_shift import new_shares, standard_error

CONFUSION = np.array([[80, 10], [20, 90]])  # FPR 0.2, TPR 0.9


def test_new_shares_by_hand() -> None:
    # A share q of positives is decided positive with 0.2 (1 − q) + 0.9 q: 0.34 for q = 0.2.
    assert_allclose(new_shares(CONFUSION, np.array([66, 34])), [0.8, 0.2])


def test_shares_that_no_label_shift_gives_are_cut() -> None:
    assert_allclose(new_shares(CONFUSION, np.array([95, 5])), [1, 0])


@given(st.lists(st.floats(0.05, 1), min_size=3, max_size=3), st.lists(st.floats(0.05, 1), min_size=3, max_size=3))
def test_shares_are_found_again_for_any_number_of_classes(old: list[float], new: list[float]) -> None:
    given_class = np.array([[0.8, 0.1, 0.2], [0.1, 0.7, 0.1], [0.1, 0.2, 0.7]])  # columns sum to 1
    before, after = np.array(old) / sum(old), np.array(new) / sum(new)
    assert_allclose(new_shares(given_class * before, given_class @ after), after, atol=1e-9)


def test_a_model_that_tells_nothing_apart_tells_no_shares() -> None:
    for confusion in ([[50, 50], [50, 50]], [[100, 0], [0, 0]]):
        with pytest.raises(ConfigError, match="do not tell the classes apart"):
            new_shares(np.array(confusion), np.array([1, 1]))


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    decided = rng.binomial(200, 0.34, size=4000)
    found = [new_shares(CONFUSION, np.array([200 - each, each]))[1] for each in decided]
    assert standard_error(CONFUSION, np.array([132, 68])) == pytest.approx(np.std(found), rel=0.1)
