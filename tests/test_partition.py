"""Splits of a data set, against what their papers promise."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import ConfigError
from hanse.partition import Partition, by_column, dirichlet, iid, quantity, shards, virtual

LABELS = np.repeat(np.arange(10), 100)


def all_rows(partition: Partition) -> list[int]:
    return sorted(row for rows in partition for row in rows.tolist())


@st.composite
def splits(draw: st.DrawFn) -> tuple[Partition, int, int]:
    """Any partition that promises to be disjoint and complete, with its rows and its least size."""
    sites, seed = draw(st.integers(1, 12)), draw(st.integers(0, 1000))
    rows = draw(st.integers(sites * 2, 200))
    labels = np.array(draw(st.lists(st.sampled_from("abcd"), min_size=rows, max_size=rows)))
    match draw(st.sampled_from(["iid", "lognormal", "power", "dirichlet", "shards", "by_column"])):
        case "iid":
            return iid(rows, sites, seed=seed), rows, rows // sites
        case "dirichlet":
            return dirichlet(labels, sites, alpha=draw(st.sampled_from([0.1, 1.0, 100.0])), min_rows=0, seed=seed), rows, 0
        case "shards":
            return shards(labels, sites, seed=seed), rows, rows // sites - 1
        case "by_column":
            return by_column(labels), rows, 1
        case law:
            return quantity(rows, sites, law=law, skew=draw(st.floats(0, 5)), min_rows=2, seed=seed), rows, 2  # type: ignore[arg-type]


@given(splits())
@settings(max_examples=150, deadline=None)
def test_every_row_is_at_one_site(split: tuple[Partition, int, int]) -> None:
    partition, rows, least = split
    assert all_rows(partition) == list(range(rows))
    assert [len(found) for found in partition] == partition.sizes.tolist()
    assert partition.sizes.min() >= least
    assert partition.rows == rows
    assert all(found.dtype == np.int64 and not found.flags.writeable for found in partition)


@given(st.integers(1, 3000), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_iid_is_a_permutation_in_even_blocks(rows: int, seed: int) -> None:
    partition = iid(rows, max(1, rows // 3), seed=seed)
    assert all_rows(partition) == list(range(rows))
    assert np.ptp(partition.sizes) <= 1


@pytest.mark.parametrize("rows", [3, 6, 10])
def test_iid_gives_every_row_to_every_site_as_often(rows: int) -> None:
    """A χ² test for each site over 1,000 seeds; 40 is beyond the 1e-5 quantile of 9 degrees of freedom."""
    draws = 1000
    found = np.zeros((rows, rows))
    for seed in range(draws):
        found[range(rows), [int(site[0]) for site in iid(rows, rows, seed=seed)]] += 1
    expected = draws / rows
    assert ((found - expected) ** 2 / expected).sum(axis=1).max() < 40


def test_iid_is_the_same_whether_its_order_is_kept_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [rows.tolist() for rows in iid(1000, 7, seed=2)]
    monkeypatch.setattr("hanse.partition._KEPT", 0)
    assert [rows.tolist() for rows in iid(1000, 7, seed=2)] == kept


def test_iid_mixes_neighbours() -> None:
    """Rows that lie beside each other are as likely at one site as any: of 1,000 rows of each label, a site of 1,000 has about 100."""
    labels = np.repeat(np.arange(10), 1000)
    _, counts = iid(len(labels), 10).counts(labels)
    assert 60 < counts.min() <= counts.max() < 140


def test_a_site_among_a_million_costs_its_own_rows() -> None:
    tracemalloc.start()
    try:
        for partition in (iid(10**9, 10**6), virtual(LABELS, 10**6, rows_per_site=20, alpha=0.1)):
            for rank in (0, 999_999):
                assert len(partition[rank]) == partition.rows // 10**6 or len(partition[rank]) == 20
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_shards_by_hand() -> None:
    """Six rows, sorted by label 0 3 | 1 4 | 2 5, in pieces of one: each of the three sites gets two of the six."""
    partition = shards([0, 1, 2, 0, 1, 2], 3, seed=1)
    assert partition.sizes.tolist() == [2, 2, 2]
    assert all_rows(partition) == list(range(6))


def test_shards_of_one_label_each() -> None:
    """Ten labels of 100 rows, 10 sites of two pieces of 50: a piece has one label, so no site has more than two."""
    _, counts = shards(LABELS, 10).counts(LABELS)
    assert set(np.unique(counts)) <= {0, 50, 100}
    assert ((counts > 0).sum(axis=1) <= 2).all()


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    """Of one label's rows a site gets 1/J in the mean, with variance (J - 1) / J² / (αJ + 1)."""
    sites, alpha = 5, 0.5
    labels = np.zeros(10_000, int)
    shares = np.array([dirichlet(labels, sites, alpha=alpha, min_rows=0, seed=seed).sizes for seed in range(400)]) / len(labels)
    assert shares.mean() == pytest.approx(1 / sites)
    assert shares.var() == pytest.approx((sites - 1) / sites**2 / (alpha * sites + 1), rel=0.1)


def test_dirichlet_skews_labels_as_alpha_says() -> None:
    def evenness(alpha: float) -> float:
        _, counts = dirichlet(LABELS, 8, alpha=alpha).counts(LABELS)
        mix = counts / counts.sum(axis=1, keepdims=True)
        return float(np.mean(np.max(mix, axis=1)))

    assert evenness(0.1) > 0.5 > evenness(1.0) > evenness(1000.0)
    assert evenness(1000.0) == pytest.approx(0.1, abs=0.03)


