from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import ConfigError, IdentityError, LinkBroken, Refused
from hanse.finetuning.webhook import Webhook, read_secret, sign, verify_webhook
from hanse.identity.authority import Authority, new_signing_key, public_key
from hanse.identity.certificates import Identity, Role
from hanse.identity.signatures import Signer

ROOT = Authority.new_root("study")
ADA = Identity("study", Role.RESEARCHER, "ada@example.org", "Hospital")
SECRET = b"sixteen bytes or more"
BODY = b'{"reason":"devices"}'


def signer(authority: Authority) -> Signer:
    key = new_signing_key()
    return Signer(key, authority.issue(ADA, public_key(key), days=1))


SIGNER = signer(ROOT)


class Receiver:
    """A real HTTP server on this machine. statuses: what it answers, one after the other, 200 when they are used up."""

    def __init__(self, *statuses: int) -> None:
        self.came: list[tuple[dict[str, str], bytes]] = []
        answers, came = iter(statuses), self.came

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                came.append(
                    ({name.lower(): value for name, value in self.headers.items()}, self.rfile.read(int(self.headers["Content-Length"])))
                )
                self.send_response(next(answers, 200))
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def do_GET(self) -> None:
                raise AssertionError("a redirection was followed")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alarms"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receive() -> Iterator[Any]:
    opened: list[Receiver] = []

    def open_one(*statuses: int) -> Receiver:
        opened.append(Receiver(*statuses))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


def test_the_receiver_knows_who_sent_it(receive: Any) -> None:
    there = receive()
    assert Webhook(url=there.url, signer=SIGNER).post(BODY, id="one") == 200
    ((headers, body),) = there.came
    assert body == BODY
    assert headers["content-type"] == "application/json"
    assert verify_webhook(headers, body, ROOT.roots) == ADA
    with pytest.raises(IdentityError, match="does not lead to this federation's authority"):
        verify_webhook(headers, body, Authority.new_root("study").roots)


def test_a_shared_secret(receive: Any) -> None:
    there = receive()
    Webhook(url=there.url, secret=SECRET).post(BODY, id="one")
    ((headers, body),) = there.came
    assert verify_webhook(headers, body, secret=SECRET) is None
    with pytest.raises(IdentityError, match="another secret"):
        verify_webhook(headers, body, secret=SECRET + b"!")
    with pytest.raises(IdentityError, match="cannot be checked here"):
        verify_webhook(headers, body, ROOT.roots)
    assert SECRET not in repr(Webhook(url=there.url, secret=SECRET)).encode()


def test_the_secret_kind_is_that_of_standard_webhooks(tmp_path: Path) -> None:
    """The example of the specification's own libraries."""
    path = tmp_path / "secret"
    path.write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    headers = sign(b'{"test": 2432232314}', id="msg_p5jXN8AQM9LWM0D4loKWxJek", secret=read_secret(path), now=1614265330)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_it_is_tried_again_with_the_same_id(receive: Any) -> None:
    there, waits = receive(503, 429), []
    Webhook(url=there.url, signer=SIGNER, wait=waits.append).post(BODY, id="one")
    assert waits == [1, 2]
    assert [headers["webhook-id"] for headers, _ in there.came] == ["one"] * 3


def test_it_is_given_up_after_so_many_tries(receive: Any) -> None:
    there, waits = receive(500, 500, 500, 500), []
    with pytest.raises(LinkBroken, match="in 4 tries: status 500"):
        Webhook(url=there.url, secret=SECRET, wait=waits.append).post(BODY, id="one")
    assert waits == [1, 2, 4]


@pytest.mark.parametrize("status", [302, 307, 400, 401, 404])
def test_a_refusal_and_a_redirection_are_final(receive: Any, status: int) -> None:
    there = receive(status)
    with pytest.raises(Refused, match=f"with status {status}"):
        Webhook(url=there.url, secret=SECRET).post(BODY, id="one")
    assert len(there.came) == 1


