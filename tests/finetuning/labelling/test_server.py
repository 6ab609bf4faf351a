from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from hanse.errors import ConfigError
from hanse.finetuning.labelling.labels import Labels
from hanse.finetuning.labelling.queue import BAND, Pool, Queue
from hanse.finetuning.labelling.server import HEADERS, serving


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def view(self) -> Any:
        return json.loads(self.body)


@dataclass
class Caller:
    """A browser in small: it sends whatever headers it is told to, whole."""

    url: str
    cookie: str = ""
    page: str = ""

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, timeout=20)
        sent = {"Host": self.host, "Cookie": self.cookie, "Content-Length": str(len(body))}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        answer = Answer(response.status, response.msg, response.read())
        connection.close()
        return answer

    def enter(self) -> Answer:
        answer = self.send("GET", self.url.removeprefix(f"http://{self.host}"))
        self.cookie = answer.headers["set-cookie"].split(";")[0]
        found = re.search(rb'name="page" content="([\w-]+)"', answer.body)
        assert found is not None
        self.page = found[1].decode()
        return answer

    def ask(self, what: str, headers: dict[str, str] | None = None, **more: Any) -> Answer:
        body = {"window": "0" * 16, "mode": "band", "band": BAND, **more}
        return self.send("POST", f"/{what}", json.dumps(body).encode(), **{"X_Hanse_Page": self.page, **(headers or {})})


@pytest.fixture
def queue(pool: Pool, labels: Labels) -> Queue:
    return Queue(pool, labels)


@pytest.fixture
def caller(queue: Queue) -> Iterator[Caller]:
    with serving(queue, title="day-1") as url:
        yield Caller(url)


def test_labels_are_given_and_taken_back(caller: Caller, queue: Queue) -> None:
    caller.enter()
    first = caller.ask("next").view
    assert (first["done"], first["problem"]) == (0, "")
    file = first["image"]["file"]
    second = caller.ask("label", file=file, label=1).view
    assert [each.file for each in queue.labels.given.values()] == [file]
    assert second["image"]["file"] != file
    assert (second["done"], second["yields"]["search"], second["mine"]) == (1, {"looked": 1, "found": 1}, True)
    assert [each["file"] for each, _ in second["recent"]] == [file]
    back = caller.ask("undo").view
    assert (back["image"]["file"], back["image"]["how"], back["mine"], back["recent"]) == (file, "band", False, [])
    assert not queue.labels.given


def test_a_label_sent_twice_counts_once(caller: Caller, queue: Queue) -> None:
    caller.enter()
    file = caller.ask("next").view["image"]["file"]
    assert caller.ask("label", file=file, label=1).status == 200
    again = caller.ask("label", file=file, label=0)
    assert again.status == 409
    assert "not what this window shows" in again.view["problem"]
    assert again.view["image"]["file"] != file
    assert [each.label for each in queue.labels.given.values()] == [1]


def test_a_picture_comes_as_it_is(caller: Caller, pool: Pool) -> None:
    caller.enter()
    answer = caller.send("GET", "/picture/7")
    assert answer.headers["content-type"] == "image/png"
    assert pool.images is not None
    assert np.array_equal(np.asarray(Image.open(BytesIO(answer.body))), np.asarray(pool.images[7])[..., 0])
    assert caller.send("GET", "/picture/240").status == 404


def test_pictures_of_files_are_shown_upright_small_enough_and_in_eight_bits(tmp_path: Path, labels: Labels) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (4200, 2100), "red").save(tmp_path / "large.jpg", exif=turned)
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(tmp_path / "deep.png")
    paths = [tmp_path / name for name in ("large.jpg", "deep.png", "gone.png")]
    queue = Queue(Pool(names=[path.name for path in paths], scores=np.array([0.1, 0.2, 0.3]), images=paths), labels)
    with serving(queue, title="t") as url:
        caller = Caller(url)
        caller.enter()
        large, deep = (Image.open(BytesIO(caller.send("GET", f"/picture/{i}").body)) for i in range(2))
        assert (large.size, deep.mode, np.asarray(deep).tolist()) == ((1024, 2048), "L", [[0, 0, 1, 255]])
        assert caller.send("GET", "/picture/2").status == 404
        assert caller.ask("next").view["image"]["file"] == "gone.png"
        assert "cannot be read" in caller.ask("label", file="gone.png", label=1).view["problem"]
        assert caller.ask("label", file="gone.png", label=-1).view["image"]["file"] != "gone.png"


