"""Both ends in this process, or one in a forked one. Whatever is sent and not yet received has to fit the socket's buffer."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import socket
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import LinkBroken
from hanse.transport.memory import INLINE_BYTES, MemoryLink, SharedBody, map_shared

BIG = INLINE_BYTES + 1


@pytest.fixture
def ends() -> Iterator[tuple[MemoryLink, MemoryLink]]:
    first, second = MemoryLink.pair()
    yield first, second
    first.close()
    second.close()


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def content(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def sent(link: MemoryLink, peer: MemoryLink, body: bytes, *, message: bytes = b"") -> bytes:
    """What arrives of `body`; its memory is given back at once."""
    link.send(message, [body])
    received = peer.receive()
    assert received.message == message
    assert received.shared is None
    if received.body is None:
        return b""
    arrived = bytes(received.body.buffer)
    received.body.release()
    return arrived


@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES - 1, INLINE_BYTES, BIG, 3 << 20])
def test_a_body_arrives_whole_both_ways(ends: tuple[MemoryLink, MemoryLink], size: int) -> None:
    body = content(size)
    for link, peer in (ends, ends[::-1]):
        assert sent(link, peer, body) == body


def test_messages_keep_their_order_whatever_way_they_take(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    shared = SharedBody([b"shared"])
    a.send(b"1")
    a.send(b"2", [content(BIG)])
    a.send_shared(b"3", shared)
    a.send(b"4", [b"inline"])
    received = [b.receive() for _ in range(4)]
    assert [each.message for each in received] == [b"1", b"2", b"3", b"4"]
    assert [each.body is not None for each in received] == [False, True, False, True]
    assert received[2].shared is not None
    os.close(received[2].shared[0])
    shared.close()


def test_a_body_in_parts_of_any_dtype_is_one_and_aligned(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    first, second = np.arange(10_000, dtype=np.float64), np.ones((100, 100), np.float32)
    a.send(b"odd", [first.data, second.data, b"end"])
    body = b.receive().body
    assert body is not None
    numbers = np.frombuffer(body.buffer[: first.nbytes], np.float64)
    np.testing.assert_array_equal(numbers, first)
    assert numbers.ctypes.data % mmap.PAGESIZE == 0
    assert bytes(body.buffer[first.nbytes :]) == second.tobytes() + b"end"


def test_a_received_body_cannot_be_written(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    for size in (10, BIG):
        a.send(b"", [content(size)])
        body = b.receive().body
        assert body is not None
        assert body.buffer.readonly


def test_a_released_slot_is_used_again(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    sent(a, b, content(3 * BIG))
    before = descriptors()
    for seed, size in enumerate([3 * BIG, BIG, 2 * BIG, 3 * BIG]):
        assert sent(a, b, content(size, seed)) == content(size, seed)
    assert descriptors() <= before
    sent(a, b, content(4 * BIG))  # fits in no slot
    assert descriptors() > before


def test_a_slot_that_is_still_read_is_left_alone(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    bodies = []
    for seed in range(3):
        a.send(b"", [content(BIG, seed)])
        body = b.receive().body
        assert body is not None
        bodies.append(body)
    bodies[1].release()
    assert sent(a, b, content(BIG, 9)) == content(BIG, 9)  # takes the place of 1
    assert bytes(bodies[0].buffer) == content(BIG, 0)
    assert bytes(bodies[1].buffer) == content(BIG, 9)
    assert bytes(bodies[2].buffer) == content(BIG, 2)


def test_a_slot_comes_back_behind_other_messages(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    a.send(b"", [content(BIG)])
    body = b.receive().body
    assert body is not None
    b.send(b"first")
    body.release()
    b.send(b"second")
    before = descriptors()
    assert [each.message for each in a.receive_ready()] == [b"first", b"second"]
    assert sent(a, b, content(BIG, 1)) == content(BIG, 1)
    assert descriptors() == before


def test_a_message_too_long_for_the_socket(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    message = content(5 << 20)
    a.send(message)
    received = b.receive()
    assert (received.message, received.body) == (message, None)
    before = descriptors()
    for _ in range(2):
        a.send(message)
        assert b.receive().message == message
    assert descriptors() == before  # without a body the slot is given back at once
    assert sent(a, b, b"body", message=message) == b"body"


def test_one_shared_body_for_many_each_maps_it_privately() -> None:
    shared, pairs = SharedBody([b"abc", np.arange(3, dtype=np.uint8).data, b""]), [MemoryLink.pair() for _ in range(3)]
    assert shared.size == 6
    maps = []
    for a, b in pairs:
        a.send_shared(b"take it", shared)
        received = b.receive()
        assert received.message == b"take it"
        assert received.shared is not None
        maps.append(map_shared(received.shared))
        os.close(received.shared[0])
        a.close()
        b.close()
    maps[0][0] = ord("X")
    assert [bytes(view) for view in (*maps, shared.map())] == [b"Xbc\0\1\2", *[b"abc\0\1\2"] * 3]
    shared.close()
    assert bytes(maps[1]) == b"abc\0\1\2"  # it lives as long as somebody maps it


def test_many_descriptors_on_the_way_reach_their_messages(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    bodies = [SharedBody([b"%d" % number]) for number in range(40)]
    for number, body in enumerate(bodies):
        a.send_shared(b"%d" % number, body)
        body.close()
    for number in range(40):
        received = b.receive()
        assert received.shared is not None
        assert (received.message, bytes(map_shared(received.shared))) == (b"%d" % number, b"%d" % number)
        os.close(received.shared[0])


def test_what_is_ready_is_taken_without_waiting(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    assert b.receive_ready() == []
    for number in range(3):
        a.send(b"%d" % number)
    assert [each.message for each in b.receive_ready()] == [b"0", b"1", b"2"]
    assert b.receive_ready() == []


def test_bytes_that_come_one_at_a_time(ends: tuple[MemoryLink, MemoryLink]) -> None:
    a, b = ends
    a.send(b"hello", [b"body"])
    a.send(b"", [b"more"])
    a.send(b"last")
    stream = b.socket.recv(1 << 16)
    raw, other = socket.socketpair()
    link, got = MemoryLink(other), []
    for byte in stream:
        raw.send(bytes([byte]))
        got += [(each.message, each.body and bytes(each.body.buffer)) for each in link.receive_ready()]
    assert got == [(b"hello", b"body"), (b"", b"more"), (b"last", None)]
    raw.close()
    link.close()


@pytest.mark.parametrize("receive", [MemoryLink.receive, MemoryLink.receive_ready])
def test_the_other_end_is_gone(receive: Callable[[MemoryLink], object]) -> None:
    a, b = MemoryLink.pair()
    a.send(b"last words", [content(BIG)])
    a.close()
    last = b.receive()
    assert last.message == b"last words"
    assert last.body is not None
    assert bytes(last.body.buffer) == content(BIG)
    last.body.release()  # there is nobody to tell
    for _ in range(2):
        with pytest.raises(LinkBroken, match="gone"):
            receive(b)
    with pytest.raises(LinkBroken, match="gone"):
        b.send(b"x")
    b.close()


def test_it_went_without_reading_what_it_was_sent() -> None:
    a, b = MemoryLink.pair()
    b.send(b"unread")
    a.send(b"before")
    a.close()
    assert b.receive().message == b"before"
    with pytest.raises(LinkBroken):
        b.receive()
    b.close()


def test_nothing_is_left_open() -> None:
    gc.collect()  # what other tests have left
    before = descriptors()
    for _ in range(3):
        a, b = MemoryLink.pair()
        for _ in range(2):
            a.send(b"", [content(BIG)])
            b.receive()
        a.close()
        b.close()
        a.close()  # again does nothing
    assert descriptors() <= before


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0, 5, INLINE_BYTES, BIG, 200_000]), st.integers(0, 3)), max_size=20))
def test_any_sequence_of_sizes(steps: list[tuple[int, int, int]]) -> None:
    """Each step sends from one end, and keeps the body for a while: what is held stays as it was."""
    ends, held = MemoryLink.pair(), []
    for number, (end, size, keep) in enumerate(steps):
        body = content(size, number)
        ends[end].send(b"%d" % number, [body])
        received = ends[1 - end].receive()
        assert received.message == b"%d" % number
        assert (received.body is None) is (size == 0)
        if received.body is not None:
            held.append((received.body, body))
        while len(held) > keep:
            arrived, expected = held.pop(number % len(held))
            assert bytes(arrived.buffer) == expected
            arrived.release()
    for end in ends:
        end.close()
    for arrived, expected in held:
        assert bytes(arrived.buffer) == expected  # also after the ends are closed


def test_across_a_fork() -> None:
    """The other process sends back what it gets, the shared bodies too; when it is killed, this end hears of it."""
    here, there = MemoryLink.pair()
    if (pid := os.fork()) == 0:
        try:
            here.close()
            while True:
                received = there.receive()
                body = b"" if received.body is None else bytes(received.body.buffer)
                if received.shared is not None:
                    body = bytes(map_shared(received.shared))
                    os.close(received.shared[0])
                there.send(received.message[::-1], [body])
                if received.body is not None:
                    received.body.release()
        finally:
            os._exit(1)
    there.close()
    for number, size in enumerate([0, 1, INLINE_BYTES, BIG, 5 << 20, 100, BIG, 5 << 20, 6 << 20]):
        body = content(size, number)
        here.send(b"%d;" % number, [body])
        received = here.receive()
        assert received.message == b";%d" % number
        assert (b"" if received.body is None else bytes(received.body.buffer)) == body
        if received.body is not None:
            received.body.release()
    shared = SharedBody([content(1 << 20)])
    here.send_shared(b"s", shared)
    shared.close()
    back = here.receive().body
    assert back is not None
    assert bytes(back.buffer) == content(1 << 20)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(LinkBroken):
        here.receive()
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    here.close()