def test_who_does_not_answer_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        hook = Webhook(url=f"http://127.0.0.1:{deaf.getsockname()[1]}/", secret=SECRET, within_s=0.05, tries=2, wait=lambda _: None)
        with pytest.raises(LinkBroken, match="timed out"):
            hook.post(BODY, id="one")
    with pytest.raises(LinkBroken, match="Connection refused"):
        hook.post(BODY, id="one")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.org/", "is not encrypted"),
        ("http://127.0.0.1.example.org/", "is not encrypted"),
        ("ftp://example.org/", "is no address"),
        ("file:///etc/passwd", "is no address"),
        ("https://", "is no address"),
        ("https://ada:secret@example.org/", "is no address"),
        ("https://example.org:port/", "is no address"),
        ("https://example.org/\r\nX: y", "is no address"),
    ],
)
def test_where_nothing_is_sent(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Webhook(url=url, secret=SECRET)


def test_plain_http_if_it_is_asked_for() -> None:
    assert Webhook(url="http://receiver.example:8080/x", secret=SECRET, plain_http=True).host == "receiver.example:8080"
    assert Webhook(url="http://[::1]:8080/", secret=SECRET).host == "[::1]:8080"


@pytest.mark.parametrize("both", [{}, {"signer": SIGNER, "secret": SECRET}])
def test_one_of_the_two_signs(both: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        Webhook(url="https://example.org/", **both)


HEADERS = sign(BODY, id="one", signer=SIGNER)
SIGNED_S = int(HEADERS["webhook-timestamp"])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(HEADERS)), st.data())
def test_what_is_altered_is_refused(name: str, data: st.DataObject) -> None:
    value = HEADERS[name]
    place = data.draw(st.integers(0, len(value) - 1))
    other = (
        value[:place]
        + data.draw(st.characters(min_codepoint=33, max_codepoint=126).filter(lambda c: c != value[place]))
        + value[place + 1 :]
    )
    for headers, body in (({**HEADERS, name: other}, BODY), (HEADERS, BODY + b" "), ({**HEADERS, name: ""}, BODY)):
        with pytest.raises(IdentityError):
            verify_webhook(headers, body, ROOT.roots)


def test_a_signature_on_something_else_is_no_webhook() -> None:
    stamp = str(int(time.time()))
    signature = base64.b64encode(SIGNER.sign(f"one.{stamp}.".encode() + BODY)).decode()
    with pytest.raises(IdentityError, match="altered"):
        verify_webhook({"webhook-id": "one", "webhook-timestamp": stamp, "webhook-signature": f"hanse1,{signature}"}, BODY, ROOT.roots)


def test_an_old_one_is_refused_and_a_repeated_one() -> None:
    headers = {name.title(): value for name, value in sign(BODY, id="one", signer=SIGNER, now=1000).items()}
    seen: dict[str, float] = {}
    assert verify_webhook(headers, BODY, ROOT.roots, seen=seen, now=1200) == ADA
    with pytest.raises(IdentityError, match="came before"):
        verify_webhook(headers, BODY, ROOT.roots, seen=seen, now=1299)
    for now in (699, 1301):
        with pytest.raises(IdentityError, match="old, or a clock is wrong"):
            verify_webhook(headers, BODY, ROOT.roots, seen=seen, now=now)
    later = sign(BODY, id="two", signer=SIGNER, now=5000)
    verify_webhook(later, BODY, ROOT.roots, seen=seen, now=5000)
    assert seen == {"two": 5000}  # ids are kept only as long as their time would count


def test_what_is_forged_leaves_no_id_behind() -> None:
    seen: dict[str, float] = {}
    with pytest.raises(IdentityError):
        verify_webhook(HEADERS, b"{}", ROOT.roots, seen=seen, now=SIGNED_S)
    assert verify_webhook(HEADERS, BODY, ROOT.roots, seen=seen, now=SIGNED_S) == ADA


def test_what_is_no_webhook() -> None:
    with pytest.raises(IdentityError, match="no header webhook-id"):
        verify_webhook({}, BODY, ROOT.roots)
    with pytest.raises(IdentityError, match="1,048,576 are the most"):
        verify_webhook(HEADERS, bytes(1 << 21), ROOT.roots)
    with pytest.raises(IdentityError, match="malformed"):
        verify_webhook({**HEADERS, "webhook-timestamp": "-1"}, BODY, ROOT.roots)


def test_a_secret_that_is_too_short_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("short\n")
    with pytest.raises(ConfigError, match="5 bytes: 16 are the fewest"):
        read_secret(tmp_path / "short")
    (tmp_path / "wrong").write_text("whsec_!")
    for name in ("wrong", "none"):
        with pytest.raises(ConfigError, match="holds no secret"):
            read_secret(tmp_path / name)