def test_each_answer_keeps_the_page_to_itself(caller: Caller) -> None:
    for answer in (caller.enter(), caller.send("GET", "/page.js"), caller.send("GET", "/nowhere"), Caller(caller.url).send("GET", "/")):
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert answer.headers["server"] is None
    assert "default-src 'self'" in HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(caller: Caller) -> None:
    said = caller.enter().headers["set-cookie"].lower()
    assert "httponly" in said
    assert "samesite=strict" in said


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"Cookie": ""}, "token"),
        ({"Cookie": "hanse-labelling-1=x; theme=dark"}, "token"),
        ({"X_Hanse_Page": ""}, "page"),
        ({"X_Hanse_Page": "é"}, "page"),
        ({"Origin": "http://evil.example"}, "another page"),
        ({"Origin": "null"}, "another page"),
        ({"Sec_Fetch_Site": "cross-site"}, "another page"),
        ({"Sec_Fetch_Site": "same-site"}, "another page"),  # another port of this machine
        ({"Host": "evil.example"}, "nowhere else"),
        ({"Host": "localhost"}, "nowhere else"),
        ({"Host": "127.0.0.1"}, "nowhere else"),
    ],
)
def test_others_are_refused(caller: Caller, queue: Queue, headers: dict[str, str], why: str) -> None:
    caller.enter()
    file = caller.ask("next").view["image"]["file"]
    answer = caller.ask("label", headers, file=file, label=1)
    assert answer.status == 403
    assert why in answer.body.decode()
    assert not queue.labels.given
    assert caller.ask("label", {"Origin": f"http://{caller.host}", "Sec_Fetch_Site": "same-origin"}, file=file, label=1).status == 200


def test_nothing_is_shown_without_the_token(caller: Caller) -> None:
    for path in ("/", "/?token=", "/?token=wrong", "/about", "/picture/0", "/page.js", f"/about{urlsplit(caller.url).query}"):
        answer = caller.send("GET", path)
        assert (answer.status, answer.headers["set-cookie"]) == (403, None), path


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"window":"x","mode":"band","band":[0,1]}',
        b'{"window":"0000000000000000","mode":"band","band":[0,2]}',
        b" " * 20_000,
    ],
)
def test_a_wrong_request_is_told_so(caller: Caller, body: bytes) -> None:
    caller.enter()
    assert caller.send("POST", "/next", body, X_Hanse_Page=caller.page).status == 400


def test_only_this_machine_can_connect(caller: Caller) -> None:
    port = urlsplit(caller.url).port
    assert port is not None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)  # a socket bound to all addresses would answer here


def test_the_page_has_no_address_of_elsewhere() -> None:
    for name in ("page.html", "page.css", "page.js"):
        text = files("hanse.finetuning.labelling").joinpath(name).read_text("utf-8")
        assert re.findall(r"https?://[^\s\"']+", text) in ([], ["http://www.w3.org/2000/svg"]), name


def test_a_row_of_a_table_is_shown_by_its_columns(labels: Labels) -> None:
    pool = Pool(names=["row 1"], scores=np.array([0.1]), columns={"age": ["44"]})
    with serving(Queue(pool, labels), title="t") as url:
        caller = Caller(url)
        caller.enter()
        assert caller.ask("next").view["image"]["columns"] == {"age": "44"}
        assert json.loads(caller.send("GET", "/about").body)["pictures"] is False
        assert caller.send("GET", "/picture/0").status == 404


def test_a_taken_port_and_a_wrong_band_are_errors(caller: Caller, queue: Queue) -> None:
    with pytest.raises(ConfigError, match="cannot be used"), serving(queue, title="t", port=urlsplit(caller.url).port or 0):
        pass
    with pytest.raises(ConfigError, match="no band of scores"), serving(queue, title="t", band=(0.3, 0.01)):
        pass
