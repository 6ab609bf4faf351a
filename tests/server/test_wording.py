from __future__ import annotations

import math

import pytest

from hanse.server.wording import as_number, duration, in_order, number, one_line, plural, printable, quantity


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.97216, "0.9722"),
        (1.23456, "1.235"),
        (1234.5, "1,234"),
        (0.0, "0.0000"),
        (3.21e-5, "3.21e-05"),
        (-0.5, "-0.5000"),
        (12345678.9, "1.23e+07"),
        (180, "180"),
        (1_000_000, "1,000,000"),
        (10**400, "inf"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
        (None, "–"),
        ("adam", "adam"),
    ],
)
def test_numbers_have_about_four_digits(value: object, text: str) -> None:
    assert number(value) == text


def test_a_weight_that_is_whole_has_no_fraction() -> None:
    assert quantity(180.0) == "180"
    assert quantity(0.25) == "0.2500"
    assert plural(1, "site") == "1 site"
    assert plural(1000, "site") == "1,000 sites"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0.4 ms"), (0.085, "85 ms"), (0.42, "0.42 s"), (1.25, "1.2 s"), (42, "42 s"), (59.7, "1 min 00 s"), (192, "3 min 12 s"),
     (7500, "2 h 05 min"), (400_000, "4.6 days"), (math.nan, "–")],
)  # fmt: skip
def test_durations_have_two_or_three_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_could_steer_a_terminal_or_turn_text_is_replaced() -> None:
    assert printable("a\x1b[2Jb\x07\x00\u202e\ud800") == "a\ufffd[2Jb\ufffd\ufffd\ufffd\ufffd"
    assert printable("tab\tline\r\nnext") == "tab\tline\nnext"


def test_one_line_is_the_first_that_says_something() -> None:
    assert one_line("\n  \n  no module named 'torch'\nTraceback", 80) == "no module named 'torch'"
    assert one_line("abcdefgh", 5) == "abcd…"
    assert one_line("", 5) == ""


def test_sites_are_in_the_order_a_person_counts() -> None:
    assert sorted(["site-10", "site-9", "riga", "site-1"], key=in_order) == ["riga", "site-1", "site-9", "site-10"]
    assert sorted(["9" * 5000, "1"], key=in_order)[0] == "1"


def test_only_numbers_are_numbers() -> None:
    assert as_number("1") is None
    assert math.isnan(as_number(None) or 0.0)
    assert as_number(10**400) == math.inf
