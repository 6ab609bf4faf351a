from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from numpy.testing import assert_allclose, assert_array_equal

from hanse.errors import ConfigError
from hanse.finetuning.labelling.labels import Labels
from hanse.finetuning.reference import Reference, reference
from hanse.finetuning.watch import Alarm, Settings, Watch
from hanse.finetuning.watch_sources import Batch, follow, read_scored, reference_of_scores, spot_checks
from hanse.finetuning.webhook import Webhook, verify_webhook
from hanse.site.ledger import read

SECRET = b"sixteen bytes or more"


def scored(n: int, *, seed: int = 0, brighter: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.5).astype(np.int64)
    return 1 / (1 + np.exp(-2 * rng.normal(np.where(labels == 1, 2.0, -2.0) + brighter, 1.0))), labels


@pytest.fixture(scope="module")
def known() -> Reference:
    return reference(*scored(2000, seed=9), None, 0.5, seed=0, sizes=(50, 100), resamples=500)


def whole(lines: str, **arguments: Any) -> list[Batch]:
    return list(read_scored(lines.splitlines(keepends=True), where="scores", **arguments))


def test_a_csv_file() -> None:
    (batch,) = whole("name,score,label,device,embedding_1,embedding_0\na,0.25,1,x,1.5,0.5\nb,1,,y,2.5,-1\n")
    assert batch.names == ["a", "b"]
    assert_array_equal(batch.scores, [0.25, 1])
    assert batch.labels == [1, None]
    assert batch.columns == {"device": ["x", "y"]}
    assert batch.embeddings is not None
    assert_array_equal(batch.embeddings, [[0.5, 1.5], [-1, 2.5]])


