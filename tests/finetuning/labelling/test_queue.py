from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.finetuning.labelling.pools import make_pool

from hanse.errors import ConfigError, Refused
from hanse.finetuning.labelling.labels import Labels
from hanse.finetuning.labelling.queue import BAND, Band, Mode, Pool, Queue, Tally, digest


def go(queue: Queue, truth: dict[str, int], count: int, mode: Mode = "band", band: Band = BAND, window: str = "w") -> list[tuple[str, str]]:
    """Label so many images truly; each file and how it came up."""
    seen = []
    for _ in range(count):
        if (shown := queue.next(window, mode, band)) is None:
            break
        file = queue.pool.names[shown.index]
        queue.label(window, file, truth[file])
        seen.append((file, shown.how))
    return seen


def test_of_ten_five_are_likely_four_any_of_the_band_and_one_any_at_all(pool: Pool, truth: dict[str, int], labels: Labels) -> None:
    seen = go(Queue(pool, labels), truth, 10)
    index = {name: i for i, name in enumerate(pool.names)}
    scores = pool.scores[[index[file] for file, _ in seen]]
    in_band = np.sort(pool.scores[(pool.scores >= BAND[0]) & (pool.scores <= BAND[1])])[::-1]
    assert [how for _, how in seen] == ["band"] * 9 + ["random"]
    assert np.array_equal(scores[::2], in_band[:5])
    assert all(BAND[0] <= score <= BAND[1] for score in scores[:9])
    assert scores[1:9:2].mean() < 0.15  # not the likely ones


def test_similar_is_the_nearest_by_cosine_to_any_confirmed_anomaly(pool: Pool, truth: dict[str, int], labels: Labels) -> None:
    queue = Queue(pool, labels)
    assert queue.next("w", "similar") is None
    go(queue, truth, 6)
    confirmed = [i for i, name in enumerate(pool.names) if name in labels.given and truth[name]]
    assert len(confirmed) > 1
    assert pool.embeddings is not None
    e = pool.embeddings.astype(float)
    cosine = np.array([[a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)) for b in e[confirmed]] for a in e]).max(axis=1)
    cosine[[i for i, name in enumerate(pool.names) if name in labels.given]] = -np.inf
    shown = queue.next("w", "similar")
    assert shown is not None
    assert (shown.index, shown.how) == (int(cosine.argmax()), "similar")


def test_similar_forgets_an_anomaly_that_is_taken_back(pool: Pool, truth: dict[str, int], labels: Labels) -> None:
    queue = Queue(pool, labels)
    first, second = (name for name in pool.names[:2])
    for file in (first, second):
        labels.give(file, 1, how="band", score=0.1)
    both = queue.next("w", "similar")
    queue.undo("other", second)
    labels.give(second, 0, how="band", score=0.1)
    assert both is not None
    again = Queue(pool, labels)
    assert np.array_equal(queue._similarity(), again._similarity())


def test_find_similar_finds_what_the_band_cannot(pool: Pool, truth: dict[str, int], labels: Labels) -> None:
    queue = Queue(pool, labels)
    go(queue, truth, 6)
    go(queue, truth, 24, "similar")
    assert {name for name, label in truth.items() if label} <= {file for file, each in labels.given.items() if each.label == 1}


def test_the_tally_by_hand(labels: Labels) -> None:
    scores = np.array([0.0, 0.005, 0.02, 0.02, 0.5, 1.0])
    pool = Pool(names=list("abcdef"), scores=scores)
    queue = Queue(pool, labels)
    for file, label, how in (("a", 0, "band"), ("c", 1, "band"), ("d", -1, "similar"), ("f", 1, "similar")):
        labels.give(file, label, how=how, score=0.1)  # type: ignore[arg-type]
    tally = queue.tally()
    assert tally.search == Tally(looked=4, found=2)
    assert [(low, each.looked, each.found) for low, _, each in tally.bands] == [
        (0, 1, 0),
        (0.01, 2, 1),
        (0.03, 0, 0),
        (0.1, 0, 0),
        (0.3, 1, 1),
    ]
    assert (tally.how["similar"], tally.chance, tally.low, tally.high) == (Tally(2, 1), Tally(0, 0), 0, 1)
    assert tally.expected == pytest.approx(1.545 / 6)


def test_the_yield_by_chance_does_not_suffer_from_what_the_search_took(tmp_path: Path) -> None:
    """Over many draws, its mean is the share of anomalies in the pool, though the search has taken most of them before."""
    shares = []
    for seed in range(8):
        with Labels(tmp_path / str(seed), by="ada") as labels:
            pool, truth = make_pool(seed)
            queue = Queue(pool, labels, seed=seed)
            go(queue, truth, 30)
            go(queue, truth, 40, "spot")
            chance = queue.tally().chance
            assert chance.looked >= 40
            shares.append(chance.found / chance.looked)
    assert np.mean(shares) == pytest.approx(0.1, abs=0.04)  # 0.03 of those that are left when the search is done


def test_spot_checks_are_drawn_from_everything_and_counted_apart(pool: Pool, truth: dict[str, int], labels: Labels) -> None:
    queue = Queue(pool, labels)
    seen = go(queue, truth, 60, "spot")
    assert {how for _, how in seen} == {"spot"}
    outside = [file for file, _ in seen if not BAND[0] <= pool.scores[queue.index[file]] <= BAND[1]]
    assert outside
    assert queue.progress("spot", BAND) == (60, 50)
    assert queue.tally().search.looked == 0


