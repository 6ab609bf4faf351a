"""How an exception of training code is told to the server: one sentence with the line it came from, and the whole traceback as a log."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

from hanse.errors import Failure, HanseError
from hanse.messages.update import Record

_LIBRARIES = [str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))]
_NOT_THE_USERS = (*(folder + os.sep for folder in _LIBRARIES), "<")

_READ_ONLY_HINT = "The received parameters are shared by the sites of a process: change a copy, as in w = model.params['w'].copy()."


def failure_of(error: BaseException) -> tuple[Failure, Record]:
    """The failure to send for an exception that training code raised, and its traceback."""
    failure = Failure.of(error)
    message, hint = failure.message, failure.hint
    if isinstance(error, SystemExit):
        message, hint = f"the code exited with status {error.code}.", "What it printed before that is in the site's log."
    elif isinstance(error, ValueError) and "read-only" in message:
        hint = _READ_ONLY_HINT
    if where := _where(error):
        message = f"{where}: {message}"
    text = "".join(traceback.format_exception(error))
    return Failure(failure.code, message, hint), Record("traceback", text, kind="log")


def _where(error: BaseException) -> str:
    """File and line of the user's own code that `error`, or what it was raised from, went through last; empty if there is none."""
    if isinstance(error, HanseError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THE_USERS)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
