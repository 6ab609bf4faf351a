"""Runs what goes on until it is stopped: the server, a site's agent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any


def run_service(service: Coroutine[Any, Any, None]) -> None:
    """Run it to its end, with a log on standard error. Ctrl-C ends it cleanly, as SIGTERM does."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(service)