def test_lots_stay_when_images_are_added(pool: Pool, labels: Labels) -> None:
    fewer = Pool(names=pool.names[:100], scores=pool.scores[:100])
    order = [pool.names[i] for i in np.argsort(Queue(pool, labels)._lots["spot"]) if i < 100]
    assert [fewer.names[i] for i in np.argsort(Queue(fewer, labels)._lots["spot"])] == order


def test_two_windows_see_different_images_and_lose_nothing(pool: Pool, truth: dict[str, int], labels: Labels) -> None:
    queue = Queue(pool, labels)
    seen = [go(queue, truth, 1, window=window)[0][0] for _ in range(10) for window in ("a", "b")]
    assert len(set(seen)) == 20 == len(labels.given)
    one, other = queue.next("a"), queue.next("b")
    assert one is not None
    assert other is not None
    assert one.index != other.index
    assert queue.next("a") == one  # until it is labelled
    assert queue.undo("a") != queue.undo("b")
    assert set(seen[:18]) == set(labels.given)


def test_the_last_image_is_shown_to_both_windows_and_labelled_once(labels: Labels) -> None:
    queue = Queue(Pool(names=["a"], scores=np.array([0.1])), labels)
    assert queue.next("a") == queue.next("b") != None  # noqa: E711
    queue.label("a", "a", 1)
    with pytest.raises(Refused, match="was labelled an anomaly"):
        queue.label("b", "a", 0)
    assert queue.next("b") is None


def test_only_what_a_window_shows_can_be_labelled(pool: Pool, labels: Labels) -> None:
    queue = Queue(pool, labels)
    queue.next("w")
    with pytest.raises(Refused, match="not what this window shows"):
        queue.label("w", pool.names[0], 1)
    with pytest.raises(Refused, match="not what this window shows"):
        queue.label("unknown", pool.names[0], 1)
    assert not labels.given


def test_only_what_there_is_can_be_taken_back(pool: Pool, truth: dict[str, int], labels: Labels) -> None:
    queue = Queue(pool, labels)
    labels.give("day-0/1.png", 1, how="band", score=0.1, window="w")  # of another pool
    ((file, _),) = go(queue, truth, 1, window="v")
    for window, of, says in (
        ("w", None, "this window has no label"),
        ("w", "day-0/1.png", "not one of these"),
        ("w", pool.names[0], "has no label"),
    ):
        if of != file:
            with pytest.raises(Refused, match=says):
                queue.undo(window, of)
    assert pool.names[queue.undo("w", file).index] == file
    assert list(labels.given) == ["day-0/1.png"]


def test_an_empty_band_and_an_empty_pool_show_nothing(pool: Pool, labels: Labels) -> None:
    assert Queue(pool, labels).next("w", "band", (0.9, 0.95)) is None
    empty = Queue(Pool(names=[], scores=np.zeros(0)), labels)
    assert [empty.next("w", mode) for mode in ("band", "similar", "spot")] == [None] * 3
    assert empty.tally().expected == 0


def test_the_same_name_for_another_image_is_an_error(pool: Pool, labels: Labels) -> None:
    labels.give(pool.names[3], 1, how="band", score=0.1, digest=digest(pool, 3))
    Queue(pool, labels).check()
    assert isinstance(pool.images, np.ndarray)
    other = Pool(names=pool.names, scores=pool.scores, images=255 - pool.images)
    with pytest.raises(ConfigError, match=r"day-1/003\.png is not the image that was labelled"):
        Queue(other, labels).check()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"names": ["a"]}, "1 names, but 2 scores"),
        ({"names": ["a", "a"]}, "same name"),
        ({"scores": np.array([0.1, np.nan])}, "probabilities"),
        ({"columns": {"device": ["x"]}}, "1 device"),
    ],
)
def test_a_pool_must_fit_together(parts: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Pool(**{"names": ["a", "b"], "scores": np.array([0.1, 0.2]), **parts})  # type: ignore[arg-type]


STEPS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["band", "similar", "spot", "undo"]), st.sampled_from([-1, 0, 1])),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, size=st.integers(1, 12))
def test_no_image_comes_up_twice_and_replay_gives_the_same_state(
    steps: list[tuple[str, Mode, int]], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(size)
    pool = Pool(names=[str(i) for i in range(size)], scores=rng.random(size), embeddings=rng.normal(size=(size, 3)))
    folder = tmp_path_factory.mktemp("project")
    with Labels(folder, by="ada") as labels:
        queue = Queue(pool, labels)
        for window, mode, label in steps:
            if mode == "undo":  # type: ignore[comparison-overlap]
                mine = [each for each in labels.given.values() if each.window == window]
                if mine:
                    assert pool.names[queue.undo(window).index] == mine[-1].file not in labels.given
                continue
            if shown := queue.next(window, mode, (0.2, 0.9)):
                assert pool.names[shown.index] not in labels.given
                queue.label(window, pool.names[shown.index], label)
            elif mode == "spot":
                assert len(labels.given) == size
        state, tally = dict(labels.given), queue.tally()
    with Labels(folder, by="bob") as labels:
        assert dict(labels.given) == state
        assert Queue(pool, labels).tally() == tally
