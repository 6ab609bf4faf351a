from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import Refused, StorageFull, WireError
from hanse.messages.wire import Blob
from hanse.transport.blobs import FORGOTTEN_AFTER_S, SPARES, FolderBlobs, Incoming, map_file, open_file

MIB = 1 << 20


def named(data: bytes) -> Blob:
    return Blob(blake3(data).digest(), len(data))


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


def take(incoming: Incoming, data: bytes) -> Path:
    incoming.write(data)
    return incoming.finish()


def files(blobs: FolderBlobs) -> set[str]:
    return {str(path.relative_to(blobs.folder)) for path in blobs.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("parts", [[], [b""], [b"abc"], [b"abc", b"defg"], [os.urandom(3 * MIB + 7), bytearray(5)]])
def test_a_blob_is_named_by_its_bytes_and_read_by_mapping(blobs: FolderBlobs, parts: list[bytes]) -> None:
    whole = b"".join(parts)
    blob = blobs.write(parts)
    assert blob == named(whole)
    assert blobs.has(blob)
    assert blobs.map(blob) == whole
    assert blobs.map(blob).readonly
    assert files(blobs) == {f"{blob.hex[:2]}/{blob.hex}"}


def test_a_file_is_copied(blobs: FolderBlobs, tmp_path: Path) -> None:
    data = os.urandom(2 * MIB + 1)
    (tmp_path / "file").write_bytes(data)
    blob = blobs.add_file(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"changed")
    assert blobs.map(blob) == data


def test_what_is_not_there_is_refused(blobs: FolderBlobs) -> None:
    with pytest.raises(Refused, match="not here"):
        blobs.map(named(b"never came"))
    blobs.remove(named(b"never came"))


@given(data=st.binary(min_size=1, max_size=400), cuts=st.lists(st.integers(1, 100), max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_part_goes_on_where_it_stood(tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int]) -> None:
    folder = tmp_path_factory.mktemp("blobs")
    blob, reached = named(data), 0
    for cut in cuts:
        incoming = FolderBlobs(folder).incoming(blob)
        assert incoming.offset == reached
        piece = data[reached : reached + cut]
        if piece:
            incoming.write(piece)
        reached += len(piece)
        incoming.close()
        assert not FolderBlobs(folder).has(blob)
    incoming = FolderBlobs(folder).incoming(blob)
    if reached < len(data):
        incoming.write(data[reached:])
    assert incoming.finish().read_bytes() == data
    assert files(FolderBlobs(folder)) == {f"{blob.hex[:2]}/{blob.hex}"}


def test_a_part_survives_a_killed_process(blobs: FolderBlobs) -> None:
    data = os.urandom(3 * MIB)
    blob = named(data)
    program = """
import os, signal, sys
from hanse.messages.wire import Blob
from hanse.transport.blobs import FolderBlobs
incoming = FolderBlobs(sys.argv[1]).incoming(Blob(bytes.fromhex(sys.argv[2]), int(sys.argv[3])))
incoming.write(sys.stdin.buffer.read())
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program, str(blobs.folder), blob.hex, str(blob.size)]
    subprocess.run(command, input=data[:MIB], check=False, timeout=30)
    incoming = blobs.incoming(blob)
    assert incoming.offset == MIB
    incoming.write(data[MIB:])
    assert incoming.finish().read_bytes() == data


def test_wrong_bytes_are_deleted(blobs: FolderBlobs) -> None:
    blob = named(b"right")
    for wrong, reason in ((b"wrong", "digest"), (b"rig", "3 came"), (b"right and more", "more came")):
        incoming = blobs.incoming(blob)
        assert incoming.offset == 0
        with pytest.raises(WireError, match=reason):
            take(incoming, wrong)
        assert files(blobs) == set()


def test_a_part_that_rotted_on_the_disk_is_found_out(blobs: FolderBlobs) -> None:
    data = os.urandom(MIB)
    incoming = blobs.incoming(named(data))
    incoming.write(data[: MIB // 2])
    incoming.close()
    (part,) = blobs.folder.glob("incoming/*")
    with part.open("r+b") as file:
        file.write(b"rot")
    incoming = blobs.incoming(named(data))
    incoming.write(data[MIB // 2 :])
    with pytest.raises(WireError, match="digest"):
        incoming.finish()
    assert blobs.incoming(named(data)).offset == 0


def test_two_may_bring_the_same_blob_at_once(blobs: FolderBlobs) -> None:
    data = os.urandom(1000)
    blob = named(data)
    one, two = blobs.incoming(blob), FolderBlobs(blobs.folder).incoming(blob)
    one.write(data[:700])
    two.write(b"x" * 500)
    one.write(data[700:])
    assert one.finish().read_bytes() == data
    two.write(b"y" * 500)
    with pytest.raises(WireError, match="digest"):
        two.finish()
    assert blobs.map(blob) == data
    assert blobs.incoming(blob).offset == blob.size
    assert blobs.incoming(blob).finish() == blobs.path(blob)
    assert files(blobs) == {f"{blob.hex[:2]}/{blob.hex}"}


def test_removed_files_are_overwritten_unless_they_are_read(blobs: FolderBlobs) -> None:
    first, second, third = (os.urandom(2 * MIB) for _ in range(3))
    blob = blobs.write([first])
    inode = blobs.path(blob).stat().st_ino
    seen = blobs.map(blob)
    blobs.remove(blob)
    assert not blobs.has(blob)
    reading = blobs.write([second])
    assert blobs.path(reading).stat().st_ino != inode
    assert seen == first
    seen.release()
    incoming = blobs.incoming(named(third))
    assert incoming.offset == 0
    incoming.write(third)
    assert incoming.finish().stat().st_ino == inode
    assert blobs.map(named(third)) == third


def test_a_spare_that_is_longer_leaves_no_count_behind(blobs: FolderBlobs) -> None:
    blobs.remove(blobs.write([(2).to_bytes(8, "little") * (MIB // 4)]))
    data = os.urandom(MIB + MIB // 2)
    incoming = blobs.incoming(named(data))
    assert incoming.offset == 0
    incoming.close()
    assert blobs.incoming(named(data)).offset == 0


def test_spares_are_few_and_small_files_are_none(blobs: FolderBlobs) -> None:
    written = [blobs.write([os.urandom(MIB)]) for _ in range(SPARES + 2)]
    for blob in [*written, blobs.write([b"small"])]:
        blobs.remove(blob)
    assert len(files(blobs)) == SPARES
    blobs.drop_spares()
    assert files(blobs) == set()


def test_old_parts_are_forgotten_but_not_those_at_work(blobs: FolderBlobs) -> None:
    at_work, left = blobs.incoming(named(b"at work")), blobs.incoming(named(b"left behind"))
    at_work.write(b"at")
    left.write(b"left")
    left.close()
    for part in blobs.folder.glob("incoming/*"):
        os.utime(part, (0, os.stat(part).st_mtime - FORGOTTEN_AFTER_S - 1))
    FolderBlobs(blobs.folder)
    assert [path.name.split(".")[0] for path in blobs.folder.glob("incoming/*")] == [named(b"at work").hex]
    at_work.write(b" work")
    at_work.finish()


def test_a_reader_never_gets_a_file_that_was_taken_away(blobs: FolderBlobs) -> None:
    blob = blobs.write([os.urandom(MIB)])
    path = blobs.path(blob)
    descriptor = open_file(path)
    blobs.remove(blob)
    with pytest.raises(Refused):
        map_file(path)
    assert blake3(os.pread(descriptor, MIB, 0)).digest() == blob.digest
    os.close(descriptor)


DISK_FULL = """
import os, resource, signal, sys
from hanse.errors import StorageFull
from hanse.messages.wire import Blob
from hanse.transport.blobs import FolderBlobs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
blobs = FolderBlobs(sys.argv[1])
big = os.urandom(3 << 20)
incoming = blobs.incoming(Blob(bytes(32), len(big)))
for act in (lambda: incoming.write(big), lambda: blobs.write([big])):
    try:
        act()
    except StorageFull as error:
        print(error)
"""


def test_a_full_disk_is_said_and_leaves_nothing_half_written(blobs: FolderBlobs) -> None:
    kept = blobs.write([b"kept before"])
    # A limit on a file's size stands for the full disk: the kernel refuses the write in the midst of the blob in the same way.
    done = subprocess.run([sys.executable, "-c", DISK_FULL, str(blobs.folder)], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.count("Make room on this disk") == 2
    assert done.stdout.count(os.strerror(errno.EFBIG)) == 2
    assert files(blobs) == {f"{kept.hex[:2]}/{kept.hex}"}


def test_a_blob_larger_than_the_disk_is_refused_at_once(blobs: FolderBlobs) -> None:
    with pytest.raises(StorageFull, match="needs"):
        blobs.incoming(Blob(bytes(32), 1 << 60))
    assert files(blobs) == set()
