"""What every test may ask for: real data sets, which a bare checkout does not have, and a job's parts put together for real."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import psutil
import pytest

# Each worker of pytest has a core, as have the processes of a test: numerical libraries with more threads than that wait for each other.
# It has to be said before they are loaded. What depends on the number of threads says it itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hanse.app import App
from hanse.client.script import Script
from hanse.cohort import Cohort
from hanse.filters import Filters
from hanse.server.run_folder import RunFolder
from hanse.simulation.engine import SimulatedSites
from hanse.simulation.roster import NamedSites, NumberedSites
from hanse.simulation.worker import Staff

DATA = Path(os.environ.get("HANSE_DATA") or Path(__file__).parents[2] / "shared" / "data")


# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start: the jobs that they stop by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets: HANSE_DATA, or shared/data beside the checkout."""
    if not DATA.is_dir():
        pytest.skip(f"no data sets at {DATA}; set HANSE_DATA")
    return DATA


# Both depend on every kind of randomness there is, and on what a site keeps between rounds.

APP = """
import random
import numpy as np
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    rounds = site.state["rounds"] = site.state.get("rounds", 0) + 1
    w = model.params["w"] + site.rng.normal(size=3) + np.random.normal(size=3) * rounds + random.random()
    return FLModel({"w": w.astype("f4")}, metrics={"loss": float(w[0]), "rounds": rounds}, meta={"examples": 10 + site.rank})
"""
SCRIPT = """
import random, sys
import numpy as np
import hanse.client as flare

flare.init()
rank, rounds = flare.system_info()["rank"], 0
while flare.is_running():
    model, rounds = flare.receive(), rounds + 1
    w = model.params["w"] + np.random.normal(size=3) * rounds * float(sys.argv[1]) + random.random()
    flare.send(flare.FLModel({"w": w.astype("f4")}, metrics={"loss": float(w[0]), "rounds": rounds}, meta={"steps": rank + 1}))
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Any]:
    """Writes Python code to a file of its own and imports it."""

    def load(code: str) -> Any:
        path = tmp_path / "loaded" / f"module_{len(list(tmp_path.glob('loaded/*.py')))}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
        spec = spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def app(load: Callable[[str], Any]) -> App:
    """Adds noise to "w", three numbers, and counts its rounds."""
    found: App = load(APP).app
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The same as a script. Its argument scales the noise."""
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@dataclass
class Federation:
    """Server and simulated sites of one job, and what was noted in it."""

    cohort: Cohort
    sites: SimulatedSites
    folder: RunFolder
    events: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    def noted(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


Federate = Callable[..., AbstractAsyncContextManager[Federation]]


@pytest.fixture
def federate(tmp_path: Path) -> Federate:
    """Enter it with an app, a training function or a script to have the real sites, cohort and run folder, which a second one resumes."""

    @asynccontextmanager
    async def enter(
        code: App | Script | Callable[..., Any],
        *,
        sites: int | list[str] = 4,
        workers: int = 2,
        seed: int = 0,
        filters: Filters | None = None,
        states: Mapping[str, bytes] | None = None,
        **staff: Any,
    ) -> AsyncIterator[Federation]:
        events: list[dict[str, Any]] = []
        warnings: list[str] = []
        if not isinstance(code, App | Script):
            function, code = code, App()
            code.train(function)
        roster = NumberedSites(sites) if isinstance(sites, int) else NamedSites(sites)
        about = Staff(code=code, roster=roster, job_id="job", seed=seed, filters=filters or Filters(), logs=str(tmp_path / "logs"), **staff)
        folder = RunFolder(tmp_path, {}, listen=events.append, progress=lambda *_: None)
        folder.resume()
        async with SimulatedSites(about, workers=workers, states=states, warn=warnings.append) as simulated:
            folder.states = lambda: simulated.states
            cohort = Cohort(simulated, folder, job_id="job", seed=seed, filters=filters)
            yield Federation(cohort, simulated, folder, events, warnings)

    return enter


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No child process and no descriptor is left behind by the test."""
    process = psutil.Process()
    gc.collect()
    before = process.num_fds()
    yield
    gc.collect()
    assert process.children() == []
    assert process.num_fds() <= before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not DATA.is_dir():
        terminalreporter.write_line(f"no data sets at {DATA}: tests that need them were skipped; set HANSE_DATA to run them", yellow=True)


@pytest.fixture
def board() -> Callable[..., dict[tuple[str, int], float]]:
    """Reads a folder of TensorBoard's as TensorBoard does: each value by its tag and step. A value that is there twice is an error, but for
    what was `killed`: it may have died before it could note that it had handed a value on."""

    def read(folder: Path, *, killed: bool = False) -> dict[tuple[str, int], float]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        if not folder.is_dir():
            return {}
        events.Reload()
        found = [((tag, event.step), event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
        assert len(dict(found)) == len(set(found) if killed else found), found
        return dict(found)

    return read
