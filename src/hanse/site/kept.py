"""What an agent keeps of a job on disk, so that nothing is lost when it is killed.

    offer            the server's Offer
    job/             the job's files, unpacked
    work/            where its training code may write; work.log: what that wrote outside of Python
    blobs/           the archive, and tasks that came as blobs
    states/C-I       what the site keeps between tasks, after the task of commit C and index I
    updates/C-I      the frame of a small update that the server has not acknowledged
    spent.json       what the job has taken of the site's caps

Each file is whole or not there: it is written beside its place and renamed. It outlives the process, and is not forced to the disk. A large
update is not copied here: it lies in the training process's memory, and is made again, to the same bits, if the agent dies.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import msgspec

from hanse.errors import Refused, StorageFull, WireError
from hanse.messages.wire import FromServer, Offer, TaskRef, decode_message, encode_message
from hanse.site.policy import Spent

_NAME = re.compile(r"\w[\w.-]{0,99}")


class Counted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What of a job was counted already: the last task, its kind's number so far, and what was spent."""

    newest: TaskRef | None = None
    trained: int = 0
    commits: int = 0
    spent: Spent = Spent()


class Kept:
    """One job's folder below `folder`. Raises Refused for a job whose id is no name for a folder, StorageFull where there is no room."""

    def __init__(self, folder: Path, job: str) -> None:
        if not _NAME.fullmatch(job) or len(job.encode()) > 200:
            raise Refused(f"the job's id {job!r} is no name for a folder")
        self.path = folder / job
        self.job, self.work, self.blobs = self.path / "job", self.path / "work", self.path / "blobs"
        self._states, self._updates, self._counted = self.path / "states", self.path / "updates", self.path / "spent.json"
        self._with_state = sorted(map(_ref, self._states.iterdir())) if self._states.is_dir() else []

    def offer(self) -> Offer:
        """What the server offered. Raises WireError if it is not there or is none."""
        try:
            offer = decode_message((self.path / "offer").read_bytes(), FromServer)
        except FileNotFoundError as error:
            raise WireError(f"{self.path} holds no offer", offset=0) from error
        assert isinstance(offer, Offer)
        return offer

    def save_offer(self, offer: Offer) -> None:
        for folder in (self._states, self._updates, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "offer", encode_message(offer))

    def counted(self) -> Counted:
        return msgspec.json.decode(self._counted.read_bytes(), type=Counted) if self._counted.exists() else Counted()

    def save_counted(self, counted: Counted) -> None:
        write_whole(self._counted, msgspec.json.encode(counted))

    def state_before(self, ref: TaskRef) -> bytes | None:
        """What the site kept when it began this task: after the newest of the earlier ones. None for nothing."""
        earlier = [other for other in self._with_state if other < ref]
        return (self._states / _name(earlier[-1])).read_bytes() if earlier else None

    def save_state(self, ref: TaskRef, state: bytes) -> None:
        write_whole(self._states / _name(ref), state)
        self._with_state = sorted({*self._with_state, ref})

    def update(self, ref: TaskRef) -> bytes | None:
        path = self._updates / _name(ref)
        return path.read_bytes() if path.exists() else None

    def save_update(self, ref: TaskRef, frame: bytes) -> None:
        write_whole(self._updates / _name(ref), frame)

    def forget_update(self, ref: TaskRef) -> None:
        (self._updates / _name(ref)).unlink(missing_ok=True)

    def forget_before(self, commit: int) -> None:
        """No task of an earlier commit will be asked for again: of those, the newest state is enough."""
        old = [ref for ref in self._with_state if ref.commit < commit]
        for ref in old[:-1]:
            (self._states / _name(ref)).unlink(missing_ok=True)
            self._with_state.remove(ref)
        for path in [path for path in self._updates.iterdir() if _ref(path).commit < commit]:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget the job. Training code may have left anything here: what cannot be deleted is left behind."""
        shutil.rmtree(self.path, ignore_errors=True)


def _name(ref: TaskRef) -> str:
    return f"{ref.commit}-{ref.index}"


def _ref(path: Path) -> TaskRef:
    commit, _, index = path.name.partition("-")
    return TaskRef(int(commit), int(index))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, by way of a file in the folder above its own. Raises StorageFull."""
    part = path.parent.parent / f".{path.parent.name}-{path.name}.part"
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"there is no room for {path}: {error.strerror}.", hint="Make room on this disk.") from error
        raise