def test_a_jsonl_file_and_the_log_of_what_was_served() -> None:
    lines = [
        {"name": "a", "score": 0.25, "embedding": [1, 2], "device": "x"},
        {"name": "b", "score": 0.5, "embedding": [3, 4], "decision": 1, "version": "blake3:new", "time": 1.5, "label": 0},
        {"name": "c", "score": 0.5, "version": "blake3:old"},
        {"name": "d", "error": "no image", "hint": ""},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    (batch,) = whole(text, version="blake3:new", slices=["device"])
    assert (batch.names, batch.columns, batch.labels) == (["a", "b"], {"device": ["x", ""]}, [None, 0])
    assert whole(text)[0].embeddings is None  # as one row has none


def test_the_spot_checks_of_the_labelling_queue(tmp_path: Path) -> None:
    assert list(spot_checks(tmp_path)) == []
    with Labels(tmp_path, by="ada") as labels:
        labels.give("b.png", 1, how="spot", score=0.25, columns={"device": "x"})
        labels.give("a.png", -1, how="spot", score=0.5)
        labels.give("c.png", 0, how="band", score=0.75)
    (batch,) = spot_checks(tmp_path)
    assert (batch.names, batch.labels, batch.labels_alone, batch.columns) == (["b.png"], [1], True, {})
    assert_array_equal(batch.scores, [0.25])


def test_batches_are_made_of_what_has_come() -> None:
    def lines() -> Iterator[str]:
        yield from ("name,score\n", "a,0.1\n", "b,0.2\n")
        raise AssertionError("it asked for more than it needs")

    assert next(read_scored(lines(), where="pipe", batch=2)).names == ["a", "b"]
    assert whole("") == whole("name,score\n") == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name,score\na,0.5\nb,1.5\n", "scores, line 3: the score is 1.5"),
        ("name,score\na,nan\n", "line 2: the score is nan"),
        ("name,score\na,high\n", "line 2: could not convert"),
        ("name,value\na,0.5\n", "line 2: there is no score"),
        ("score\n0.5\n", "line 2: there is no name"),
        ("name,score\na\n", "line 2: the line has not as many cells"),
        ("name,score\na,0.5,1\n", "line 2: the line has not as many cells"),
        ("name,score,label\na,0.5,yes\n", "line 2: the label is 'yes'"),
        ("name,score,embedding_0\na,0.5,inf\n", "line 2: an embedding is not finite"),
        ('{"name": "a", "score": 0.5}\nnot json\n', "line 2: JSON is malformed"),
        ('{"name": "a", "score": 0.5, "embedding": [1]}\n{"name": "b", "score": 0.5, "embedding": [1, 2]}\n', "differ in length"),
    ],
)
def test_what_cannot_be_read(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        whole(text)


def test_the_reference_of_a_file_is_that_of_its_arrays(tmp_path: Path) -> None:
    scores, labels = scored(500)
    with (tmp_path / "holdout.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "score", "label", "device", "embedding_0"])
        rows.writerows([i, score, label, "ab"[i % 2], score] for i, (score, label) in enumerate(zip(scores, labels, strict=True)))
    made = reference_of_scores(tmp_path / "holdout.csv", 0.5, seed=3)
    same = reference(scores, labels, scores[:, None].astype(np.float32), 0.5, seed=3, slices={"device": ["a", "b"] * 250})
    assert made.digest == same.digest
    (tmp_path / "holdout.csv").write_text("name,score\na,0.5\n")
    with pytest.raises(ConfigError, match="needs a label"):
        reference_of_scores(tmp_path / "holdout.csv", 0.5)


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]], list[int]]]:
    """Its address, what came, and statuses to answer first."""
    came: list[tuple[dict[str, str], bytes]] = []
    statuses: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(statuses.pop(0) if statuses else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", came, statuses
        server.shutdown()


def batches(*, brighter: float) -> Callable[[], list[Batch]]:
    def read() -> list[Batch]:
        scores, _ = scored(300, seed=int(brighter), brighter=brighter)
        return [Batch([f"{brighter} {i + j}" for j in range(50)], scores[i : i + 50]) for i in range(0, 300, 50)]

    return read


def test_what_leaves_is_the_alarm_and_the_ledger_says_so(known: Reference, tmp_path: Path, receiver: Any) -> None:
    url, came, _ = receiver
    told: list[Any] = []
    with Watch(tmp_path, known, Settings(window=50)) as watch:
        follow(watch, batches(brighter=3.0), told=told.append, hook=Webhook(url=url, secret=SECRET))
        (alarm,) = watch.alarms()
        assert watch.alarms(unsent=True) == []
    assert [each for each in told if isinstance(each, Alarm)] == [alarm]
    assert [each.window for each in told if not isinstance(each, Alarm)] == [1, 2, 3, 4, 5, 6]
    ((headers, body),) = came
    verify_webhook(headers, body, secret=SECRET)
    raised, left = read(tmp_path / "alarms.jsonl")
    assert json.loads(body) == raised["alarm"]
    assert (left["kind"], left["id"], left["bytes"]) == ("left", alarm.id, len(body))
    assert left["digest"] == f"blake3:{blake3(body).hexdigest()}"
    assert left["to"] in url


def test_an_alarm_that_does_not_arrive_is_kept_and_sent_later(known: Reference, tmp_path: Path, receiver: Any) -> None:
    url, came, statuses = receiver
    statuses += [500, 404]
    warned: list[str] = []
    hook = Webhook(url=url, secret=SECRET, tries=1)
    with Watch(tmp_path, known, Settings(window=50)) as watch:
        follow(watch, batches(brighter=3.0), told=lambda _: None, warn=warned.append, hook=hook)
        follow(watch, list, told=lambda _: None, warn=warned.append, hook=hook)
        assert len(watch.alarms(unsent=True)) == 1
    with Watch(tmp_path, known, Settings(window=50)) as watch:  # another process, later
        follow(watch, list, told=lambda _: None, warn=warned.append, hook=hook)
        assert watch.alarms(unsent=True) == []
    assert [word in text for word, text in zip(("status 500", "status 404"), warned, strict=True)] == [True, True]
    assert len({body for _, body in came}) == 1
    assert len(came) == 3


def test_it_looks_again_after_a_while(known: Reference, tmp_path: Path) -> None:
    waits: list[float] = []

    class Enough(Exception):
        pass

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise Enough

    with Watch(tmp_path, known, Settings(window=50)) as watch:
        with pytest.raises(Enough):
            follow(watch, batches(brighter=0.0), told=lambda _: None, interval_s=5, wait=wait)
        assert watch.counts()["inputs"] == 300
        assert_allclose([each.inputs for each in watch.windows()], 50)
    assert waits == [5, 5, 5]
