"""The server as a process of its own, from its kit: what a signal and `kill -9` do to it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hanse.errors import ConfigError
from hanse.identity.authority import Authority, new_key, request
from hanse.identity.certificates import Credentials, Identity, Role, addresses_of
from hanse.identity.kit import AUTHORITY, CREDENTIALS, Kit, read_kit, write_kit
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.messages.wire import Assignment, Received, TaskRef
from hanse.server.main import fresh, serve_kit, settings_of
from hanse.server.run import Run
from hanse.server.service import Settings

if TYPE_CHECKING:
    from tests.server.conftest import RealFederation, SmallSite

SERVER = """
import asyncio, sys
from pathlib import Path
from hanse.identity.kit import read_kit
from hanse.server.main import serve_kit

asyncio.run(serve_kit(read_kit(Path(sys.argv[1])), ready=lambda address: print(address, flush=True)))
"""
APP = """
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    w = model.params["w"] + site.rng.normal(size=3)
    return FLModel({"w": w.astype("f4")}, metrics={"loss": float(w[0])}, meta={"examples": 10 + site.rank})
"""


@pytest.fixture
def kit(identities: Any, tmp_path: Path) -> Kit:
    """The server's, in a folder."""
    folder = tmp_path / "server"
    kit = Kit(
        federation="test",
        role=Role.SERVER,
        name="server",
        organisation="lab",
        server="localhost:8443",
        listen="localhost:0",
        sandbox="preferred",
    )
    write_kit(folder, kit)
    identities.of(Role.SERVER, "server").save(folder / CREDENTIALS)
    identities.authority.save(folder / AUTHORITY)
    return read_kit(folder)


async def started(kit: Kit, port: int = 0) -> tuple[asyncio.subprocess.Process, int]:
    """The process, and the port it listens at."""
    kit.listen = f"localhost:{port}"
    write_kit(kit.folder, kit)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(kit.folder), stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(30):
        line = await process.stdout.readline()
    return process, int(line.decode().rpartition(":")[2])


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
async def test_a_server_that_died_in_a_round_goes_on_with_what_it_had(
    kit: Kit, identities: Any, tmp_path: Path, load: Any, kind: signal.Signals
) -> None:
    from tests.server.conftest import RealFederation

    recipe = FedAvgRecipe(name="count", model={"w": np.zeros(3, "f4")}, app=load(APP).app, rounds=4)
    go = asyncio.Event()

    async def wait(site: SmallSite, assignment: Assignment) -> bool:
        if assignment.task.commit == 2:
            await go.wait()
        return True

    process, port = await started(kit)
    federation = RealFederation(identities, Settings(state=kit.state_folder, address=""), tmp_path, port=port)
    try:
        quick, slow = await federation.site("a", recipe), await federation.site("b", recipe, hook=wait)
        job = (await federation.submit(recipe))["job"]
        third = TaskRef(2, 0)
        await quick.until(lambda: Received(job=job, task=third) in quick.heard)
        await slow.until(lambda: any(isinstance(m, Assignment) and m.task == third for m in slow.heard))
        (workflow,) = psutil.Process(process.pid).children()
        process.send_signal(kind)
        async with asyncio.timeout(30):
            assert await process.wait() == (-kind if kind == signal.SIGKILL else 0)
        psutil.wait_procs([workflow], timeout=30)
        assert not workflow.is_running()  # it dies with its server
        process, again = await started(kit, port)
        assert again == port
        go.set()
        for site in (quick, slow):
            await federation.disconnect(site)
            await federation.site(site.name, recipe, again=site)
        assert (await federation.finished(job))["status"] == "completed"
        assert quick.performed == slow.performed == [TaskRef(commit, 0) for commit in range(4)]
        undisturbed = (await federation.submit(recipe))["job"]
        assert (await federation.finished(undisturbed))["status"] == "completed"
        first, second = (Run(kit.state_folder / "jobs" / each).get_result().params["w"] for each in (job, undisturbed))
        np.testing.assert_array_equal(first, second)
    finally:
        await ended(federation, process)


async def ended(federation: RealFederation, process: asyncio.subprocess.Process) -> None:
    """Let go of the server and what is connected to it."""
    for task in federation.tasks:
        task.cancel()
    for client in federation.clients:
        await client.close()
    if process.returncode is None:
        process.kill()
        await process.wait()


