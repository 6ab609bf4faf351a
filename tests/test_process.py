from __future__ import annotations

import subprocess
import sys

from hanse.process import tune_memory

CHILD = "from hanse.process import die_with_parent; die_with_parent(); print('ready', flush=True); import signal; signal.pause()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_a_process_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.read() == ""  # the child holds the other end: this returns when it is gone


def test_memory_can_be_tuned_in_part() -> None:
    code = "from hanse.process import tune_memory; tune_memory(); tune_memory(arenas=1, keep_bytes=-1); print(len(bytearray(1 << 26)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{1 << 26}\n"
    tune_memory()
