from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import ConfigError, Refused, WireError
from hanse.finetuning.labelling.labels import ANOMALY, NORMAL, UNSURE, How, Label, Labels, read_labels, replay, training_set
from hanse.site import ledger


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_what_is_sure_and_spot_checks_apart(tmp_path: Path) -> None:
    with Labels(tmp_path, by="ada") as labels:
        labels.give("a,1.png", ANOMALY, how="band", score=0.25, columns={"device": "phone"})
        labels.give("b.png", UNSURE, how="similar", score=0.5)
        labels.give("c.png", NORMAL, how="random", score=0.0)
        labels.give("d.png", NORMAL, how="spot", score=1e-9)
    found = rows(tmp_path / "labels" / "labels.csv")
    assert list(found[0]) == ["file", "label", "by", "when", "how", "score", "device"]
    assert [(row["file"], row["label"], row["how"], row["score"], row["device"]) for row in found] == [
        ("a,1.png", "1", "band", "0.25", "phone"),
        ("c.png", "0", "random", "0.0", ""),
    ]
    assert [(row["file"], float(row["score"])) for row in rows(tmp_path / "labels" / "spot-checks.csv")] == [("d.png", 1e-9)]


def test_undo_is_a_line_of_the_journal_and_restores_what_was(tmp_path: Path) -> None:
    with Labels(tmp_path, by="ada") as labels:
        labels.give("a.png", ANOMALY, how="band", score=0.2, window="w")
        before = dict(labels.given), (tmp_path / "labels" / "labels.csv").read_bytes()
        labels.give("b.png", NORMAL, how="band", score=0.1, window="w")
        assert labels.undo("b.png").file == "b.png"
        assert (dict(labels.given), (tmp_path / "labels" / "labels.csv").read_bytes()) == before
        labels.give("b.png", ANOMALY, how="band", score=0.1, window="w")
    assert [line["kind"] for line in ledger.read(tmp_path / "labels" / "journal.jsonl")] == ["label", "label", "undo", "label"]
    assert [(each.file, each.label) for each in read_labels(tmp_path)] == [("a.png", ANOMALY), ("b.png", ANOMALY)]


def test_refused_are_a_second_label_and_an_undo_of_nothing(labels: Labels) -> None:
    labels.give("a.png", ANOMALY, how="band", score=0.2, window="w")
    with pytest.raises(Refused, match=r"a\.png was labelled an anomaly by ada"):
        labels.give("a.png", NORMAL, how="band", score=0.2)
    with pytest.raises(Refused, match=r"b\.png has no label"):
        labels.undo("b.png")
    assert [each.label for each in labels.given.values()] == [ANOMALY]


def test_a_second_process_is_kept_out(labels: Labels, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another process"):
        Labels(tmp_path, by="bob")


def test_an_altered_journal_is_found(tmp_path: Path) -> None:
    with Labels(tmp_path, by="ada") as labels:
        labels.give("a.png", NORMAL, how="band", score=0.2)
        labels.give("b.png", NORMAL, how="band", score=0.2)
    path = tmp_path / "labels" / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"label":0', b'"label":1', 1))
    with pytest.raises(WireError, match="altered"):
        read_labels(tmp_path)
    with pytest.raises(WireError, match="altered"):
        Labels(tmp_path, by="ada")


def test_replay_names_a_line_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="line 7"):
        replay([{"kind": "undo", "n": 7, "file": "a.png", "of": 3}])
    with pytest.raises(ConfigError, match="line 4"):
        replay([{"kind": "label", "n": 4, "file": "a.png"}])


