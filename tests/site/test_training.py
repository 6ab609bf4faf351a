"""Training processes that do not behave: they are started for real, and all of them break the rules of the link."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hanse.messages.wire import TaskRef
from hanse.site.launcher import MAX_MESSAGE_BYTES, Trainer
from hanse.site.training import Died, Done, Training
from hanse.transport.memory import MemoryLink

HEAD = """
import os, socket, struct, sys, mmap
from hanse.site import orders
from hanse.site.orders import *
from hanse.messages.wire import TaskRef
from hanse.transport.memory import MemoryLink, SharedBody
link = MemoryLink(socket.socket(fileno=int(sys.argv[1])))
head = struct.Struct("<BIQI")
done = orders.encode(Performed(task=TaskRef(0, 0)))
order = link.receive()
"""
HOSTILE = {
    "garbage": "link.socket.send(b'\\xff' * 1000)",
    "no message": "link.send(b'hello')",
    "another task": "link.send(orders.encode(Performed(task=TaskRef(7, 7))), [b'x'])",
    "no update": "link.send(done)",
    "a long message": "link.socket.send(head.pack(0, 2**32 - 1, 0, 0))",
    "a long body": "link.socket.send(head.pack(0, 10, 2**60, 0))",
    "a descriptor": "link.send_shared(done, SharedBody([b'x']))",
    "memory without a descriptor": "link.socket.send(head.pack(2, 10, 10, 0))",
    "memory that is not there": "link.socket.send(head.pack(1, 10, 10, 5))",
    "memory that is too short": "socket.send_fds(link.socket, [head.pack(2, 10, 2**40, 0)], [SharedBody([bytes(5000)]).descriptor])",
    "memory that is empty": "socket.send_fds(link.socket, [head.pack(2, 0, 0, 0)], [os.memfd_create('x', 2)])",
    "memory that cannot be sealed": "socket.send_fds(link.socket, [head.pack(2, 9, 9, 0)], [os.open('/dev/zero', 0)])",
    "a dead process": "os._exit(7)",
    "a killed one": "os.kill(os.getpid(), 9)",
}


@pytest.fixture
def trainers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    assert all(process.returncode is not None for process in started)  # each was waited for


def training(code: str, folder: Path, trainers: list[subprocess.Popen[bytes]], lines: list[str] | None = None) -> Training:
    def start() -> Trainer:
        here, there = MemoryLink.pair()
        here.max_message_bytes = MAX_MESSAGE_BYTES
        output = folder / "out"
        with output.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", HEAD + code, str(there.socket.fileno())],
                pass_fds=[there.socket.fileno()],
                stderr=log,
                start_new_session=True,
            )
        there.close()
        trainers.append(process)
        return Trainer(process, here, output)

    return Training(start, [].extend if lines is None else lines.extend)


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_trainer_that_breaks_the_rules_is_ended(what: str, tmp_path: Path, trainers: list[subprocess.Popen[bytes]]) -> None:
    asked = training(f"{HOSTILE[what]}\nlink.receive()", tmp_path, trainers)
    answer = await asked.perform(TaskRef(0, 0), b"task", None)
    assert isinstance(answer, Died)
    assert answer.why or answer.ended.signal or answer.ended.status == 7
    assert asked.pid is None
    assert trainers[0].returncode == {"a dead process": 7}.get(what, -9)


async def test_a_shared_update_cannot_be_cut_short_under_the_agent(tmp_path: Path, trainers: list[subprocess.Popen[bytes]]) -> None:
    code = """
link.send(done, [bytes(1 << 20)])
link.receive()
try:
    os.ftruncate(link._sending[0][0], 10)
except PermissionError:
    link.send(orders.encode(Lines(lines=["sealed"])))
link.send(done, [b"second"])
"""
    lines: list[str] = []
    asked = training(code, tmp_path, trainers, lines)
    first = await asked.perform(TaskRef(0, 0), b"task", None)
    assert isinstance(first, Done)
    assert isinstance(await asked.perform(TaskRef(0, 0), b"task", None), Done)
    assert lines == ["sealed"]
    assert bytes(first.body.buffer) == bytes(1 << 20)
    asked.stop()


async def test_lines_arrive_before_the_answer_and_the_end_of_the_process_is_told(
    tmp_path: Path, trainers: list[subprocess.Popen[bytes]]
) -> None:
    lines: list[str] = []
    code = "link.send(orders.encode(Lines(lines=['a', 'b'])))\nprint('last words', file=sys.stderr)\nsys.stderr.flush()\nos._exit(4)"
    asked = training(code, tmp_path, trainers, lines)
    answer = await asked.perform(TaskRef(0, 0), b"task", None)
    assert isinstance(answer, Died)
    assert (str(answer.ended), answer.last_words, lines) == ("ended with status 4", "last words", ["a", "b"])


async def test_a_child_that_keeps_the_link_open_does_not_hide_the_death(tmp_path: Path, trainers: list[subprocess.Popen[bytes]]) -> None:
    asked = training("if os.fork():\n    os._exit(5)\nlink.receive()", tmp_path, trainers)
    answer = await asked.perform(TaskRef(0, 0), b"task", None)
    assert isinstance(answer, Died)
    assert answer.ended.status == 5
