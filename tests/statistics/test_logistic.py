from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from hanse.errors import ConfigError
from hanse.statistics.logistic import Derivatives, derivatives, newton_step, penalised


def test_by_hand() -> None:
    """At weights 0 every chance is ½: the loss is 2 log 2, the gradient Σ (½ − y) (1, x), the Hessian ¼ Σ (1, x)(1, x)ᵀ."""
    found = derivatives(np.array([[2.0], [4.0]]), np.array([1.0, 0.0]), np.zeros(2))
    assert found.loss == pytest.approx(2 * np.log(2))
    assert_allclose(found.gradient_p, [0, 1])
    assert_allclose(found.hessian_pp, [[0.5, 1.5], [1.5, 5.0]])


def test_they_are_the_derivatives_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(50, 3)), rng.integers(0, 2, 50), rng.normal(size=4)
    for index in range(4):
        step = np.zeros(4)
        step[index] = 1e-6
        up, down = (penalised(derivatives(x, y, w + sign * step), w + sign * step, 0.7) for sign in (1, -1))
        here = penalised(derivatives(x, y, w), w, 0.7)
        assert here.gradient_p[index] == pytest.approx((up.loss - down.loss) / 2e-6, rel=1e-6, abs=1e-6)
        assert_allclose(here.hessian_pp[index], (up.gradient_p - down.gradient_p) / 2e-6, rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    found = derivatives(np.array([[1e4], [-1e4]]), np.array([0.0, 0.0]), np.array([0.0, 1.0]))
    assert found.loss == 1e4
    assert_allclose(found.gradient_p, [1, 1e4])


def test_columns_of_any_unit() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 2)), rng.integers(0, 2, 200)
    plain, scaled = (newton_step(derivatives(x * unit, y, np.zeros(3))) for unit in (1.0, np.array([1e9, 1e-9])))
    assert_allclose(scaled * [1, 1e9, 1e-9], plain, rtol=1e-9)


@pytest.mark.parametrize("hessian", [[[1.0, 0], [0, 0]], [[1, 1], [1, 1]], [[1, 0], [0, np.nan]]], ids=["constant", "twins", "nan"])
def test_a_hessian_without_an_inverse(hessian: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match=r"the Hessian has no inverse: .* give ridge"):
        newton_step(Derivatives(1.0, np.ones(2), np.array(hessian)))