ACTIONS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([ANOMALY, NORMAL, UNSURE, None])), max_size=12)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, cut=st.floats(0, 1))
def test_after_a_crash_in_the_middle_of_a_line_all_whole_lines_stand(
    actions: list[tuple[str, int | None]], cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """None takes a label back. The journal is cut off at any byte; a plain dictionary says what must stand."""
    folder = tmp_path_factory.mktemp("project")
    model: dict[str, int] = {}
    states = [dict(model)]
    with Labels(folder, by="ada") as labels:
        for file, label in actions:
            if (label is None) == (file in model):
                if label is None:
                    labels.undo(file)
                    del model[file]
                else:
                    labels.give(file, label, how="band", score=0.5)
                    model[file] = label
                states.append(dict(model))
        assert {file: each.label for file, each in labels.given.items()} == model
    path = folder / "labels" / "journal.jsonl"
    data = path.read_bytes()
    kept = data[: round(cut * len(data))]
    path.write_bytes(kept)
    expected = states[kept.count(b"\n")]
    assert {each.file: each.label for each in read_labels(folder)} == expected
    with Labels(folder, by="ada") as labels:
        assert {file: each.label for file, each in labels.given.items()} == expected
        labels.give("new", ANOMALY, how="band", score=0.5)
    sure = {file for file, label in expected.items() if label != UNSURE}
    assert {row["file"] for row in rows(folder / "labels" / "labels.csv")} == sure | {"new"}
    shutil.rmtree(folder)


CRASHER = """
import sys
from itertools import count
from pathlib import Path
from hanse.finetuning.labelling.labels import Labels

labels = Labels(Path(sys.argv[1]), by="ada")
for i in count():
    labels.give(f"{i}.png", i % 2, how="band", score=0.1)
    print(i, flush=True)
"""


def test_what_was_given_survives_kill_9(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CRASHER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if (given := int(line)) == 40:
                process.send_signal(signal.SIGKILL)
                break
    with Labels(tmp_path, by="ada") as labels:
        names = list(labels.given)
    assert names[: given + 1] == [f"{i}.png" for i in range(given + 1)]
    assert {row["file"] for row in rows(tmp_path / "labels" / "labels.csv")} == set(names)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Anomalies: 3 similar, 9 of the band, 1 by chance, 1 spot check; normal: 2 similar, 30 of the band, 6 by chance; 1 unsure."""
    counts: list[tuple[How, int, int]] = [
        ("similar", ANOMALY, 3), ("band", ANOMALY, 9), ("random", ANOMALY, 1), ("spot", ANOMALY, 1),
        ("similar", NORMAL, 2), ("band", NORMAL, 30), ("random", NORMAL, 6), ("band", UNSURE, 1),
    ]  # fmt: skip
    with Labels(tmp_path, by="ada") as labels:
        for how, label, count in counts:
            for i in range(count):
                labels.give(f"{how}{label}-{i}", label, how=how, score=0.1)
    return tmp_path


def kinds(chosen: list[Label]) -> dict[tuple[int, str], int]:
    found: dict[tuple[int, str], int] = {}
    for each in chosen:
        found[each.label, each.how] = found.get((each.label, each.how), 0) + 1
    return found


def test_a_training_set_is_a_mixture(labelled: Path) -> None:
    # 8 anomalies, in turn: 3 similar, 1 by chance, 4 of the band; 8 normal: all 6 by chance, 2 of the band
    assert kinds(training_set(labelled, 16, seed=0)) == {
        (ANOMALY, "similar"): 3, (ANOMALY, "random"): 1, (ANOMALY, "band"): 4, (NORMAL, "random"): 6, (NORMAL, "band"): 2,
    }  # fmt: skip


def test_a_training_set_is_filled_from_the_other_class(labelled: Path) -> None:
    assert sum(each.label == ANOMALY for each in training_set(labelled, 40, seed=0)) == 13
    everything = training_set(labelled, 1000, seed=0)
    assert len(everything) == 13 + 38
    assert not [each for each in everything if each.how == "spot" or each.label == UNSURE]


def test_a_training_set_is_drawn_by_its_seed(labelled: Path) -> None:
    assert training_set(labelled, 16, seed=1) == training_set(labelled, 16, seed=1)
    assert training_set(labelled, 16, seed=1) != training_set(labelled, 16, seed=2)
    assert training_set(Path("nowhere"), 16, seed=1) == []
