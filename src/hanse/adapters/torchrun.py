"""One script in several processes of a site, for `torch.distributed`: each gets every task, and rank 0 answers.

The process that the site has started trains nothing: it hands tasks on to processes that run the same script anew, with torchrun's
environment variables RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, and ends them all when one of them fails. They meet by a file, and
talk over the loopback interface or the GPUs' own links: so it works in a site's sandbox, and opens no port to others.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import distributed

import hanse.client as client
from hanse.client.framework import adapter_for, from_arrays, map_leaves, seed_all, to_arrays
from hanse.client.session import SiteInfo, TaskAtHand, enter
from hanse.errors import ConfigError, LinkBroken, SiteFailed
from hanse.messages.codec import decode, encode
from hanse.messages.flmodel import FLModel
from hanse.messages.update import Record
from hanse.process import die_with_parent
from hanse.seeds import seed_for
from hanse.site.process import thread_settings
from hanse.transport.memory import MemoryLink, Received, SharedBody, map_shared

_BEGIN = "HANSE_PROCESS"  # what a process of the group is told, as JSON
_LOOK_EVERY_MS = 500
_END_WITHIN_S = 60.0
_DATA_TYPES = {"scalar": "SCALAR", "text": "TEXT", "param": "PARAMETER", "tag": "TAG"}


def torchrun(main: Callable[[], object], *, processes: int, backend: str | None = None) -> None:
    """Run `main()` in so many processes of this site, each with `torch.distributed` initialised, until the job is over.

    main: a function of the script; it uses the Client API as a script in one process does. Every process receives each task's model. What
        rank 0 sends, logs and keeps in `get_state()` counts; what the others do of that is dropped.
    processes: 1 or more, usually one a GPU.
    backend: "nccl" or "gloo"; None for NCCL if there are as many GPUs as processes, and Gloo otherwise.
    Raises ConfigError for settings that do not fit, or if no script calls it; and SiteFailed if a process fails or ends without an answer:
        none is left then.
    """
    if begin := os.environ.pop(_BEGIN, None):
        _take_part(main, json.loads(begin))
    if processes < 1:
        raise ConfigError(f"processes is {processes}: it must be 1 or more")
    if backend not in (None, "gloo", "nccl"):
        raise ConfigError(f"backend is {backend!r}: it must be 'nccl' or 'gloo', or None for the one that fits")
    if backend == "nccl" and torch.cuda.device_count() < processes:
        raise ConfigError(f"NCCL needs a GPU a process: there are {torch.cuda.device_count()}, and processes is {processes}")
    if "RANK" in os.environ:
        raise ConfigError("torchrun() starts a site's processes itself.", hint="Start the script with `python`, or as a job's `script`.")
    if getattr(main, "__module__", None) != "__main__":
        hint = "Call it in the job's `script`, with a function of that."
        raise ConfigError(f"torchrun() starts a script anew, and {main!r} is not of one.", hint=hint)
    _lead(processes, backend or ("nccl" if torch.cuda.device_count() >= processes else "gloo"))


# The process that the site has started.


def _lead(processes: int, backend: str) -> None:
    """Hand tasks on, and answers back."""
    client.init()
    group: _Group | None = None
    try:
        while client.is_running():
            model = client.receive()
            assert model is not None
            if group is not None and not group.waits():  # they have come to the script's end: it begins anew
                group.end()
                group = None
            if group is None:
                group = _Group(processes, backend)
                group.waits()
            client.send(group.perform(model))
        if group is not None:
            group.finish()
    finally:
        if group is not None:
            group.end()


class _Failed(NamedTuple):
    """How a process failed. Of several, the least counts: one that was killed, then the first that raised; the others only missed it."""

    alive: bool
    at_s: float
    what: str


class _Group:
    """Processes that run the script, each at the other end of a link."""

    def __init__(self, processes: int, backend: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hanse-", ignore_cleanup_errors=True)
        self._links: list[MemoryLink] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._said: list[int] = [0] * processes  # bytes of each one's output that have been printed
        self._waiting: set[int] = set()
        self._ended: set[int] = set()
        self._answer: bytes | None = None
        seed = _seed()
        about = {"parent": os.getpid(), "rendezvous": f"{self._folder.name}/rendezvous", "backend": backend, "seed": seed}
        threads = max(1, torch.get_num_threads() // processes)
        try:
            for rank in range(processes):
                here, there = MemoryLink.pair()
                self._links.append(here)
                begin = {**about, "descriptor": there.socket.fileno(), "threads": threads, "site": client.system_info()}
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                named = {name: str(value) for name, value in places.items()} | {_BEGIN: json.dumps(begin), "PYTHONUNBUFFERED": "1"}
                loopback = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
                try:
                    with self._output(rank).open("wb") as output:
                        process = subprocess.Popen(
                            [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]],
                            env={**os.environ, **thread_settings(threads), **loopback, **named},
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=output,
                            pass_fds=[there.socket.fileno()],
                        )
                finally:
                    there.close()
                self._processes.append(process)
        except BaseException:
            self.end()
            raise

    def waits(self) -> bool:
        """Wait until each process asks for a task: True; or all have come to their end: False. Raises SiteFailed for anything else."""
        while len(self._waiting) + len(self._ended) < len(self._processes):
            self._turn()
        if self._ended and self._waiting:
            self._fail(f"process {min(self._ended)} has ended, and process {min(self._waiting)} asks for another task")
        return not self._ended

    def perform(self, model: FLModel) -> FLModel:
        """Rank 0's answer to the task at hand, which all are given."""
        if self._ended:
            self._fail("the script ended without asking for a task")
        torches = _has_tensors(model.params)
        fields = {"name": client.get_task_name(), "config": client.get_config(), "seed": _seed(), "torch": torches}
        params = {"params": to_arrays(model.params), "state": client.get_state()}
        body = SharedBody(encode(replace(model, params=params), fields))
        try:
            self._waiting.clear()
            for link in self._links:
                with contextlib.suppress(LinkBroken):  # which `_turn` finds out
                    link.send_shared(b"{}", body)
            while self._answer is None:
                self._turn()
                if self._answer is None and 0 in self._waiting | self._ended:
                    what = "ended" if 0 in self._ended else "asked for the next task"
                    self._fail(f"process 0 {what} without an answer to {client.get_task_name()!r}")
        finally:
            body.close()
        answer, _ = decode(self._answer)
        self._answer = None
        state = client.get_state()
        state.clear()
        state.update(answer.params["state"])
        return replace(answer, params=answer.params["params"])

    def finish(self) -> None:
        """The job is over: let each run to its end."""
        if self.waits():
            for link in self._links:
                with contextlib.suppress(LinkBroken):
                    link.send(b"{}")
            self._waiting.clear()
            while len(self._ended) < len(self._processes):
                self._turn()

    def end(self) -> None:
        """Kill those that live."""
        for process in self._processes:
            process.kill()
        for rank, process in enumerate(self._processes):
            process.wait()
            self._print(rank)
        for link in self._links:
            link.close()
        self._folder.cleanup()
        self._processes, self._links = [], []

    def _turn(self) -> None:
        """Wait a little for what they say, and take it in. Raises SiteFailed if one has failed."""
        poll = select.poll()
        for rank in set(range(len(self._links))) - self._ended:
            poll.register(self._links[rank].socket, select.POLLIN)
        poll.poll(_LOOK_EVERY_MS)
        failed: list[_Failed] = []
        for rank in range(len(self._links)):
            self._look(rank, failed)
        if failed:  # which takes others with it: the one that began it has said so by now
            for rank in range(len(self._links)):
                self._look(rank, failed)
        for rank in range(len(self._processes)):
            self._print(rank)
        if failed:
            self._fail(min(failed).what)

    def _look(self, rank: int, failed: list[_Failed]) -> None:
        """Take in what a process has said, and how it ended."""
        if rank in self._ended:
            return
        try:
            for received in self._links[rank].receive_ready():
                self._take(rank, received, failed)
        except LinkBroken:
            self._ended.add(rank)
            try:
                status = self._processes[rank].wait(_END_WITHIN_S)
            except subprocess.TimeoutExpired:
                status = -signal.SIGKILL
            if status < 0:
                failed.append(_Failed(False, 0.0, f"process {rank} was killed by {signal.Signals(-status).name}"))
            elif status > 0:
                failed.append(_Failed(True, time.monotonic(), f"process {rank} ended with status {status}"))

    def _take(self, rank: int, received: Received, failed: list[_Failed]) -> None:
        said = json.loads(received.message)
        if said["kind"] == "waits":
            self._waiting.add(rank)
        elif said["kind"] == "failed":
            failed.append(_Failed(True, said["at_s"], f"process {rank} raised {said['what']}"))
        elif said["kind"] == "record":
            client.log(said["key"], said["value"], _DATA_TYPES[said["type"]], global_step=said["step"])
        else:
            assert received.body is not None
            self._answer = bytes(received.body.buffer)
            received.body.release()

    def _fail(self, what: str) -> NoReturn:
        hint = "The site's log has what it printed; the site's other processes were ended."
        raise SiteFailed(f"of {len(self._processes)} processes, {what}.", hint=hint)

    def _output(self, rank: int) -> Path:
        return Path(self._folder.name, f"{rank}.log")

    def _print(self, rank: int) -> None:
        """Print the whole lines that a process has written since the last time, or all if it has ended."""
        with self._output(rank).open("rb") as file:
            file.seek(self._said[rank])
            new = file.read()
        if self._processes[rank].returncode is None:
            new = new[: new.rfind(b"\n") + 1]
        self._said[rank] += len(new)
        for line in new.decode(errors="replace").splitlines():
            print(f"[{rank}] {line}" if rank else line, flush=True)


