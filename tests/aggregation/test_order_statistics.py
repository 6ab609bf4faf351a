from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from hanse.aggregation import gathered
from hanse.aggregation.order_statistics import NETWORK_UP_TO, Median, TrimmedMean, network
from hanse.errors import ConfigError, UpdateRejected

F32 = np.float32
values = st.floats(-1e6, 1e6, width=32)
stacks = st.integers(1, 12).flatmap(lambda sites: arrays(F32, (sites, 5), elements=values))


def test_the_median_of_three_and_of_four(combine):
    assert_array_equal(combine(Median(), [[1, 9], [5, -3], [2, 0]]).params["w"], [2, 0])
    assert_array_equal(combine(Median(), [[1, 9], [5, -3], [2, 0], [100, 100]]).params["w"], [3.5, 4.5])


def test_the_trimmed_mean_of_five(combine):
    rows = [[-100, 1], [1, 1], [2, 1], [6, 1], [1e9, 1]]
    assert_array_equal(combine(TrimmedMean(0.2), rows).params["w"], [3, 1])
    assert_array_equal(combine(TrimmedMean(0.21), rows).params["w"], [2, 1])  # two at each end: rounded up
    assert_array_equal(combine(TrimmedMean(0), [[1, 2], [2, 4], [6, 3]]).params["w"], [3, 3])


@pytest.mark.parametrize(("sites", "left"), [(1, [0]), (2, [0, 1]), (3, [1]), (4, [1, 2])])
def test_too_few_to_trim_leave_the_middle(combine, sites, left):
    rows = [[4.0**site] for site in range(sites)]
    assert combine(TrimmedMean(0.49), rows).params["w"] == np.mean([rows[site] for site in left])


@pytest.mark.parametrize("trim", [-0.1, 0.5, float("nan")])
def test_a_trim_out_of_range(trim):
    with pytest.raises(ConfigError, match="trim"):
        TrimmedMean(trim)


@pytest.mark.parametrize("sites", [1, 2, 7, 31, NETWORK_UP_TO, NETWORK_UP_TO + 1, 70])
@pytest.mark.parametrize("dtype", [F32, np.float64])
def test_as_numpy_does_with_blocks_that_do_not_fit(monkeypatch, combine, sites, dtype):
    monkeypatch.setattr(gathered, "SCRATCH", 1)  # blocks of 512
    monkeypatch.setattr("hanse.aggregation.order_statistics.PIECE", 700)
    stack = np.random.default_rng(sites).standard_normal((sites, 3, 701)).astype(dtype)
    rows = [{"w": row} for row in stack]
    assert_array_equal(combine(Median(), rows).params["w"], np.median(stack, axis=0))
    cut = int(np.ceil(0.2 * sites)) if sites > 2 else (sites - 1) // 2
    assert_allclose(
        combine(TrimmedMean(0.2), rows).params["w"], np.sort(stack, axis=0)[cut : sites - cut].mean(axis=0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("sites", range(1, 10))
def test_the_network_sorts_whatever_comes(sites):
    """Zeros and ones in any order are enough: Knuth's 0-1 principle. What is not wanted may stand anywhere."""
    for wanted in (range(sites), range((sites - 1) // 2, sites // 2 + 1)):
        for zeros_and_ones in itertools.product((0, 1), repeat=sites):
            row = list(zeros_and_ones)
            for low, high, wants_low, wants_high in network(sites, wanted):
                smaller, larger = min(row[low], row[high]), max(row[low], row[high])
                row[low], row[high] = (smaller if wants_low else None), (larger if wants_high else None)
            assert [row[rank] for rank in wanted] == [sorted(zeros_and_ones)[rank] for rank in wanted]


@given(stacks, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.2)])
def test_who_sent_what_does_not_matter(combine, rule, stack, random):
    shuffled = list(stack)
    random.shuffle(shuffled)
    assert_array_equal(combine(rule, shuffled).params["w"], combine(rule, stack).params["w"])


@given(arrays(np.int32, (7, 4), elements=st.integers(-1000, 1000)), st.integers(-1000, 1000), st.sampled_from([-4.0, -1.0, 0.5, 2.0]))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.3)])
def test_moved_and_scaled_updates_give_a_moved_and_scaled_result(combine, rule, stack, shift, scale):
    before = combine(rule, stack).params["w"]
    assert_allclose(combine(rule, stack + shift).params["w"], before + F32(shift), rtol=1e-5, atol=1e-3)
    assert_allclose(combine(rule, stack * scale).params["w"], before * F32(scale), rtol=1e-5, atol=1e-3)


@given(arrays(F32, (5, 4), elements=values), arrays(F32, (2, 4), elements=st.floats(-(2.0**127), 2.0**127, width=32)))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.25)])
def test_the_result_lies_between_the_honest(combine, rule, honest, hostile):
    result = combine(rule, [*hostile, *honest]).params["w"]
    slack = 1e-5 * np.abs(honest).max(axis=0)  # the mean of equal numbers may be off by a rounding
    assert (result >= honest.min(axis=0) - slack).all()
    assert (result <= honest.max(axis=0) + slack).all()


def test_integers_booleans_and_complex_numbers(combine):
    rows = [
        {"n": np.array([n], np.int64), "b": np.array([b]), "z": np.array([z], np.complex64)}
        for n, b, z in [(1, True, 1 + 9j), (2, False, 2 - 9j), (9, True, 9 + 1j)]
    ]
    result = combine(Median(), rows).params
    assert (result["n"], result["b"], result["z"]) == (2, True, 2 + 1j)
    assert {name: array.dtype for name, array in result.items()} == {name: array.dtype for name, array in rows[0].items()}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, F32, np.float64])
def test_every_float_keeps_its_dtype_and_empty_tensors_their_shape(combine, dtype):
    rows = [{"w": np.array(value, dtype), "none": np.empty((0, 3), dtype)} for value in (1, 5, 3)]
    result = combine(Median(), rows).params
    assert (result["w"].dtype, result["w"].shape, result["none"].shape) == (dtype, (), (0, 3))
    assert result["w"] == 3


def test_a_tensor_left_out_is_the_median_of_those_that_sent_it(combine):
    rows = [{"w": np.array([k], F32), "v": np.array([k], F32)} for k in range(1, 4)]
    del rows[2]["v"]
    result = combine(Median(), rows, reference=rows[0], meta={"excluded": ["v"]}).params
    assert (result["w"], result["v"]) == (2, 1.5)


def test_large_finite_numbers_that_overflow_are_an_error(combine):
    with pytest.raises(UpdateRejected, match="overflows"):
        combine(TrimmedMean(0), [[3e38], [3e38]])
    assert combine(Median(), [[3e38], [3e38]]).params["w"] == F32(3e38)