def test_dirichlet_draws_until_every_site_has_enough() -> None:
    assert dirichlet(LABELS, 8, alpha=0.1, min_rows=30).sizes.min() >= 30
    with pytest.raises(ConfigError, match=r"100 draws of alpha=0\.01 have each left one of 100 sites with fewer than 1 of 1,000 rows"):
        dirichlet(LABELS, 100, alpha=0.01)


def test_quantity_by_hand() -> None:
    """Power law, skew 1: beyond one row each, 11 rows as 1 : 1/2 : 1/3 = 6 : 3 : 2."""
    assert sorted(quantity(14, 3, law="power", skew=1).sizes.tolist()) == [3, 4, 7]
    assert quantity(14, 7, skew=0).sizes.tolist() == [2] * 7


def test_lognormal_sizes_spread_as_the_skew_says() -> None:
    sizes = quantity(10**8, 2000, skew=1.5, min_rows=0).sizes
    assert np.log(sizes[sizes > 0]).std() == pytest.approx(1.5, rel=0.1)


def test_by_column_has_a_site_for_each_value() -> None:
    partition = by_column(["zoe", "ada", "zoe", "bob"])
    assert partition.names == ("ada", "bob", "zoe")
    assert [rows.tolist() for rows in partition] == [[1], [3], [0, 2]]


def test_virtual_sites_draw_their_own() -> None:
    partition = virtual(LABELS, 100_000, rows_per_site=50, alpha=0.1, seed=3)
    assert partition[7].tolist() == partition[7].tolist() != partition[8].tolist()
    assert virtual(LABELS, 10, rows_per_site=50, alpha=0.1, seed=3)[7].tolist() == partition[7].tolist()  # whatever sites there are
    _, counts = partition.counts(LABELS, range(2000))
    assert (counts.sum(axis=1) == 50).all()
    assert np.mean(counts.max(axis=1)) > 25  # skewed
    assert counts.sum(axis=0) / counts.sum() == pytest.approx(np.full(10, 0.1), abs=0.03)  # and not on the whole
    assert all(len(set(virtual(LABELS, 9, rows_per_site=200)[rank].tolist())) == 200 for rank in range(9))


def test_virtual_takes_a_label_again_only_where_it_runs_out() -> None:
    rows = virtual([0, 1, 1], 5, rows_per_site=40, alpha=1.0)[0]
    assert len(rows) == 40
    assert set(rows.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("make", [
    lambda seed: iid(1000, 9, seed=seed), lambda seed: quantity(1000, 9, seed=seed), lambda seed: shards(LABELS, 9, seed=seed),
    lambda seed: dirichlet(LABELS, 9, alpha=1.0, seed=seed), lambda seed: virtual(LABELS, 9, rows_per_site=20, seed=seed),
])  # fmt: skip
def test_the_seed_says_it_all(make: Any) -> None:
    same, other, another = ([rows.tolist() for rows in make(seed)] for seed in (4, 4, 5))
    assert same == other != another


def test_summary_shows_sizes_and_labels() -> None:
    lines = by_column(["b", "a", "b"]).summary([1, 0, 0]).splitlines()
    assert lines == ["2 sites, 3 rows; a site has 1 to 2, in the median 2", "site  rows  0  1", "   a     1  1  0", "   b     2  1  1"]
    assert iid(100, 30).summary().splitlines()[-1] == "and 10 more sites"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: iid(3, 4), "3 rows cannot be split among 4 sites"),
        (lambda: iid(0, 1), "0 rows cannot"),
        (lambda: iid(3, 0), "sites is 0"),
        (lambda: iid(3.5, 1), "rows is 3.5"),  # type: ignore[arg-type]
        (lambda: shards([0, 1, 2], 2), "3 rows cannot be split among 2 sites, 2 for each"),
        (lambda: shards([0], 1, per_site=0), "per_site is 0"),
        (lambda: dirichlet([0, 1], 3, alpha=1), "2 rows cannot"),
        (lambda: dirichlet([0, 1], 3, alpha=1, min_rows=-1), "min_rows is -1"),
        (lambda: dirichlet([0, 1], 2, alpha=0), "alpha is 0"),
        (lambda: dirichlet([[0, 1]], 2, alpha=1), r"labels have shape \(1, 2\)"),
        (lambda: quantity(9, 3, min_rows=4), "9 rows cannot be split among 3 sites, 4"),
        (lambda: quantity(9, 3, law="normal"), "law is 'normal'"),  # type: ignore[arg-type]
        (lambda: quantity(9, 3, skew=-1), "skew is -1"),
        (lambda: by_column([]), "0 rows cannot"),
        (lambda: virtual([0, 1], 3, rows_per_site=3), "rows_per_site is 3"),
        (lambda: virtual([0, 1], 3, rows_per_site=0), "rows_per_site is 0"),
        (lambda: virtual([0, 1], 3, rows_per_site=1, alpha=float("nan")), "alpha is nan"),
        (lambda: iid(4, 2).counts([0, 1]), "2 labels, and the partition is of 4 rows"),
    ],
)  # fmt: skip
def test_wrong_arguments(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_site_has_no_name_here() -> None:
    with pytest.raises(ConfigError, match=r"rows of 'site-1': give a site's rank, partition\[site.rank\]"):
        iid(4, 2)["site-1"]  # type: ignore[call-overload, index]


@pytest.mark.parametrize("rank", [-1, 2])
def test_no_such_site(rank: int) -> None:
    with pytest.raises(IndexError):
        iid(4, 2)[rank]
