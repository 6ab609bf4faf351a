"""One process of a federation on this machine: `python -m hanse.environments.member server|site KIT PARENT`.

It loads all it needs, waits for one line on standard input, joins if it is a site without a kit, and prints one line once it is ready. It
dies with its parent, whose process id is PARENT.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from hanse.errors import HanseError
from hanse.identity.kit import KIT, read_kit
from hanse.process import die_with_parent

TOKEN = "join.token"


def main(role: str, folder: Path, parent: int) -> int:
    """The exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    os.environ.pop("GRPC_VERBOSITY", None)  # gRPC alone sees peers of another authority: its log says which handshakes failed, and why
    die_with(parent)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_serve(folder) if role == "server" else _train(folder))
    except HanseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def die_with(parent: int) -> None:
    """See to it that this process is killed when its parent dies."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)


def ready(address: str = "") -> None:
    """Tell the parent, who reads one line."""
    print(f"ready on {address}" if address else "ready", flush=True)
    os.dup2(2, 1)


async def _serve(folder: Path) -> None:
    from hanse.server.main import serve_kit

    _wait_for_the_word()
    await serve_kit(read_kit(folder), ready=ready)


async def _train(folder: Path) -> None:
    from hanse.site.agent import run_agent
    from hanse.site.joining import join

    _wait_for_the_word()
    if not (folder / KIT).is_file():
        await join((folder / TOKEN).read_text(), folder)
    await run_agent(read_kit(folder), ready=ready)


def _wait_for_the_word() -> None:
    if not sys.stdin.readline():
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
