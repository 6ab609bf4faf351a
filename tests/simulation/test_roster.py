from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.simulation.roster import NamedSites, NumberedSites


def test_numbers_have_as_many_digits_as_the_last() -> None:
    assert list(NumberedSites(3)) == ["site-1", "site-2", "site-3"]
    assert (NumberedSites(10)[0], NumberedSites(10)[9]) == ("site-01", "site-10")


@given(st.integers(1, 2000))
def test_the_order_of_names_is_that_of_ranks(count: int) -> None:
    sites = NumberedSites(count)
    assert list(sites) == sorted(sites) == list(sites[:])
    assert [sites.index(name) for name in sites] == list(range(count)) == list(range(len(sites)))


def test_a_million_sites_are_no_million_strings() -> None:
    sites = NumberedSites(10**12)
    assert sites[-1] == "site-1000000000000"
    assert sites.index("site-0000000000007") == 6
    assert sites[5:8] == ["site-0000000000006", "site-0000000000007", "site-0000000000008"]
    assert "site-1" not in [sites[0]]


@pytest.mark.parametrize("name", ["site-0", "site-01", "site-5", "site-", "site--1", "1", "site-1 ", "site-１", "client-1", 1, None])
def test_names_of_nobody(name: object) -> None:
    with pytest.raises(ValueError, match="is none of site-1 to site-4"):
        NumberedSites(4).index(name)


@pytest.mark.parametrize("rank", [4, -5])
def test_ranks_of_nobody(rank: int) -> None:
    with pytest.raises(IndexError):
        NumberedSites(4)[rank]


def test_names_of_their_own_are_ranked() -> None:
    sites = NamedSites(["bob", "Zoe", "ada"])
    assert list(sites) == ["Zoe", "ada", "bob"] == list(sites[:])
    assert [sites.index(name) for name in sites] == [0, 1, 2]
    assert len(sites) == 3
    with pytest.raises(ValueError, match=r"'eve' is none of Zoe, ada, bob$"):
        sites.index("eve")
    with pytest.raises(ValueError, match="is none of 0, 1, 2, 3, 4, 5, 6, 7 …"):
        NamedSites("012345678").index("x")
