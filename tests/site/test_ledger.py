from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from typer.testing import CliRunner

from hanse.cli.audit import app
from hanse.errors import ConfigError, WireError
from hanse.site.ledger import Head, Ledger, head_path, read, read_head, verify


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A ledger of six lines, of kinds `sent` and `received`."""
    path = tmp_path / "state" / "audit.jsonl"
    with Ledger(path) as ledger:
        for number in range(6):
            ledger.append(("sent", "received")[number % 2], job="j-1", bytes=1000 + number, tensors=["w", "b"])
    return path


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_each_line_names_the_digest_of_the_one_before(log: Path) -> None:
    previous = "0" * 64
    for number, line in enumerate(lines(log)):
        record = json.loads(line)
        assert list(record) == ["n", "time", "kind", "job", "bytes", "tensors", "previous"]
        assert (record["n"], record["bytes"], record["previous"]) == (number, 1000 + number, previous)
        assert record["time"].endswith("+00:00")
        previous = blake3(line.removesuffix(b"\n")).hexdigest()
    assert read_head(log) == Head(6, previous) == Head.parse(f"6:{previous}\n")
    assert verify(log) == 6
    assert [line["kind"] for line in read(log)] == ["sent", "received"] * 3


def test_a_ledger_goes_on_where_it_ended(log: Path) -> None:
    with Ledger(log) as ledger:
        assert ledger.head.lines == 6
        ledger.append("started")
        assert verify(log) == 7  # while it is written
    assert verify(log) == 7


def altered(text: list[bytes], number: int) -> list[bytes]:
    return [*text[:number], text[number].replace(b'"job":"j-1"', b'"job":"j-2"'), *text[number + 1 :]]


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "first altered": (lambda text: altered(text, 0), "line 2 does not fit the line before it: one of the two was altered"),
    "middle altered": (lambda text: altered(text, 3), "line 5 does not fit the line before it"),
    "last altered": (lambda text: altered(text, 5), "line 6 was altered: the head has another digest for it"),
    "first removed": (lambda text: text[1:], "line 1 is number 1, not 0: lines were removed, added or moved"),
    "middle removed": (lambda text: text[:2] + text[3:], "line 3 is number 3, not 2"),
    "last removed": (lambda text: text[:5], "has 5 lines, and by .*audit.head 6: the last ones are gone"),
    "all removed": (lambda text: [], "has 0 lines, and by .*audit.head 6"),
    "moved": (lambda text: [*text[:2], text[3], text[2], *text[4:]], "line 3 is number 3, not 2"),
    "doubled": (lambda text: [*text[:3], text[2], *text[3:]], "line 4 is number 2, not 3"),
    "added": (lambda text: [*text, text[5].replace(b'"n":5', b'"n":6')], "line 7 does not fit the line before it"),
    "not JSON": (lambda text: [*text[:2], b"nothing\n", *text[3:]], "line 3 was altered: "),
    "an empty line": (lambda text: [*text[:2], b"\n", *text[2:]], "line 3 was altered: "),
    "too deep": (lambda text: [*text[:2], b"[" * 100_000 + b"\n", *text[2:]], "line 3 was altered: "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_verify_finds_what_was_changed(log: Path, change: str) -> None:
    function, message = CHANGES[change]
    log.write_bytes(b"".join(function(lines(log))))
    with pytest.raises(WireError, match=message):
        verify(log)
    result = CliRunner().invoke(app, ["verify", str(log)])
    assert result.exit_code != 0
    assert isinstance(result.exception, WireError)


def test_every_altered_byte_is_found(log: Path) -> None:
    whole = log.read_bytes()
    for place in range(len(whole)):
        log.write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        with pytest.raises(WireError):
            verify(log)
    log.write_bytes(whole)
    assert verify(log) == 6


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("last removed", "all removed")])
def test_nothing_is_added_to_a_broken_chain(log: Path, change: str) -> None:
    log.write_bytes(broken := b"".join(CHANGES[change][0](lines(log))))
    with pytest.raises(WireError):
        Ledger(log)
    assert log.read_bytes() == broken


def test_a_head_kept_elsewhere_finds_a_ledger_that_was_written_anew(log: Path) -> None:
    kept = read_head(log)
    assert verify(log, kept) == 6
    log.unlink()
    head_path(log).unlink()
    with Ledger(log) as ledger:
        for _ in range(8):
            ledger.append("sent", job="another")
    assert verify(log) == 8  # by itself it is whole
    with pytest.raises(WireError, match="line 6 was altered: the head has another digest for it"):
        verify(log, kept)
    with pytest.raises(WireError, match="has 8 lines, and by the head that was given 9"):
        verify(log, Head(9, kept.digest))


def test_lines_that_are_gone_are_noted_at_the_next_start(log: Path) -> None:
    before = read_head(log)
    log.write_bytes(b"".join(lines(log)[:4]))
    with Ledger(log):
        pass
    assert verify(log) == 5
    *_, last = read(log)
    assert (last["kind"], last["lines"], last["head"]) == ("lost", 2, str(before))
    with pytest.raises(WireError, match="the last ones are gone"):
        verify(log, before)


@pytest.mark.parametrize("torn", [b"{", b'{"n":6,"time":"2026', b"\0" * 500])
def test_a_line_that_was_cut_off_is_removed_at_the_next_start(log: Path, torn: bytes) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole + torn)
    assert verify(log) == 6
    with Ledger(log) as ledger:
        ledger.append("sent")
    assert verify(log) == 8
    assert log.read_bytes().startswith(whole)
    assert [(line["kind"], line.get("bytes")) for line in read(log)][6:] == [("cut", len(torn)), ("sent", None)]


def test_a_line_that_the_head_counts_and_that_was_cut_off_is_noted_as_lost(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-10])
    with pytest.raises(WireError, match="the last ones are gone"):
        verify(log)
    with Ledger(log):
        pass
    assert [line["kind"] for line in read(log)][5:] == ["lost", "cut"]


def test_a_line_that_the_head_does_not_count_yet_is_kept(log: Path) -> None:
    *_, last = lines(log)
    before = Head(5, json.loads(last)["previous"])
    head_path(log).write_text(f"{before.lines:020d}:{before.digest}\n")
    with Ledger(log) as ledger:
        assert ledger.head.lines == 6
    assert read_head(log).lines == verify(log) == 6


@pytest.mark.parametrize("content", [None, b""])
def test_without_its_head_a_ledger_is_not_believed(log: Path, content: bytes | None) -> None:
    head_path(log).unlink()
    if content is not None:
        head_path(log).write_bytes(content)
    for use in (verify, Ledger):
        with pytest.raises((ConfigError, WireError), match=r"audit\.head"):
            use(log)


def test_a_head_that_was_altered(log: Path) -> None:
    head_path(log).write_text("six\n")
    for use in (verify, Ledger):
        with pytest.raises(WireError, match=r"audit\.head was altered"):
            use(log)
    for text in ("", "6", "6:abc", f"-1:{'0' * 64}", f"6:{'G' * 64}", f"٣:{'0' * 64}"):
        with pytest.raises(ConfigError, match="no head of an audit log"):
            Head.parse(text)


def test_there_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audit\.head"):
        verify(tmp_path / "audit.jsonl")
    with pytest.raises(ConfigError, match="No such file"):
        list(read(tmp_path / "audit.jsonl"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        Ledger(tmp_path / "file" / "audit.jsonl")


def test_facts_are_json_values_under_names_of_their_own(log: Path) -> None:
    with Ledger(log) as ledger:
        with pytest.raises(ConfigError, match="has its own 'previous'"):
            ledger.append("sent", previous="x")
        with pytest.raises(ConfigError, match="JSON values only"):
            ledger.append("sent", path=Path("x"))
        ledger.append("sent", text="a\nline é \u2028", nested={"a": [1, None, 2.5]})
    assert verify(log) == 7
    *_, last = read(log)
    assert (last["text"], last["nested"]) == ("a\nline é \u2028", {"a": [1, None, 2.5]})


def test_a_process_can_wait_for_its_turn(log: Path) -> None:
    def second() -> None:
        with Ledger(log, wait=True) as ledger:
            ledger.append("second")

    before = verify(log) if log.exists() else 0
    with Ledger(log) as ledger:
        thread = threading.Thread(target=second)
        thread.start()
        ledger.append("first")
    thread.join()
    assert verify(log) == before + 2
    assert [line["kind"] for line in read(log)][-2:] == ["first", "second"]


def test_what_was_read_before_is_not_read_again(log: Path) -> None:
    with Ledger(log) as ledger:
        ledger.append("one")
        ledger.append("two")
        end = ledger.end
    data = log.read_bytes()
    log.write_bytes(b"X" * end.byte + data[end.byte :])
    with Ledger(log, since=end) as ledger:  # what stands before is not looked at
        ledger.append("three")
        later = ledger.end
    assert later.head.lines == end.head.lines + 1
    with pytest.raises(WireError):
        verify(log)
    log.write_bytes(data)
    with Ledger(log, since=later) as ledger:  # the file is shorter than what was known: it is read from its beginning
        assert ledger.head.lines >= end.head.lines
    assert [line["kind"] for line in read(log)][-1] == "lost"


def test_one_process_writes_at_a_time(log: Path) -> None:
    with Ledger(log), pytest.raises(ConfigError, match="written by another process"):
        Ledger(log)
    with Ledger(log):
        pass


def test_many_threads_write(log: Path) -> None:
    with Ledger(log) as ledger:
        threads = [threading.Thread(target=lambda: [ledger.append("sent", job="j") for _ in range(200)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verify(log) == 1606


WRITE = """
import sys
from pathlib import Path
from hanse.site.ledger import Ledger

