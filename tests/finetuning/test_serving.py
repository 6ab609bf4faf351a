"""Scoring folders and HTTP requests: a real server, in a thread or in a process of its own, a real project folder and real rollbacks."""

from __future__ import annotations

import base64
import csv
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from hanse.cli.finetune.serve import app
from hanse.errors import ConfigError, StorageFull, WireError
from hanse.finetuning.contract import Party, Project, Schema, write_project
from hanse.finetuning.disagreement import disagreement, read_pairs
from hanse.finetuning.models import load_module, params_of
from hanse.finetuning.routing import Candidate
from hanse.finetuning.score_server import Limits, Service, is_local, listen, read_token, server_of
from hanse.finetuning.scoring import Item, Scored, as_input
from hanse.finetuning.serving import REQUEST_ROWS, Records, append_lines, load_scorer, open_router, score_folder
from hanse.finetuning.versions import Versions
from hanse.finetuning.watch_sources import read_scored

CODE = """
import torch
def build():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear({inputs}, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
"""
BROKEN = (
    CODE
    + """
class Broken(torch.nn.Sequential):
    def forward(self, x):
        raise RuntimeError("no")
def build():
    return Broken(torch.nn.Flatten(), torch.nn.Linear({inputs}, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
"""
)
SCHEMA = Schema(shape=[8, 8, 1], slices=["device"])
TABLE = Schema(kind="table", columns=["a", "b", "c"], slices=["device"])
TOKEN = "0123456789abcdef"
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (8, 8), np.uint8) for _ in range(40)]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNGS = [png(image) for image in IMAGES]


def make_project(folder: Path, schema: Schema = SCHEMA, second: str = CODE) -> tuple[str, str]:
    """A client's project folder with two versions; the second is deployed, after the first. Their digests."""
    inputs = len(schema.columns) or 64
    (folder / "second.py").parent.mkdir(parents=True)
    (folder / "model.py").write_text(CODE.format(inputs=inputs))
    (folder / "second.py").write_text(second.format(inputs=inputs))
    parties = {"vendor": Party(site="maker", organisation="Maker"), "clients": [Party(site="user", organisation="User")]}
    project = Project(name="served", schema=schema, seed=7, **parties)
    write_project(folder, project)
    versions, digests = Versions(folder), []
    for seed, code in enumerate(("model.py", "second.py")):
        rng = np.random.default_rng(seed)
        params = params_of(load_module(folder, project.model))
        params = {name: rng.normal(0, 0.4, value.shape).astype(value.dtype) for name, value in params.items()}
        version = versions.add(params, threshold=0.5, code=folder / code, notes=str(seed))
        versions.history.note("deployment", who="test", deployed=version.digest)
        set_current(folder, version.digest)
        digests.append(version.digest)
    return digests[0], digests[1]


def set_current(folder: Path, digest: str) -> None:
    (folder / "current.part").write_text(digest)
    (folder / "current.part").replace(folder / "current")


class Served(NamedTuple):
    folder: Path
    first: str
    second: str


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path / "project", *make_project(tmp_path / "project"))


