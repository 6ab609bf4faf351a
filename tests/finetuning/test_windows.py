from __future__ import annotations

import msgspec
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from hanse.finetuning.reference import Reference, reference
from hanse.finetuning.windows import Sums, decode_arrays, encode_arrays, figures, moved, nothing, sums_of
from hanse.statistics import drift


def draw(n: int, *, seed: int, other: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A quarter positive. other: moves embeddings alone."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 4 == 0).astype(np.int64)
    embeddings = rng.normal(0, 0.3, size=(n, 4)) + labels[:, None]
    embeddings[:, 0] += other
    return 1 / (1 + np.exp(-rng.normal(np.where(labels == 1, 3, -3), 2))), labels, embeddings.astype(np.float32)


@pytest.fixture(scope="module")
def known() -> Reference:
    scores, labels, embeddings = draw(1200, seed=0)
    return reference(scores, labels, embeddings, 0.5, seed=0, sizes=(50, 100), resamples=400)


def test_sums_of_parts_add_up(known: Reference) -> None:
    scores, _, embeddings = draw(60, seed=1)
    devices = ["a", "b", "c"] * 20
    whole, parts = sums_of(known, scores, embeddings, {"device": devices}), nothing(known)
    for rows in (slice(0, 1), slice(1, 31), slice(31, 60)):
        parts.add(sums_of(known, scores[rows], embeddings[rows], {"device": devices[rows]}))
    for mine, theirs in ((parts, whole), *((parts.slices["device"][name], whole.slices["device"][name]) for name in "abc")):
        assert (mine.inputs, mine.embedded, mine.decided_positive) == (theirs.inputs, theirs.embedded, theirs.decided_positive)
        assert_array_equal(mine.cells, theirs.cells)
        assert_allclose(mine.features, theirs.features, atol=1e-5)
    again = msgspec.json.decode(msgspec.json.encode(parts, enc_hook=encode_arrays), type=Sums, dec_hook=decode_arrays)
    assert_array_equal(again.slices["device"]["a"].features, parts.slices["device"]["a"].features)


def test_figures_are_those_of_the_inputs_themselves(known: Reference) -> None:
    holdout, _, _ = draw(1200, seed=0)
    scores, _, embeddings = draw(100, seed=2)
    found = figures(known, sums_of(known, scores, embeddings, {}), positives=None, level=0.01, window=7)
    exact = stats.ks_2samp(scores, holdout).statistic
    assert exact - 1 / 200 <= found.ks <= exact + 1e-9  # at the points of the sketch and between them
    features = drift.fourier_features(embeddings, known.frequencies).mean(0)
    all_features = drift.fourier_features(draw(1200, seed=0)[2], known.frequencies).mean(0)
    assert found.mmd2 == pytest.approx(drift.mmd2(features, all_features), abs=1e-6)
    assert (found.window, found.inputs, found.decided_positive) == (7, 100, np.mean(scores >= 0.5))
    assert found.positives == pytest.approx(0.25, abs=3 * found.positives_error)
    assert not found.differs


def test_with_the_share_of_positives_that_it_has_a_window_is_explained(known: Reference) -> None:
    scores, labels, embeddings = draw(800, seed=3)
    sums = sums_of(known, scores[labels == 1][:100], embeddings[labels == 1][:100], {})
    assert figures(known, sums, positives=None, level=0.01).differs
    assert not figures(known, sums, positives=1.0, level=0.01).differs


def test_mmd_needs_all_embeddings(known: Reference) -> None:
    scores, _, embeddings = draw(100, seed=4)
    sums = sums_of(known, scores[:99], embeddings[:99], {})
    sums.add(sums_of(known, scores[99:], None, {}))
    assert figures(known, sums, positives=None, level=0.01).mmd2 is None


def test_a_slice_whose_embeddings_moved_comes_first(known: Reference) -> None:
    old, new = draw(160, seed=5), draw(40, seed=6, other=1.0)
    scores, embeddings = (np.concatenate([old[i], new[i]]) for i in (0, 2))
    columns = {"device": ["a", "b", "c", "d", "e"] * 32 + ["new"] * 40}
    first, *others = moved(known, sums_of(known, scores, embeddings, columns), positives=None)
    assert (first.column, first.value, first.inputs, len(others)) == ("device", "new", 40, 2)
    assert first.mmd2 is not None
    assert all(first.mmd2 > 3 * (other.mmd2 or 0) for other in others)


def test_no_more_than_fifty_values_of_a_column_are_told_apart(known: Reference) -> None:
    scores, _, _ = draw(120, seed=7)
    sums = sums_of(known, scores[:60], None, {"device": [str(i) for i in range(60)]})
    sums.add(sums_of(known, scores[60:], None, {"device": ["0", *(f"more {i}" for i in range(59))]}))
    assert len(sums.slices["device"]) == 50
    assert sums.slices["device"]["0"].inputs == 2
