from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest

from hanse.errors import ConfigError
from hanse.figures import Figure, published


def test_figures_stand_at_the_address_meanwhile() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    jobs = {"running": 2.0}
    figures = [Figure("hanse_jobs", "Jobs.", jobs, "status"), Figure("hanse_tasks_total", "Tasks.", 3, counter=True)]
    with published(address, lambda: figures):
        jobs["running"] = 1.0
        text = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    assert 'hanse_jobs{status="running"} 1.0' in text
    assert "# TYPE hanse_tasks_total counter" in text
    assert "hanse_tasks_total 3.0" in text
    assert "process_open_fds" in text
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{address}/metrics")


def test_an_address_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=address), published(address, list):
            pass


def test_without_an_address_nothing_is_imported_or_opened() -> None:
    with published(None, lambda: pytest.fail("nobody asked")):
        pass