@contextmanager
def running(
    folder: Path,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    log: Path | None = None,
    held: threading.Event | None = None,
    **candidate: Any,
) -> Iterator[int]:
    """A server in a thread; its port. held: nothing is scored before it is set."""
    router = open_router(folder, rows=REQUEST_ROWS, **candidate)
    service = Service(router, Records(folder, router.current.schema, log), limits=limits, token=token)
    if held is not None:
        service._thread.submit(held.wait)
    listener = listen("127.0.0.1", 0)
    server = server_of(service)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """Status, and the answer: JSON if it is that."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if "json" in response.headers["content-type"] else text.decode()
    finally:
        connection.close()


def post(port: int, image: bytes, query: str = "") -> dict[str, Any]:
    status, answer = ask(port, "POST", f"/score{query}", image, content_type="image/png")
    assert status == 200, answer
    return answer


def post_list(port: int, rows: Any) -> tuple[int, Any]:
    return ask(port, "POST", "/score", json.dumps(rows).encode(), content_type="application/json")


def expected(folder: Path, version: str, images: list[bytes] = PNGS) -> list[float]:
    return [answer.score for answer in load_scorer(folder, version).answers([Item("", image) for image in images])]


# Answers


def test_an_image_and_a_list_get_the_scores_of_the_deployed_version(served: Served):
    scores = expected(served.folder, served.second)
    with running(served.folder) as port:
        one = post(port, PNGS[0], "?name=a&device=cam-1&label=1")
        status, many = post_list(port, [base64.b64encode(PNGS[1]).decode(), {"input": base64.b64encode(PNGS[2]).decode(), "name": "c"}])
    assert one == {"name": "a", "score": pytest.approx(scores[0]), "decision": int(scores[0] >= 0.5), "version": served.second}
    assert status == 200
    assert [each["score"] for each in many] == pytest.approx(scores[1:3])
    assert many[0]["name"].startswith("input-")
    assert many[1]["name"] == "c"


def test_rows_of_numbers(tmp_path: Path):
    _, second = make_project(tmp_path / "table", TABLE)
    with running(tmp_path / "table") as port:
        status, answers = post_list(port, [[1, 2, 3], {"input": {"c": 3, "a": 1, "b": 2}}, [1, 2]])
    assert status == 200
    assert answers[0]["score"] == pytest.approx(answers[1]["score"])
    assert answers[0]["version"] == second
    assert answers[2] == {"name": answers[2]["name"], "error": "the row has 2 numbers, and the model takes 3: a, b, c", "hint": ""}


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "said"),
    [
        ("/score", b"", "image/png", 400, "empty"),
        ("/score", b"not an image", "image/png", 422, "no image"),
        ("/score", PNGS[0][:40], "image/png", 422, "no image"),
        ("/score?camera=1", PNGS[0], "image/png", 400, "'camera'"),
        ("/score?label=7", PNGS[0], "image/png", 400, "label"),
        ("/score", PNGS[0], "text/plain", 415, "text/plain"),
        ("/score", b"[", "application/json", 400, "truncated"),
        ("/score", b"[]", "application/json", 400, "0 inputs"),
        ("/score", b"{}", "application/json", 400, "array"),
        ("/score", b'["a", 7]', "application/json", 400, "$[1]"),
        ("/score", b'[{"input": "a", "secret": 1}]', "application/json", 400, "secret"),
        ("/score", b'[{"input": "a", "slices": {"camera": "1"}}]', "application/json", 400, "'camera'"),
        ("/score", b"[" * 100_000, "application/json", 400, ""),
        ("/score", b"[[1e999]]", "application/json", 400, ""),
        ("/score", json.dumps(["x"] * 11).encode(), "application/json", 413, "11 inputs"),
        ("/score", bytes(200_001), "image/png", 413, "200,000 bytes"),
        ("/elsewhere", b"", "image/png", 404, "Not Found"),
    ],
    ids=lambda value: f"{value[:12]!r}" if isinstance(value, bytes) else None,
)
def test_bodies_that_are_refused(served_port: int, path: str, body: bytes, kind: str, status: int, said: str):
    found, answer = ask(served_port, "POST", path, body, content_type=kind)
    assert (found, sorted(answer)) == (status, ["error", "hint"] if status != 422 else ["error", "hint", "name"])
    assert said in answer["error"]
    assert post(served_port, PNGS[0])["score"] >= 0  # it goes on


@pytest.fixture(scope="module")
def served_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("served") / "project"
    make_project(folder)
    with running(folder, limits=Limits(body_bytes=200_000, rows=10, body_within_s=0.2)) as port:
        yield port


def test_a_wrong_method(served_port: int):
    assert ask(served_port, "GET", "/score")[0] == 405


def test_a_bad_row_of_a_list_is_refused_alone(served_port: int):
    status, answers = post_list(served_port, [base64.b64encode(PNGS[0]).decode(), "%%%", base64.b64encode(b"x").decode(), [1.0]])
    assert status == 200
    assert ["score" in each for each in answers] == [True, False, False, False]


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_declared_giant_is_refused_unread(served_port: int):
    assert raw(served_port, b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413")


def test_an_endless_body_is_cut_off(served_port: int):
    with socket.create_connection(("127.0.0.1", served_port), timeout=30) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):  # noqa: PT011, PT012 reset or broken pipe, whichever comes first
            for _ in range(10_000):
                connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")


def test_a_body_that_does_not_come(served_port: int):
    assert raw(served_port, b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc").startswith(b"HTTP/1.1 408")


def test_garbage_instead_of_http(served_port: int):
    assert raw(served_port, b"\x16\x03\x01\x00\xff" * 30 + b"\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert post(served_port, PNGS[0])


def test_health_version_and_metrics(served: Served):
    with running(served.folder) as port:
        post(port, PNGS[0])
        post_list(port, ["AAAA"])
        assert ask(port, "GET", "/health") == (200, {"status": "ok", "problems": []})
        status, version = ask(port, "GET", "/version")
        assert (status, version["version"], version["threshold"], version["candidate"]) == (200, served.second, 0.5, None)
        assert version["since"].endswith("Z")
        values = metrics(port)
    assert values['hanse_requests_total{status="200"}'] == "2"
    assert values["hanse_refused_inputs_total"] == "1"
    assert values["hanse_request_seconds_count"] == values['hanse_request_seconds_bucket{le="+Inf"}'] == "2"
    assert sum(int(value) for name, value in values.items() if name.startswith("hanse_decisions_total")) == 1
    buckets = [int(value) for name, value in values.items() if "_bucket" in name]
    assert buckets == sorted(buckets)


def test_a_token(served: Served, tmp_path: Path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    with running(served.folder, token=read_token(tmp_path / "token")) as port:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
            assert ask(port, "POST", "/score", PNGS[0], content_type="image/png", **header)[0] == 401
            assert ask(port, "GET", "/metrics", **header)[0] == 401
        assert ask(port, "POST", "/score", PNGS[0], content_type="image/png", authorization=f"Bearer {TOKEN}")[0] == 200
        assert ask(port, "GET", "/health")[0] == 200
    (tmp_path / "token").write_text("short")
    with pytest.raises(ConfigError, match="at least 16"):
        read_token(tmp_path / "token")


def test_where_it_listens():
    assert [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "192.0.2.1", "example")] == [True] * 3 + [
        False
    ] * 4
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1])


# Many at a time


def test_concurrent_requests_get_their_own_answers(served: Served):
    scores = expected(served.folder, served.second)
    with running(served.folder) as port, ThreadPoolExecutor(8) as clients:
        rows = [row % len(PNGS) for row in range(160)]
        answers = list(clients.map(lambda row: post(port, PNGS[row], f"?name={row}"), rows))
    assert [each["name"] for each in answers] == [str(row) for row in rows]
    assert [each["score"] for each in answers] == pytest.approx([scores[row] for row in rows])


def metrics(port: int) -> dict[str, str]:
    lines = ask(port, "GET", "/metrics")[1].splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_requests_that_come_together_are_scored_together(served: Served):
    held = threading.Event()
    with running(served.folder, held=held) as port, ThreadPoolExecutor(8) as clients:
        futures = [clients.submit(post, port, image) for image in PNGS[:8]]
        while metrics(port)["hanse_requests_under_way"] != "8":
            pass
        held.set()
        scores = [future.result()["score"] for future in futures]
        assert metrics(port)["hanse_batches_total"] == "2"  # the first alone, then the seven that had come meanwhile
        assert scores == [post(port, image)["score"] for image in PNGS[:8]]  # the same bits as one by one
    assert scores == pytest.approx(expected(served.folder, served.second)[:8])


def test_more_requests_than_allowed_are_told_to_come_again(served: Served):
    with running(served.folder, limits=Limits(requests=1)) as port, socket.create_connection(("127.0.0.1", port)) as slow:
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(PNGS[0])}\r\n\r\n"
        slow.sendall(head.encode() + PNGS[0][:10])
        statuses = iter(lambda: ask(port, "POST", "/score", PNGS[1], content_type="image/png")[0], 503)
        assert set(statuses) <= {200}
        slow.sendall(PNGS[0][10:])
        assert slow.recv(12) == b"HTTP/1.1 200"
        assert post(port, PNGS[1])


def test_bodies_are_held_up_to_a_bound(served: Served):
    limits = Limits(body_bytes=1000, bodies_bytes=1500)
    with running(served.folder, limits=limits) as port, socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\nExpect: 100-continue\r\n\r\n")
        assert slow.recv(12) == b"HTTP/1.1 100"  # its room is taken
        assert ask(port, "POST", "/score", bytes(900), content_type="image/png")[0] == 503
        assert post(port, PNGS[0])


def test_a_rollback_while_requests_run(served: Served):
    scores = {version: expected(served.folder, version) for version in (served.first, served.second)}
    rolled_back, seen = threading.Event(), threading.Barrier(5)
    with running(served.folder) as port, ThreadPoolExecutor(4) as clients:

        def client(number: int) -> list[tuple[bool, int, dict[str, Any]]]:
            answers = []
            for turn in range(10_000):
                after, row = rolled_back.is_set(), (turn + number) % len(PNGS)
                answers.append((after, row, post(port, PNGS[row])))
                if turn == 10:
                    seen.wait()
                if after and turn > 20:
                    break
            return answers

        futures = [clients.submit(client, number) for number in range(4)]
        seen.wait()
        Versions(served.folder).rollback(who="test", why="worse")
        rolled_back.set()
        answers = [each for future in futures for each in future.result()]
        assert ask(port, "GET", "/version")[1]["version"] == served.first
    assert {answer["version"] for _, _, answer in answers} == {served.first, served.second}
    assert {answer["version"] for after, _, answer in answers if after} == {served.first}  # from then on, at once
    assert all(answer["score"] == pytest.approx(scores[answer["version"]][row]) for _, row, answer in answers)


def test_a_version_that_cannot_be_loaded_is_not_switched_to(served: Served):
    with running(served.folder) as port:
        weights = served.folder / "versions" / served.first.removeprefix("blake3:") / "model.safetensors"
        weights.chmod(0o600)
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
        versions = Versions(served.folder)
        versions.history.note("rollback", who="test", deployed=served.first, back=True)
        set_current(served.folder, served.first)
        assert post(port, PNGS[0])["version"] == served.second
        health = ask(port, "GET", "/health")[1]
        assert health["status"] == "degraded"
        assert "model.safetensors" in health["problems"][0]


def test_altered_code_is_not_run(served: Served):
    code = served.folder / "versions" / served.second.removeprefix("blake3:") / "model.py"
    code.chmod(0o600)
    code.write_text("raise SystemExit")
    with pytest.raises(WireError, match=r"model\.py was altered"):
        open_router(served.folder)


# A candidate beside the current version


def pairs_of(folder: Path) -> list[Any]:
    return [pair for path in (folder / "scores" / "pairs").glob("*.jsonl") for pair in read_pairs(path)]


def test_a_shadow_never_changes_an_answer(served: Served):
    with running(served.folder) as port:
        alone = [post(port, image, f"?name={row}&device=d{row % 2}") for row, image in enumerate(PNGS)]
    with running(served.folder, shadow=served.first) as port:
        beside = [post(port, image, f"?name={row}&device=d{row % 2}") for row, image in enumerate(PNGS)]
        assert ask(port, "GET", "/version")[1]["candidate"] == {"version": served.first, "mode": "shadow", "share": None}
    assert beside == alone
    pairs = pairs_of(served.folder)
    assert [pair.name for pair in pairs] == [each["name"] for each in alone]
    assert [pair.current_score for pair in pairs] == [each["score"] for each in alone]
    assert [pair.candidate_score for pair in pairs] == pytest.approx(expected(served.folder, served.first))
    assert {pair.answered_by for pair in pairs} == {"current"}
    found = disagreement(served.folder)
    assert (found.inputs, found.candidate, sorted(found.slices["device"])) == (40, served.first, ["d0", "d1"])


@pytest.mark.parametrize("kind", ["shadow", "canary"])
def test_a_candidate_that_fails_harms_nobody(tmp_path: Path, kind: str):
    first, second = make_project(tmp_path / "project", second=BROKEN)
    Versions(tmp_path / "project").rollback(who="test")
    with running(tmp_path / "project", share=1.0, **{kind: second}) as port:
        answers = [post(port, image) for image in PNGS[:5]]
        assert {each["version"] for each in answers} == {first}
        post(port, PNGS[0])
        assert int(metrics(port)["hanse_candidate_failures_total"]) >= 5
    assert pairs_of(tmp_path / "project") == []


def test_a_canary_answers_its_share_and_the_same_inputs_each_time(served: Served):
    schema = load_scorer(served.folder, served.first).schema
    candidate = Candidate(served.first, 0.4, seed=7)
    goes = [served.first if candidate.takes(as_input(Item("", image), schema).digest) else served.second for image in PNGS]
    assert {served.first, served.second} == set(goes)
    scores = {version: expected(served.folder, version) for version in (served.first, served.second)}
    for _ in range(2):
        with running(served.folder, canary=served.first, share=0.4) as port:
            answers = [post(port, image) for image in PNGS]
        assert [each["version"] for each in answers] == goes
        assert [each["score"] for each in answers] == pytest.approx([scores[version][row] for row, version in enumerate(goes)])
    found = disagreement(served.folder)
    assert (found.inputs, found.lines, found.answered_by_candidate) == (
        goes.count(served.first),
        2 * goes.count(served.first),
        goes.count(served.first),
    )


def test_candidates_that_make_no_sense(served: Served):
    for candidate, said in (
        ({"shadow": served.second}, "is the current version"),
        ({"canary": served.first, "share": 0.0}, "share is 0"),
        ({"shadow": served.first, "canary": served.first}, "either"),
        ({"shadow": "ffff"}, "no version begins with"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_router(served.folder, **candidate)


# What is kept


def test_the_log(served: Served, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"name":"old"}\n{"name":"to')  # a crash cut this line off
    with running(served.folder, log=log) as port:
        answer = post(port, PNGS[0], "?name=a&device=cam-1&label=1")
        post_list(port, [{"input": "AAAA", "name": "refused"}, {"input": base64.b64encode(PNGS[1]).decode(), "name": "b"}])
    old, first, second = map(json.loads, log.read_text().splitlines())
    assert old == {"name": "old"}
    assert first == answer | {"time": first["time"], "label": 1, "device": "cam-1"}
    assert second["name"] == "b"
    assert "label" not in second
    (batch,) = read_scored(
        log.read_text().splitlines()[1:], where="log", slices=["device"], version=served.second
    )  # as the drift watch does
    assert (batch.names, batch.labels, batch.columns) == (["a", "b"], [1, None], {"device": ["cam-1", ""]})


def test_a_full_disk_stops_no_answer(served: Served):
    with running(served.folder, log=Path("/dev/full")) as port:
        assert post(port, PNGS[0])
        assert "cannot be written" in ask(port, "GET", "/health")[1]["problems"][0]
    with pytest.raises(StorageFull):
        append_lines(Path("/dev/full"), [{"a": 1}])


def test_slices_cannot_hide_the_log_s_own_columns(served: Served):
    with pytest.raises(ConfigError, match="'score'"):
        Records(served.folder, Schema(slices=["score"]))


# A process of its own


@contextmanager
def process(folder: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    code = "from hanse.cli.finetune.serve import app; app()"
    command = [sys.executable, "-c", code, "serve", "--http", "0", "--project", folder, *options]
    started = subprocess.Popen(
        [str(each) for each in command], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        assert started.stdout is not None
        yield started, int(started.stdout.readline().split(":")[-1].removesuffix("/score\n"))
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


def post_until_gone(port: int, enough: threading.Event, answered: list[dict[str, Any]]) -> list[str]:
    """Requests on one connection each until there is nobody; what went wrong other than a connection refused or never begun."""
    wrong = []
    for turn in range(100_000):
        try:
            answered.append(post(port, PNGS[turn % len(PNGS)], f"?name=n{turn}"))
        except (ConnectionRefusedError, ConnectionResetError, http.client.RemoteDisconnected, BrokenPipeError) as error:
            return [*wrong, type(error).__name__]
        if turn == 30:
            enough.set()
    return wrong


def until_refused(port: int) -> None:
    """Ask until the server takes no more connections; those that it had not taken yet are reset."""
    while True:
        try:
            ask(port, "GET", "/health")
        except ConnectionRefusedError:
            return
        except (OSError, http.client.HTTPException):
            continue


def test_a_kill_leaves_a_log_of_whole_lines_with_all_that_was_answered(served: Served, tmp_path: Path):
    log, enough, answered = tmp_path / "log.jsonl", threading.Event(), []
    with process(served.folder, "--log", log, "--shadow", served.first) as (server, port):
        client = threading.Thread(target=post_until_gone, args=(port, enough, answered))
        client.start()
        enough.wait()
        server.send_signal(signal.SIGKILL)
        client.join()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [each["name"] for each in lines][: len(answered)] == [each["name"] for each in answered]
    assert pairs_of(served.folder)


def test_sigterm_ends_it_after_what_is_under_way(served: Served):
    with process(served.folder) as (server, port), socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        head = (
            f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(PNGS[0])}\r\nExpect: 100-continue\r\n\r\n"
        )
        slow.sendall(head.encode())
        assert slow.recv(12) == b"HTTP/1.1 100"  # the request is under way
        server.send_signal(signal.SIGTERM)
        until_refused(port)
        slow.sendall(PNGS[0])
        rest = b"".join(iter(lambda: slow.recv(65536), b""))
        assert b"HTTP/1.1 200" in rest
        assert server.wait(30) == 0


# Folders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for row, image in enumerate(PNGS[:20]):
        (folder / ("deep" if row % 2 else ".") / f"{row:02}.png").write_bytes(image)
    (folder / "broken.png").write_bytes(b"x")
    (folder / "note.txt").write_text("no image")
    (folder / "labels.csv").write_text("file,label,device\n00.png,anomaly,d0\ndeep/01.png,0,d1\n")
    return folder


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_folder(served: Served, photos: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hanse.finetuning.serving.BATCH", 6)
    steps, out, log = [], tmp_path / f"out.{suffix}", tmp_path / "log.jsonl"
    done = score_folder(served.folder, photos, out, router=open_router(served.folder, shadow=served.first), log=log, step=steps.append)
    assert steps == [6, 6, 6, 3]
    assert (done.rows, done.refused, done.pairs, done.version) == (21, 1, 20, served.second)
    rows = list(csv.DictReader(out.open())) if suffix == "csv" else [json.loads(line) for line in out.open()]
    names = [f"{row:02}.png" for row in range(0, 20, 2)] + ["broken.png"] + [f"deep/{row:02}.png" for row in range(1, 20, 2)]
    assert [row["name"] for row in rows] == names
    scores = expected(served.folder, served.second, [(photos / name).read_bytes() for name in names if name != "broken.png"])
    assert [float(row["score"]) for row in rows if row["name"] != "broken.png"] == pytest.approx(scores, abs=1e-6)
    assert done.positive == sum(score >= 0.5 for score in scores)
    assert "no image" in rows[10]["error"]
    logged = {line["name"]: line for line in map(json.loads, log.open())}
    assert (logged["00.png"]["label"], logged["00.png"]["device"], logged["deep/01.png"]["label"]) == (1, "d0", 0)
    assert "label" not in logged["02.png"]
    assert len(pairs_of(served.folder)) == 20


def test_tables(tmp_path: Path):
    _, second = make_project(tmp_path / "project", TABLE)
    router = open_router(tmp_path / "project")
    rows = [{"name": f"r{row}", "a": row, "b": 1.5, "c": -row, "device": "d", "label": row % 2} for row in range(600)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    for name in ("rows.csv", "rows.parquet"):
        done = score_folder(tmp_path / "project", tmp_path / name, tmp_path / f"{name}.jsonl", router=router, log=tmp_path / f"{name}.log")
        assert (done.rows, done.refused, done.version) == (600, 0, second)
    assert (tmp_path / "rows.csv.jsonl").read_bytes() == (tmp_path / "rows.parquet.jsonl").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "rows.csv.log").open()]
    assert (lines[5]["name"], lines[5]["label"], lines[5]["device"]) == ("r5", 1, "d")
    direct = router.current.answers([Item("", [5, 1.5, -5])])[0]
    assert isinstance(direct, Scored)
    assert lines[5]["score"] == pytest.approx(direct.score)


def test_folders_that_cannot_be_scored(served: Served, tmp_path: Path):
    router = open_router(served.folder)
    (tmp_path / "empty").mkdir()
    for source, out, said in (("empty", "out.csv", "nothing to score"), ("none", "out.csv", "no folder"), ("empty", "out.txt", r"\.jsonl")):
        with pytest.raises(ConfigError, match=said):
            score_folder(served.folder, tmp_path / source, tmp_path / out, router=router)
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(StorageFull):
        score_folder(served.folder, tmp_path / "empty", Path("/proc/none/out.csv"), router=router)


def test_nothing_deployed(served: Served, tmp_path: Path):
    (served.folder / "current").unlink()
    (served.folder / "history.jsonl").unlink()
    with pytest.raises(ConfigError, match="no version is deployed"):
        open_router(served.folder)


# The command line


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)


def test_the_commands(served: Served, photos: Path):
    done = command("serve", photos, "--project", served.folder, "--shadow", served.first[7:20], "--json")
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["refused"], summary["pairs"]) == (21, 1, 20)
    assert Path(summary["out"]) == served.folder / "scores" / "photos.csv"
    assert json.loads(command("disagreement", "--project", served.folder, "--json").stdout)["inputs"] == 20
    words = command("disagreement", "--project", served.folder).stdout.splitlines()
    assert words[0].startswith("20 inputs were scored by both")
    assert Path(words[-1]).is_file()
    assert "21 inputs" in command("serve", photos, "--project", served.folder, "--out", served.folder / "o.jsonl").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "either a folder"), (("photos", "--http", "0"), "either a folder"), (("--http", "localhost"), "the port is missing")],
)
def test_commands_that_make_no_sense(served: Served, arguments: tuple[str, ...], said: str):
    with pytest.raises(ConfigError, match=said):
        command("serve", *arguments, "--project", served.folder)
