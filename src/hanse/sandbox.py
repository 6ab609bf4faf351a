"""A sandbox for a job's code, made by bubblewrap: no network, no keys, nothing of the machine but what computing takes.

A site's training code runs in it, and at the server a job's workflow. Inside there are the system's libraries, the Python that runs the
code, this package and what is readable, such as the site's data folders; the job's files, read-only; and a work folder, the only place to
write besides `/tmp` and what is writable, such as the folders that a site's kit says to keep. Namespaces of its own: network (without even
a connection to this machine), processes, users, IPC. The folders in `hidden`, such as the kit with its keys, are empty in there, even where
they lie below something that is visible.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from hanse.errors import ConfigError

SandboxMode = Literal["required", "preferred", "off"]

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/localtime", "/sys/devices/system")
_LINKER = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d")
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
_PROBE_WITHIN_S = 20.0
_WHERE = "import json, sys; from hanse import errors; print(json.dumps([sys.prefix, sys.base_prefix, *sys.path, errors.__file__]))"


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """What is inside besides the system. python: the interpreter. readable: further files and folders. writable: folders, which must be
    there, whose files stay when the process ends. hidden: what is never visible, whatever it lies in or holds."""

    python: str = sys.executable
    readable: Sequence[Path] = ()
    writable: Sequence[Path] = ()
    hidden: Sequence[Path] = ()
    gpus: bool = False

    def command(self, arguments: Sequence[str], *, job: Path | None = None, work: Path | None = None) -> list[str]:
        """The command line that runs the interpreter with these arguments inside. job: its files; work: where it may write, and starts.

        Raises ConfigError if the interpreter cannot be asked where its files are.
        """
        mounts = {path: ["--ro-bind-try", str(path), str(path)] for path in (*interpreter_paths(self.python), *_absolute(self.readable))}
        mounts |= {path: ["--bind", str(path), str(path)] for path in _absolute(self.writable)}
        mounts |= {path: ["--tmpfs", str(path)] for path in _absolute(self.hidden)}
        if job is not None:
            mounts[job.absolute()] = ["--ro-bind", str(job.absolute()), str(job.absolute())]
        if work is not None:
            mounts[work.absolute()] = ["--bind", str(work.absolute()), str(work.absolute())]
        return [
            "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "job",
            *(word for path in (*_SYSTEM, *_LINKER) for word in ("--ro-bind-try", path, path)),
            "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
            *(word for path in sorted(Path("/dev").glob("nvidia*")) if self.gpus for word in ("--dev-bind", str(path), str(path))),
            *(word for path in sorted(mounts, key=lambda path: len(path.parts)) for word in mounts[path]),  # a folder before what is in it
            *(() if work is None else ("--chdir", str(work.absolute()))),
            "--", self.python, *arguments,
        ]  # fmt: skip

    def problem(self) -> str | None:
        """Why it does not work on this machine; None if it does. Takes the time that Python takes to start."""
        if shutil.which("bwrap") is None:
            return "bubblewrap is not installed: there is no `bwrap` on the PATH"
        try:
            command = self.command(["-P", "-c", "import hanse.errors"])
            done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_PROBE_WITHIN_S, text=True, check=False)
        except (OSError, subprocess.TimeoutExpired, ConfigError) as error:
            return f"bubblewrap cannot be tried: {error}"
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        return None if done.returncode == 0 else f"bubblewrap ended with status {done.returncode}: {said}"


def environment(scratch: Path) -> Mapping[str, str]:
    """All environment variables of a process that runs a job's code: where programs and libraries are, and a home of its own."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    place = {"HOME": str(scratch), "TMPDIR": str(scratch), "USER": "job", "LOGNAME": "job", "PYTHONDONTWRITEBYTECODE": "1"}
    return {"LANG": "C.UTF-8", **passed, **place}


@lru_cache
def interpreter_paths(python: str) -> tuple[Path, ...]:
    """The files and folders that an interpreter imports from, `hanse` among them. Raises ConfigError if it cannot be asked."""
    try:
        done = subprocess.run([python, "-P", "-c", _WHERE], capture_output=True, stdin=subprocess.DEVNULL, text=True, check=True)
        prefix, base, *others, package = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        said = getattr(error, "stderr", "").strip().splitlines()
        raise ConfigError(
            f"{python} cannot run training code: {said[-1] if said else error}.", hint="Install hanse for it, or set `python` in kit.yaml."
        ) from error
    source = Path(package).parent
    # Of a development checkout, the package and not all that lies beside it.
    paths = [Path(prefix), Path(base), source, *(Path(path) for path in others if path and Path(path) != source.parent)]
    if source.parent.name in ("site-packages", "dist-packages"):
        paths.append(source.parent)
    return tuple(dict.fromkeys(path.absolute() for path in paths if path.exists() and path != Path("/")))


def _absolute(paths: Iterable[Path]) -> list[Path]:
    return [path.resolve() for path in paths]


def open_beneath(folder: Path, name: str | Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a plain file below a folder that a job's code can write, whatever that makes of the folder meanwhile.

    name: relative to `folder`. Raises OSError if it, or what is on the way to it, is a link, or if it is a pipe, a device or a socket.
    """
    *way, last = Path(name).parts
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in way:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        found = os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.EINVAL, "no plain file", str(folder / name))
    return found


def files_beneath(folder: Path) -> Iterator[str]:
    """The names of the plain files below a folder that a job's code can write, relative to it; links are passed over."""
    return (os.path.relpath(path, folder) for path, _, mode in _beneath(folder) if stat.S_ISREG(mode))


def remove_links(folder: Path) -> None:
    """Remove whatever below the folder is neither a plain file nor a folder: what a job's code, now ended, may have left there."""
    for path, at, mode in _beneath(folder):
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.basename(path), dir_fd=at)


def _beneath(folder: Path) -> Iterator[tuple[str, int, int]]:
    """All that is below the folder, where no link is followed: its path, a descriptor of the folder that it is in, and its mode."""
    for way, folders, names, at in os.fwalk(folder):
        for name in (*folders, *names):
            with contextlib.suppress(FileNotFoundError):
                yield os.path.join(way, name), at, os.stat(name, dir_fd=at, follow_symlinks=False).st_mode
