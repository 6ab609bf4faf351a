from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hanse.server.chart import Columns, Points, bars, curves, histogram, nice_steps

finite = st.floats(-1e100, 1e100)


def columns(*entries: tuple[int, int, float]) -> Columns:
    made = Columns()
    for site, x, value in entries:
        made.add(site, x, value)
    return made


@given(finite, finite)
@settings(max_examples=100)
def test_steps_are_few_even_and_hold_the_range(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    steps = nice_steps(low, high, 4)
    assert 2 <= len(steps) <= 8
    slack = 1e-6 * (steps[-1] - steps[0])
    assert steps[0] <= low + slack
    assert steps[-1] >= high - slack


def test_steps_are_round_numbers() -> None:
    assert nice_steps(0.0, 1.0, 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert nice_steps(1, 5, 6, whole=True) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_value_given_twice_counts_as_given_last() -> None:
    curve = columns((0, 2, 0.5), (0, 1, 0.1), (0, 2, 0.7)).by_site(limit=1)
    assert curve is not None
    assert_array_equal(curve[0].x, [1, 2])
    assert_array_equal(curve[0].y, [0.1, 0.7])


def test_the_mean_passes_over_nan() -> None:
    mean = columns((0, 1, 1.0), (1, 1, 3.0), (0, 2, math.nan), (1, 2, 5.0)).mean()
    assert_array_equal(mean.x, [1, 2])
    assert_array_equal(mean.y, [2.0, 5.0])


def test_forty_sites_are_lines_and_one_more_makes_a_band() -> None:
    def drawn(sites: int) -> list[str]:
        made = columns(*[(site, x, site + x) for site in range(sites) for x in (1, 2, 3)])
        chart = curves(
            "loss",
            made,
            [f"s{i}" for i in range(sites)],
            subtitle="",
            x_label="round",
            bold=made.mean(),
            bold_label="global",
            max_points=999,
        )
        return [mark.look for mark in chart.marks]

    assert drawn(40) == ["site"] * 40 + ["bold"]
    assert drawn(41) == ["band", "median", "bold"]
    assert drawn(2) == ["site s0", "site s1", "bold"]


def test_a_nan_is_a_gap_and_is_told() -> None:
    made = columns(*[(0, x, math.nan if x == 3 else float(x)) for x in range(1, 6)])
    chart = curves("loss", made, ["a"], subtitle="", x_label="round", bold=None, bold_label="", max_points=99)
    assert chart.marks[0].path.count("M") == 2
    assert chart.note == "1 value not finite, left out."
    assert "nan" not in chart.marks[0].path


def test_long_curves_are_thinned_out_and_keep_their_ends() -> None:
    made = columns(*[(0, x, float(x)) for x in range(10_000)])
    path = curves("loss", made, ["a"], subtitle="", x_label="step", bold=None, bold_label="", max_points=100).marks[0].path
    assert path.count("L") == 99
    assert path.startswith("M48.0,")
    assert path.endswith("L428.0,10.0")


def test_a_value_alone_is_a_dot() -> None:
    chart = curves("loss", columns((0, 1, 2.0)), ["a"], subtitle="", x_label="round", bold=None, bold_label="", max_points=9)
    assert chart.marks[0].look == "site s0 alone"


def test_labels_of_neighbouring_ticks_differ() -> None:
    for values in ([0.42711, 0.42712], [1e7, 1e7 + 1], [-1e-9, 1e-9], [0.0, 0.0], [1e20, -1e20], [0.125, 0.15]):
        made = columns(*[(0, x, value) for x, value in enumerate(values)])
        chart = curves("m", made, ["a"], subtitle="", x_label="round", bold=None, bold_label="", max_points=9)
        labels = [tick.label for tick in chart.y_ticks]
        assert len(set(labels)) == len(labels), labels
        assert all(len(label) <= 9 for label in labels), labels


def test_bars_stand_on_zero() -> None:
    chart = bars("t", Points(np.array([1.0, 2.0]), np.array([2.0, 4.0])), {}, subtitle="", x_label="round", bar_label="all")
    assert [mark.look for mark in chart.marks] == ["bar", "bar"]
    assert chart.y_ticks[0].label == "0"
    assert chart.y_ticks[0].at == 200.0
    assert "V10.0" in chart.marks[1].path  # 4 s, the top of the axis
    assert "V105.0" in chart.marks[0].path  # half of it


def test_a_histogram_has_a_bar_for_each_bin_with_values() -> None:
    edges, counts = np.array([0.0, 0.5, 1.0, 1.5]), np.array([3.0, 0.0, 1.0])
    chart = histogram("age", edges, counts, {"eu": np.array([1.0, 1, 0])}, subtitle="", note="", bar_label="all")
    assert [mark.title for mark in chart.marks] == ["0.0000 to 0.5000: 3 values, 75.0 %", "1.000 to 1.500: 1 values, 25.0 %", "eu"]
    assert [tick.label for tick in chart.x_ticks] == ["0.0", "0.5", "1.0", "1.5"]
    assert histogram("none", edges, counts * 0, {}, subtitle="", note="", bar_label="all").marks == []