def _seed() -> int:
    """Drawn from the generator that is seeded anew for each task: the same when the task is run again."""
    return int(np.random.randint(1 << 31))


def _has_tensors(params: Any) -> bool:
    found: list[bool] = []
    map_leaves(lambda leaf: found.append(adapter_for(leaf) is not None), params)
    return any(found)


# A process of the group.


def _take_part(main: Callable[[], object], begin: Mapping[str, Any]) -> NoReturn:
    """Be one of the group's processes: run the script's function, and end."""
    die_with_parent()
    if os.getppid() != begin["parent"]:
        os._exit(1)
    link = MemoryLink(socket.socket(fileno=begin["descriptor"]))
    link.socket.set_inheritable(False)
    status = 1
    try:
        rank, site = int(os.environ["RANK"]), begin["site"]
        torch.set_num_threads(begin["threads"])
        if begin["backend"] == "nccl":
            torch.cuda.set_device(rank)
        distributed.init_process_group(
            begin["backend"], init_method=f"file://{begin['rendezvous']}", rank=rank, world_size=int(os.environ["WORLD_SIZE"])
        )
        enter(_RankSession(link, rank, SiteInfo(site["site_name"], site["rank"], site["count"], site["job_id"], begin["seed"])))
        seed_all(seed_for(begin["seed"], rank))
        main()
        distributed.destroy_process_group()
        status = 0
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            status = 0
        else:
            failed = {"kind": "failed", "what": traceback.format_exception_only(error)[-1].strip(), "at_s": time.monotonic()}
            traceback.print_exc()
            with contextlib.suppress(LinkBroken):
                link.send(json.dumps(failed).encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # whatever threads there are: a collective that waits for a process which is gone


class _RankSession(TaskAtHand):
    """See `hanse.client.session.Session`. A task comes to every process; what goes back is rank 0's."""

    def __init__(self, link: MemoryLink, rank: int, info: SiteInfo) -> None:
        self.info = info
        self.task_name = ""
        self.state: dict[str, Any] = {}
        self._link = link
        self._rank = rank
        self._over = False

    def is_running(self) -> bool:
        self._model, self._received = None, False
        if self._over:
            return False
        self._say(kind="waits")
        shared = self._link.receive().shared
        if shared is None:
            self._over = True
            return False
        try:
            model, fields = decode(map_shared(shared), writable=True)
        finally:
            os.close(shared[0])
        task: Any = fields
        self.state.clear()
        self.state.update(model.params["state"])
        self._model = replace(model, params=from_arrays(model.params["params"], "torch" if task["torch"] else None))
        self.task_name, self.info = task["name"], replace(self.info, config=task["config"])
        seed_all(seed_for(task["seed"], self._rank))
        return True

    def send(self, model: FLModel) -> None:
        self._answered()
        if self._rank == 0:
            params = {"params": to_arrays(model.params), "state": to_arrays(self.state)}
            self._link.send(json.dumps({"kind": "answer"}).encode(), encode(replace(model, params=params)))

    def record(self, record: Record) -> None:
        if self._rank == 0:
            self._say(kind="record", key=record.key, value=record.value, step=record.step, type=record.kind)

    def _say(self, **message: Any) -> None:
        self._link.send(json.dumps(message).encode())