ledger = Ledger(Path(sys.argv[1]))
for number in range(10**9):
    ledger.append("sent", job="j", number=number, tensors=["x" * 50] * 100)
    print(ledger.head, flush=True)
"""


def test_what_was_appended_outlives_a_kill(tmp_path: Path) -> None:
    path, lost = tmp_path / "audit.jsonl", Head()
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(20):
                lost = Head.parse(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            for line in process.stdout.read().splitlines():
                lost = Head.parse(line) if len(line) > 64 and line.partition(":")[2][63:] else lost
        with Ledger(path) as ledger:
            assert ledger.head.lines >= lost.lines
        assert verify(path, lost) >= lost.lines
    assert not [line for line in read(path) if line["kind"] == "lost"]


FILL = """
import resource, sys
from pathlib import Path
from hanse.errors import StorageFull
from hanse.site.ledger import Ledger

resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
ledger = Ledger(Path(sys.argv[1]))
try:
    while True:
        ledger.append("sent", text="x" * 500)
except StorageFull as error:
    print(ledger.head.lines, error)
"""


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, check=True)
    count, _, text = done.stdout.partition(" ")
    assert "cannot be written" in text
    assert verify(path) == int(count) > 3
    assert path.read_bytes().endswith(b"}\n")
    with Ledger(path) as ledger:
        ledger.append("sent")
    assert verify(path) == int(count) + 1


def test_a_closed_ledger_takes_no_lines(log: Path) -> None:
    ledger = Ledger(log)
    ledger.close()
    with pytest.raises(ValueError, match="closed file"):
        ledger.append("sent")
    assert verify(log) == 6
    assert os.stat(log).st_size == len(log.read_bytes())


def test_the_command(log: Path) -> None:
    run = CliRunner().invoke
    assert f"{log}: 6 lines, all in place and unaltered" in run(app, ["verify", str(log)]).output
    head = run(app, ["head", str(log)]).output.strip()
    assert head == str(read_head(log))
    assert run(app, ["verify", str(log), "--head", head]).exit_code == 0
    assert run(app, ["verify", str(log), "--head", f"6:{'0' * 64}"]).exit_code != 0
    assert run(app, ["verify", str(log), "--head", "x"]).exit_code != 0
    shown = run(app, ["show", str(log), "--kind", "received"]).output.splitlines()
    assert len(shown) == 3
    assert 'received    job=j-1  bytes=1001  tensors=["w","b"]' in shown[0]
    assert run(app, ["show", str(log), "--json"]).output == log.read_text()
    assert run(app, ["show", str(log.with_name("other.jsonl"))]).exit_code != 0
