"""`serving`: one 28 × 28 image over HTTP, on one connection and on eight, beside the bare torch call.

The server is a process of its own, as `hanse finetune serve --http` starts it. Both score the same network of 60,000 parameters, in turns.
"""

from __future__ import annotations

import http.client
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from claims import Claim, parser, run

from hanse.finetuning.contract import Party, Project, Schema, write_project
from hanse.finetuning.models import load_module, params_of
from hanse.finetuning.versions import Versions

CODE = """
from torch import nn
def build():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 35), nn.ReLU(), nn.Linear(35, 2),
    )
"""
SERVE = "from hanse.cli.finetune.serve import app; app()"


def measure(options: Namespace) -> Iterator[Claim]:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module = _project(folder)
        command = [sys.executable, "-c", SERVE, "serve", "--http", "0", "--project", str(folder)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert server.stdout is not None
        port = int(server.stdout.readline().split(":")[-1].removesuffix("/score\n"))
        try:
            bare: list[float] = []
            one: list[float] = []
            _timed(port, 50)
            for _ in range(options.turns):
                bare += _bare(module, options.count)
                one += _timed(port, options.count)
            began = time.perf_counter()
            many = _together(port, options.count, clients=8)
            rate = len(many) / (time.perf_counter() - began)
        finally:
            server.terminate()
            server.wait()
            server.stdout.close()
    print(f"bare torch {_said(bare)}\n1 connection: {1 / (sum(one) / len(one)):.0f} requests/s, {_said(one)}")
    print(f"8 connections: {rate:.0f} requests/s, {_said(many)}", flush=True)
    for what, seconds in (("1 connection", one), ("8 connections", many)):
        yield Claim(
            what=f"serving: an image over HTTP, {what}", hanse=f"{median(seconds) * 1e3:.2f} ms",
            bare=f"{median(bare) * 1e3:.2f} ms", figure=median(seconds) * 1e3, unit="ms",
        )  # fmt: skip


def _project(folder: Path) -> object:
    """A project with one version that is deployed; its module."""
    (folder / "model.py").write_text(CODE)
    parties = {"vendor": Party(site="maker", organisation="Maker"), "clients": [Party(site="user", organisation="User")]}
    project = Project(name="served", schema=Schema(shape=[28, 28, 1]), **parties)
    write_project(folder, project)
    module = load_module(folder, project.model)
    (folder / "current").write_text(Versions(folder).add(params_of(module), threshold=0.5).digest)
    return module


def _bare(module: object, count: int) -> list[float]:
    import torch

    x = torch.zeros(1, 1, 28, 28)
    seconds = []
    with torch.inference_mode():
        for _ in range(count):
            began = time.perf_counter()
            module(x)  # type: ignore[operator]
            seconds.append(time.perf_counter() - began)
    return seconds


def _timed(port: int, count: int) -> list[float]:
    """Seconds of each of so many requests, one after the other on one connection."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)).save(buffer, "PNG")
    connection, seconds = http.client.HTTPConnection("127.0.0.1", port), []
    connection.connect()
    for _ in range(count):
        began = time.perf_counter()
        connection.request("POST", "/score", buffer.getvalue(), {"content-type": "image/png"})
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        seconds.append(time.perf_counter() - began)
    connection.close()
    return seconds


def _together(port: int, count: int, *, clients: int) -> list[float]:
    seconds: list[float] = []
    threads = [threading.Thread(target=lambda: seconds.extend(_timed(port, count))) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def _said(seconds: list[float]) -> str:
    hundredths = quantiles(seconds, n=100)
    return f"{median(seconds) * 1e3:.2f} ms (p95 {hundredths[94] * 1e3:.2f}, p99 {hundredths[98] * 1e3:.2f})"


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=2)
    options.add_argument("--count", type=int, default=150, help="requests in each turn and on each connection")
    run(measure, options.parse_args())
