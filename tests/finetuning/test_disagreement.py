"""The disagreement report: counted by hand, repeated inputs once, hostile names harmless."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from hanse.errors import ConfigError
from hanse.finetuning.disagreement import PAIRS, REPORT, disagreement, pairs_file, read_pairs, words, write_report
from hanse.finetuning.routing import Pair
from hanse.finetuning.serving import append_lines

A, B, C = (f"blake3:{letter * 64}" for letter in "abc")


def pair(
    number: int, current: float, candidate: float, *, name: str = "", device: str = "d0", label: int | None = None, other: str = B
) -> Pair:
    return Pair(
        name=name or f"n{number}", input=f"{number:064x}", time=1.8e9 + number, current=A, candidate=other, current_score=current,
        candidate_score=candidate, current_decision=int(current >= 0.5), candidate_decision=int(candidate >= 0.5), answered_by="current",
        columns={"device": device}, label=label,
    )  # fmt: skip


def keep(folder: Path, pairs: list[Pair]) -> Path:
    path = pairs_file(folder, pairs[0])
    append_lines(path, pairs)
    return path


def test_counts_by_hand(tmp_path: Path):
    pairs = [
        pair(0, 0.9, 0.1, label=1),  # only the current version says positive, and is right
        pair(1, 0.2, 0.7, label=1),  # only the candidate, and is right
        pair(2, 0.4, 0.6, device="d1", label=1),
        pair(3, 0.1, 0.2, device="d1", label=1),  # both wrong
        pair(4, 0.8, 0.8),
    ]
    keep(tmp_path, [*pairs, pairs[1], pairs[1]])
    found = disagreement(tmp_path)
    assert (found.current, found.candidate, found.inputs, found.lines, found.answered_by_candidate) == (A, B, 5, 7, 0)
    both = found.differing
    assert [(each.count, each.of) for each in (both.either, both.only_current, both.only_candidate)] == [(3, 5), (1, 5), (2, 5)]
    low, high = binomtest(3, 5).proportion_ci(method="wilson")
    assert (both.either.low, both.either.high) == pytest.approx((low, high))
    assert found.p_value == binomtest(1, 3).pvalue == 1
    assert {value: each.either.count for value, each in found.slices["device"].items()} == {"d0": 2, "d1": 1}
    assert (found.labelled.inputs, found.labelled.current_right, found.labelled.candidate_right) == (4, 1, 2)
    assert [each.name for each in found.differing_inputs] == ["n0", "n1", "n2"]  # by the size of the difference
    assert found.differences["0.5"] == pytest.approx(0.1)
    assert (found.differences["0"], found.differences["1"]) == pytest.approx((-0.8, 0.5))
    assert "1 are positive for the current version alone, 2 for the candidate alone" in words(found)[1]


def test_against_plain_counting(tmp_path: Path):
    rng = np.random.default_rng(5)
    current, candidate = rng.random(500), rng.random(500) ** 2
    keep(tmp_path, [pair(row, *scores) for row, scores in enumerate(zip(current.tolist(), candidate.tolist(), strict=True))])
    found = disagreement(tmp_path)
    (_, only_candidate), (only_current, _) = confusion_matrix(current >= 0.5, candidate >= 0.5)
    assert (found.differing.only_current.count, found.differing.only_candidate.count) == (only_current, only_candidate)
    assert found.p_value == pytest.approx(binomtest(int(only_current), int(only_current + only_candidate)).pvalue)
    assert found.differences["0.05"] == pytest.approx(np.quantile(candidate - current, 0.05))
    assert "decides positive less often" in words(found)[2]


def test_the_last_comparison_or_the_one_that_is_named(tmp_path: Path):
    first = keep(tmp_path, [pair(0, 0.1, 0.2)])
    second = keep(tmp_path, [pair(0, 0.1, 0.2, other=C)])
    for path, at in ((first, 1), (second, 2)):
        os.utime(path, (at, at))
    assert disagreement(tmp_path).candidate == C
    assert disagreement(tmp_path, "blake3:bbbb").candidate == disagreement(tmp_path, "bb").candidate == B
    for folder, digits in ((tmp_path, "ff"), (tmp_path / "none", "")):
        with pytest.raises(ConfigError, match="no comparison"):
            disagreement(folder, digits)


def test_a_line_that_a_crash_cut_off_and_one_that_was_altered(tmp_path: Path):
    path = keep(tmp_path, [pair(0, 0.1, 0.2), pair(1, 0.1, 0.2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert [each.name for each in read_pairs(path)] == ["n0"]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(ConfigError, match="line 1"):
        disagreement(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="no comparison"):
        disagreement(tmp_path)


def test_the_page_holds_the_report_and_runs_nothing(tmp_path: Path):
    keep(tmp_path, [pair(0, 0.9, 0.1, name="<script>alert(1)</script>\x1b[2J", device='"><img src=x>', label=0)])
    found = disagreement(tmp_path)
    path = write_report(found, tmp_path)
    page = path.read_text()
    assert path == tmp_path / REPORT
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    assert "1 of 1 (100.00%" in page
    assert json.loads(path.with_suffix(".json").read_text())["differing"]["only_current"]["count"] == 1
    assert sorted(each.name for each in path.parent.iterdir()) == ["disagreement.html", "disagreement.json"]
    assert list((tmp_path / PAIRS).iterdir())
