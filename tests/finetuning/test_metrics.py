from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hanse.errors import ConfigError
from hanse.finetuning.metrics import (
    Evaluation,
    Figure,
    Scores,
    evaluate,
    in_percent,
    keep_scores,
    read_scores,
    scores_file,
    table,
    write_scores,
)
from hanse.statistics.error_rates import eer
from hanse.statistics.intervals import wilson

SCORES, LABELS = np.array([0.1, 0.5, 0.9, 0.2, 0.6, 0.7]), np.array([0, 0, 0, 1, 1, 1])
DEVICES = ["a", "a", "b", "a", "a", "b"]


def some_rows(n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = np.arange(n) % 2
    return np.clip(0.3 + 0.4 * labels + rng.normal(0, 0.15, n), 0, 1), labels


def test_figures_by_hand():
    found = evaluate(SCORES, LABELS, 0.5, slices={"device": DEVICES}, seed=0)
    overall = found.overall
    assert (overall.negatives, overall.positives, overall.positive_share) == (3, 3, 0.5)
    assert overall.fpr == Figure(2 / 3, *wilson(2, 3))
    assert overall.fnr == Figure(1 / 3, *wilson(1, 3))
    assert overall.accuracy == Figure(0.5, *wilson(3, 6))
    assert overall.hter.value == pytest.approx(0.5)
    assert overall.eer.value == eer(SCORES, LABELS)[0]
    assert found.equal_error_threshold == eer(SCORES, LABELS)[1]
    assert list(found.slices["device"]) == ["a", "b"]
    b = found.slices["device"]["b"]
    assert (b.fpr.value, b.fnr.value, b.hter.value, b.eer.value) == (1.0, 0.0, 0.5, 1.0)  # the negative has the higher score


def test_intervals_hold_their_rates():
    scores, labels = some_rows()
    for groups in (None, [str(row // 8) for row in range(400)]):
        overall = evaluate(scores, labels, 0.5, groups=groups, seed=0).overall
        for rate in ("hter", "eer", "fpr", "fnr", "accuracy"):
            figure = getattr(overall, rate)
            assert 0 <= figure.low < figure.value < figure.high <= 1


def test_a_class_that_is_absent_has_no_rate():
    for groups in (None, ["x"] * 3):
        found = evaluate(SCORES[3:], LABELS[3:], 0.5, groups=groups, seed=0)
        assert found.overall.fpr == found.overall.hter == found.overall.eer == Figure()
        assert found.overall.fnr.value == 1 / 3
        assert found.equal_error_threshold is None
    assert evaluate(np.array([]), np.array([]), 0.5, seed=0).overall.accuracy == Figure()


def test_the_same_seed_gives_the_same_bits_whatever_other_slices_there_are():
    scores, labels = some_rows()
    devices = [str(row % 3) for row in range(400)]
    one = evaluate(scores, labels, 0.5, slices={"device": devices}, seed=1)
    two = evaluate(scores, labels, 0.5, slices={"half": ["x", "y"] * 200, "device": devices}, seed=1)
    assert (one.overall, one.slices["device"]) == (two.overall, two.slices["device"])
    assert evaluate(scores, labels, 0.5, seed=2).overall.hter != one.overall.hter


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1), st.sampled_from("ab")), max_size=12), st.booleans())
def test_json_round_trip(rows, grouped):
    scores, labels = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], int)
    columns = [row[2] for row in rows]
    found = evaluate(scores, labels, 0.5, slices={"s": columns}, groups=columns if grouped else None, seed=0, resamples=50)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Evaluation) == found


def test_a_column_of_another_length():
    with pytest.raises(ConfigError, match="6 rows, and column 'device' has 2"):
        evaluate(SCORES, LABELS, 0.5, slices={"device": ["a", "b"]}, seed=0)
    with pytest.raises(ConfigError, match="column 'groups' has 1"):
        evaluate(SCORES, LABELS, 0.5, groups=["a"], seed=0)


def test_the_table_has_a_line_for_each_slice():
    lines = table(evaluate(SCORES, LABELS, 0.5, slices={"device": DEVICES}, seed=0))
    assert [line["rows"] for line in lines] == ["all", "device = a", "device = b"]
    assert lines[0]["positives"] == "3 (50 %)"
    assert lines[0]["FPR %"].startswith("66.67 (")


def test_a_sectors_names():
    found = evaluate(SCORES, LABELS, 0.5, seed=0)
    line = table(found, sector="medicine")[0]
    low, high = wilson(1, 3)
    assert line["sensitivity %"] == f"66.67 ({100 * (1 - high):.2f}–{100 * (1 - low):.2f})"  # 1 - FNR
    assert line["specificity %"].startswith("33.33")
    assert table(found, sector="presentation attacks")[0]["APCER %"].startswith("33.33")  # missed attacks
    assert table(found, sector="access")[0]["FAR %"].startswith("33.33")  # missed impostors
    with pytest.raises(ConfigError, match="presentation attacks, access, medicine"):
        table(found, sector="fishing")


def test_a_rate_that_is_not_known():
    assert in_percent(Figure()) == "–"
    assert in_percent(Figure(0.25), complement=True) == "75.00"


def scored(**changes: object) -> Scores:
    facts = {"names": list("uvwxyz"), "labels": LABELS, "scores": SCORES, "slices": {"device": DEVICES}, "groups": ["1"] * 6}
    return Scores(**(facts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"slices": {}, "groups": None}])
def test_scores_come_back(tmp_path: Path, changes):
    scores = scored(**changes)
    path = keep_scores(tmp_path / "scores", scores)
    assert path == keep_scores(tmp_path / "scores", scores) == scores_file(tmp_path / "scores", scores.digest)
    read = read_scores(path)
    assert read.digest == scores.digest
    assert_array_equal(read.scores, SCORES)
    assert (read.scores.dtype, read.labels.dtype) == (np.float64, np.int64)
    assert (list(read.names), read.slices, read.groups) == (scores.names, scores.slices, scores.groups)


def test_digests_tell_rows_and_scores_apart():
    one = scored()
    changed = SCORES.copy()
    changed[2] = np.nextafter(changed[2], 1)
    other = scored(scores=changed)
    assert one.rows_digest == other.rows_digest
    assert one.digest != other.digest
    for change in ({"names": list("uvwxyy")}, {"labels": 1 - LABELS}, {"slices": {"device": ["a"] * 6}}, {"groups": None}):
        assert scored(**change).rows_digest != one.rows_digest


def test_a_file_that_holds_no_scores(tmp_path: Path):
    path = tmp_path / "scores.safetensors"
    with pytest.raises(ConfigError, match=r"scores\.safetensors holds no scores"):
        read_scores(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"scores\.safetensors holds no scores"):
        read_scores(path)
    with pytest.raises(ConfigError, match="6 rows, and 1 names"):
        write_scores(path, scored(names=["a"]))
