from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hanse.statistics.sequential import PageHinkley, binomial_upper


def run(values: list[float], **settings: float) -> list[PageHinkley]:
    states = [PageHinkley(**settings)]
    for value in values:
        states.append(states[-1].after(value))
    return states[1:]


def test_page_hinkley_by_hand() -> None:
    # means 0, 0, 1/3; m = −0.1, −0.2, −0.2 + 1 − 1/3 − 0.1; the lowest was −0.2
    states = run([0, 0, 1], delta=0.1, limit=0.5)
    assert [state.total for state in states] == pytest.approx([-0.1, -0.2, -0.3 + 2 / 3])
    assert [state.height for state in states] == pytest.approx([0, 0, -0.1 + 2 / 3])
    assert [state.rose for state in states] == [False, False, True]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_page_hinkley_against_the_sums_written_out(values: list[float]) -> None:
    means = np.cumsum(values) / np.arange(1, len(values) + 1)
    totals = np.cumsum(np.array(values) - means - 0.01)
    assert run(list(values))[-1].height == pytest.approx(totals[-1] - min(0, totals.min()), abs=1e-9)


def test_page_hinkley_finds_a_rise_and_nothing_else() -> None:
    """δ 0.01 and λ 5, an error rate of 1 % for 1,000 labels that then rises to 10 %."""
    rng, found, false = np.random.default_rng(0), [], 0
    for _ in range(40):
        states = run((rng.random(1500) < np.where(np.arange(1500) < 1000, 0.01, 0.1)).tolist())
        false += any(state.rose for state in states[:1000])
        found.append(next(i for i, state in enumerate(states) if state.rose) - 1000)
    assert false == 0
    assert np.median(found) < 100
    assert max(found) < 200


@given(st.integers(1, 200), st.floats(0, 1), st.data())
def test_the_binomial_test_against_scipy(n: int, rate: float, data: st.DataObject) -> None:
    errors = data.draw(st.integers(0, n))
    expected = stats.binomtest(errors, n, rate, alternative="greater").pvalue
    assert binomial_upper(errors, n, rate) == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_the_binomial_test_by_hand() -> None:
    assert binomial_upper(2, 2, 0.1) == pytest.approx(0.01)
    assert binomial_upper(1, 2, 0.1) == pytest.approx(0.19)
    assert binomial_upper(0, 0, 0.1) == 1
    assert (binomial_upper(1, 5, 0.0), binomial_upper(1, 5, 1.0)) == (0, 1)
