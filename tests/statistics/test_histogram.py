from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hanse.errors import ConfigError
from hanse.statistics.histogram import Quantile, bin_edges, cell_counts, coarse_range, quantile

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60).map(np.array)


def test_cells_by_hand() -> None:
    edges = bin_edges(0, 3, 3)
    assert_array_equal(edges, [0, 1, 2, 3])
    assert_array_equal(cell_counts(np.array([-1, 0, 0.5, 1, 3, 3.1, np.nan, 9]), edges), [1, 2, 1, 1, 2])


@given(values, st.integers(1, 30))
def test_bins_are_those_of_numpy(x: np.ndarray, bins: int) -> None:
    edges = bin_edges(-1000.0, 500.0, bins)
    cells = cell_counts(x, edges)
    assert_array_equal(cells[1:-1], np.histogram(x, edges)[0])
    assert (cells[0], cells[-1]) == ((x < -1000).sum(), (x > 500).sum())


@pytest.mark.parametrize("ends", [(1, 1), (2, 1), (0, math.inf), (math.nan, 1), (1e16, 1e16 + 4)])
def test_ends_between_which_nothing_fits(ends: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="no 20 bins fit between"):
        bin_edges(*ends, 20)


def test_a_range_by_hand() -> None:
    """The span is 90, an eighth of it 11.25, the power of two above it 16."""
    assert coarse_range(np.array([18, 108, np.nan])) == (16.0, 112.0)
    assert coarse_range(np.array([0.0])) == (0.0, 1.0)
    assert coarse_range(np.array([70.0, 70.0])) == (64.0, 80.0)  # an eighth of 70 is 8.75


@given(values)
def test_a_range_holds_all_and_tells_its_ends_only_roughly(x: np.ndarray) -> None:
    low, high = coarse_range(x)
    assert low <= x.min() <= x.max() <= high
    span = x.max() - x.min()
    assert span == 0 or high - low <= 1.51 * span + 1e-300
    step = (span / 8) or abs(x.max()) / 8 or 1.0
    inside = coarse_range(np.array([low + (x.min() - low) / 2, *x]))  # another smallest value, nearer to the end
    assert span == 0 or abs(inside[0] - low) <= 2 * step


def test_a_quantile_by_hand() -> None:
    """Of 10 values 4 lie in the first bin, 6 in the second; the median is the 5th: a sixth of the way into the second."""
    assert quantile(np.array([0.0, 6.0, 12.0]), np.array([0, 4, 6, 0]), 0.5, total=10) == Quantile(7.0, 6.0, 12.0)


def test_hidden_cells_widen_the_range() -> None:
    """Two of 12 values are in cells that were not sent: the 6th may lie in any bin from the first on."""
    found = quantile(np.arange(4.0), np.array([0, 4, 6, 0, 0]), 0.5, total=12)
    assert (found.low, found.high) == (0.0, 2.0)
    assert quantile(np.arange(4.0), np.zeros(5, int), 0.5, total=12)[1:] == (-math.inf, math.inf)


def test_outside_the_edges_only_one_end_is_known() -> None:
    assert quantile(np.arange(3.0), np.array([5, 1, 1, 0]), 0.5, total=7) == Quantile(0.0, -math.inf, 0.0)


@given(values, st.floats(0, 1), st.integers(1, 40), st.integers(0, 6))
@settings(max_examples=300)
def test_the_range_holds_the_quantile_of_the_pooled_values(x: np.ndarray, q: float, bins: int, smallest: int) -> None:
    edges = bin_edges(*coarse_range(x), bins)
    cells = cell_counts(x, edges)
    shown = np.where(cells < smallest, 0, cells)
    found = quantile(edges, shown, q, total=x.size)
    true = np.sort(x)[max(1, math.ceil(q * x.size - 1e-9)) - 1]
    assert found.low <= true <= found.high
    assert not shown.any() or found.low <= found.value <= found.high
    if smallest < 2:
        assert found.high - found.low == pytest.approx(edges[1] - edges[0], rel=1e-6)


@pytest.mark.parametrize(("q", "total"), [(-0.1, 5), (1.1, 5), (0.5, 0)])
def test_no_such_quantile(q: float, total: int) -> None:
    with pytest.raises(ConfigError, match="no quantile"):
        quantile(np.arange(3.0), np.array([0, 5, 0, 0]), q, total=total)
