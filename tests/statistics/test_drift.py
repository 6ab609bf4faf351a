from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.spatial.distance import cdist, pdist

from hanse.errors import ConfigError
from hanse.statistics import drift

LEVELS = (0.05, 0.01)
SCORES = arrays(np.float64, st.integers(1, 60), elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 0.9, 1.0]) | st.floats(0, 1))


def distribution(scores: np.ndarray, sketch: np.ndarray) -> np.ndarray:
    return drift.steps(scores, sketch).mean(0, dtype=np.float64)


def test_a_sketch_is_made_of_the_scores() -> None:
    assert_array_equal(drift.quantile_sketch(np.array([0.4, 0.1, 0.3, 0.2]), points=2), [0.1, 0.3])  # levels 1/4 and 3/4
    assert_array_equal(drift.quantile_sketch(np.arange(200.0)), np.arange(200.0))


def test_cells_are_the_points_and_the_gaps_between_them() -> None:
    sketch = np.array([0.2, 0.5, 0.5])
    assert_array_equal(drift.cells(np.array([0.1, 0.2, 0.3, 0.5, 0.6]), sketch), [0, 1, 2, 4, 6])
    assert_array_equal(drift.steps(np.array([0.3]), sketch), [[0, 0, 1, 1, 1, 1, 1]])


def test_kolmogorov_smirnov_by_hand() -> None:
    sketch = np.array([0.2, 0.4, 0.6, 0.8])
    # All of the window lies below 0.4: at 0.3 the one function is 1, the other 1/4.
    assert drift.kolmogorov_smirnov(distribution(np.array([0.1, 0.3]), sketch), distribution(sketch, sketch)) == 0.75


@settings(max_examples=200, deadline=None)
@given(SCORES, SCORES)
@pytest.mark.filterwarnings("ignore:divide by zero")  # in scipy, of its p-value
def test_kolmogorov_smirnov_against_scipy(window: np.ndarray, points: np.ndarray) -> None:
    sketch = np.sort(points)
    ours = drift.kolmogorov_smirnov(distribution(window, sketch), distribution(sketch, sketch))
    assert ours == pytest.approx(stats.ks_2samp(window, sketch, method="asymp").statistic, abs=1e-6)


def test_fourier_features_approximate_the_gaussian_kernel() -> None:
    x = np.random.default_rng(0).normal(size=(40, 5))
    features = drift.fourier_features(x, drift.frequencies(1, 5, 2.0, features=20_000)).astype(np.float64)
    assert_allclose(features @ features.T, np.exp(-cdist(x, x, "sqeuclidean") / 8), atol=0.04)


def test_mmd_is_that_of_the_kernel() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 3)), rng.normal(1.0, 1.0, size=(60, 3))
    frequencies = drift.frequencies(0, 3, 1.5, features=20_000)
    kernel = [np.exp(-cdist(a, b, "sqeuclidean") / 4.5).mean() for a, b in ((x, x), (y, y), (x, y))]
    means = [drift.fourier_features(each, frequencies).mean(0) for each in (x, y)]
    assert drift.mmd2(*means) == pytest.approx(kernel[0] + kernel[1] - 2 * kernel[2], abs=0.02)


def test_frequencies_are_normal_and_the_same_everywhere() -> None:
    drawn = drift.frequencies(7, 32, 0.5)
    assert drawn.shape == (256, 32)
    assert stats.kstest(drawn.reshape(-1) * 0.5, "norm").pvalue > 0.01
    assert_array_equal(drawn, drift.frequencies(7, 32, 0.5))
    assert_allclose(drift.frequencies(7, 2, 1.0)[0], [0.26773696, 0.08739916], rtol=1e-6)  # references that are out rely on it
    assert (drawn != drift.frequencies(8, 32, 0.5)).all()


def test_the_median_distance() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 4))
    assert drift.median_distance(x, rng=rng) == pytest.approx(np.median(pdist(x)))
    assert drift.median_distance(np.tile(x, (40, 1)), rng=rng) == pytest.approx(np.median(pdist(x)), rel=0.1)
    with pytest.raises(ConfigError, match="are the same"):
        drift.median_distance(np.ones((9, 2)), rng=rng)


def test_psi_by_hand() -> None:
    assert drift.psi(np.array([0.5, 0.5]), np.array([0.75, 0.25])) == pytest.approx(0.25 * np.log(1.5) - 0.25 * np.log(0.5))
    assert drift.psi(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0
    assert np.isfinite(drift.psi(np.array([1.0, 0.0]), np.array([0.0, 1.0])))


def test_thresholds_of_kolmogorov_smirnov_are_those_of_its_distribution() -> None:
    """A holdout that is much larger than the window: then it is the one-sample test, whose distribution is known."""
    rng = np.random.default_rng(0)
    scores = rng.random(5000)
    found, none = drift.calibrate(
        drift.steps(scores, drift.quantile_sketch(scores)), None, sizes=(50, 200), levels=LEVELS, resamples=2000, rng=rng
    )
    expected = np.array([[stats.kstwo.isf(level, n) for level in LEVELS] for n in (50, 200)])
    assert_allclose(found, expected, rtol=0.08)
    assert_array_equal(none, np.zeros((2, 2)))


def test_thresholds_are_kept_on_new_data() -> None:
    """The chance of a false alarm at the level of 5 %, with a holdout so small that its own error matters."""
    rng = np.random.default_rng(1)
    alarms = np.zeros(2)
    for _ in range(20):
        scores, embeddings = rng.random(300), rng.normal(size=(300, 3))
        sketch, frequencies = drift.quantile_sketch(scores), drift.frequencies(0, 3, 2.0)
        steps, features = drift.steps(scores, sketch), drift.fourier_features(embeddings, frequencies)
        ks, mmd = drift.calibrate(steps, features, sizes=(100,), levels=(0.05,), resamples=300, rng=rng)
        for _ in range(50):
            mean = drift.fourier_features(rng.normal(size=(100, 3)), frequencies).mean(0)
            apart = drift.kolmogorov_smirnov(distribution(rng.random(100), sketch), steps.mean(0))
            alarms += [apart > ks[0, 0], drift.mmd2(mean, features.mean(0)) > mmd[0, 0]]
    assert (alarms > 20).all()  # of 1,000: 50 are expected
    assert (alarms < 90).all()


def test_the_level_that_is_reached() -> None:
    thresholds = np.array([[0.4, 0.6], [0.2, 0.3]])

    def reached(statistic: float, n: int) -> float:
        return drift.reached_level(statistic, n, (50, 100), thresholds, LEVELS)

    assert [reached(x, 50) for x in (0.4, 0.41, 0.61)] == [1.0, 0.05, 0.01]
    assert [reached(x, 75) for x in (0.3, 0.31, 0.46)] == [1.0, 0.05, 0.01]  # halfway: 0.3 and 0.45
    assert [reached(x, 9999) for x in (0.2, 0.25, 0.35)] == [1.0, 0.05, 0.01]  # as at 100
    with pytest.raises(ConfigError, match="calibrated for 50 and more"):
        reached(1.0, 49)