async def test_a_jobs_values_are_in_tensorboard_while_it_runs(kit: Kit, identities: Any, tmp_path: Path, load: Any, board: Any) -> None:
    """Also when the server is killed meanwhile, and when what writes them is."""
    from tests.server.conftest import RealFederation

    recipe = FedAvgRecipe(name="count", model={"w": np.zeros(3, "f4")}, app=load(APP).app, rounds=4)
    shown = kit.state_folder / "tracking" / "count-0001" / "tensorboard" / "global"
    killed: list[int] = []

    async def look(site: SmallSite, assignment: Assignment) -> bool:
        """The round before this one is there, while this one goes on. One site kills, and comes again."""
        commit = assignment.task.commit
        while ("loss", commit - 1) not in board(shown, killed=True) and commit:
            await asyncio.sleep(0.05)
        if commit in (2, 3) and commit not in killed and site.name == "a":
            killed.append(commit)
            (tracker,) = (each for each in psutil.Process(process.pid).children() if "hanse.server.track" in each.cmdline())
            (tracker if commit == 2 else process).kill()
        return True

    kit.track = "tensorboard"
    process, port = await started(kit)
    federation = RealFederation(identities, Settings(state=kit.state_folder, address=""), tmp_path, port=port)
    try:
        sites = [await federation.site(name, recipe, hook=look) for name in "ab"]
        job = (await federation.submit(recipe))["job"]
        async with asyncio.timeout(60):
            assert await process.wait() == -signal.SIGKILL
        assert killed == [2, 3]
        process, _ = await started(kit, port)
        for site in sites:
            await federation.disconnect(site)
            await federation.site(site.name, recipe, again=site)
        assert (await federation.finished(job))["status"] == "completed"
        run = Run(kit.state_folder / "jobs" / job)
        async with asyncio.timeout(60):
            while len(board(shown, killed=True)) < 4:
                await asyncio.sleep(0.05)
        assert board(shown, killed=True) == {("loss", n): np.float32(metrics["loss"]) for n, metrics in enumerate(run.metrics)}
        assert len(board(shown.parent / "sites" / "b", killed=True)) == 4
        assert not list(run.folder.glob("*tensorboard*"))  # the job's own code can write there
    finally:
        await ended(federation, process)


async def test_prometheus_reads_the_servers_figures(kit: Kit, identities: Any, tmp_path: Path, load: Any) -> None:
    from tests.server.conftest import RealFederation

    with socket.create_server(("127.0.0.1", 0)) as free:
        kit.metrics = f"127.0.0.1:{free.getsockname()[1]}"
    process, port = await started(kit)
    federation = RealFederation(identities, Settings(state=kit.state_folder, address=""), tmp_path, port=port)

    def figures() -> dict[str, float]:
        with urllib.request.urlopen(f"http://{kit.metrics}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {" ".join([each.name, *each.labels.values()]): each.value for family in families for each in family.samples}

    try:
        assert (await asyncio.to_thread(figures))["hanse_sites_connected"] == 0
        recipe = FedAvgRecipe(name="count", model={"w": np.zeros(3, "f4")}, app=load(APP).app, rounds=2)
        for name in ("a", "b"):
            await federation.site(name, recipe)
        job = (await federation.submit(recipe))["job"]
        await federation.finished(job)
        found = await asyncio.to_thread(figures)
        assert found["hanse_sites_connected"] == 2
        assert found["hanse_jobs_ended_total completed"] == 1
        assert found["hanse_updates_total accepted"] == 4
        assert found["hanse_update_bytes_total accepted"] > 4 * 12
        assert found["hanse_jobs running"] == 0
        assert found["process_resident_memory_bytes"] > 1 << 20
    finally:
        for task in federation.tasks:
            task.cancel()
        for client in federation.clients:
            await client.close()
        process.terminate()
        await process.wait()


async def test_a_kit_that_is_no_servers_is_refused(kit: Kit) -> None:
    kit.role = Role.SITE
    with pytest.raises(ConfigError, match="the kit of a site"):
        await serve_kit(kit)


def test_the_settings_follow_the_kit(kit: Kit) -> None:
    kit.sandbox = "required"
    assert settings_of(kit) == Settings(
        state=kit.folder / "state", address="localhost:8443", certificate_days=kit.certificate_days, hidden=[kit.folder]
    )
    kit.sandbox, kit.absence_s, kit.max_running = "preferred", 5, 2
    assert (settings_of(kit).sandbox, settings_of(kit).absence_s, settings_of(kit).max_running) == ("preferred", 5, 2)
    kit.blobs, kit.database, kit.state = "blobs", "postgresql://x/y", "elsewhere"
    assert settings_of(kit).blobs == str(kit.folder / "blobs")
    assert settings_of(kit).database == "postgresql://x/y"
    assert settings_of(kit).state == kit.folder / "elsewhere"
    kit.blobs = "s3://bucket/x"
    assert settings_of(kit).blobs == "s3://bucket/x"


def test_the_servers_certificate_is_renewed_when_two_thirds_are_over(kit: Kit, identities: Any) -> None:
    assert fresh(kit) == kit.credentials()
    root: Authority = identities.root
    key = new_key()
    who = Identity("test", Role.SERVER, "server", "lab")
    nearly_over = identities.authority.issue(
        who, request(key), days=1 / 24 / 60, addresses=["localhost", "127.0.0.1"]
    )  # began 10 minutes ago
    Credentials(key, nearly_over, root.roots).save(kit.folder / CREDENTIALS)
    renewed = fresh(kit)
    assert renewed == kit.credentials()
    assert renewed.identity == who
    assert renewed.key != key
    assert addresses_of(renewed.certificate) == ("localhost", "127.0.0.1")
    assert renewed.expires > datetime.now(UTC) + timedelta(days=20)
    assert os.stat(kit.folder / CREDENTIALS / "key.pem").st_mode & 0o777 == 0o600


async def test_a_second_server_on_the_same_folder_is_refused(kit: Kit) -> None:
    process, _ = await started(kit)
    try:
        with pytest.raises(ConfigError, match="another server is running on"):
            await serve_kit(read_kit(kit.folder))
    finally:
        process.kill()
        await process.wait()
