from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.errors import ConfigError
from hanse.identity.kit import CREDENTIALS, write_kit
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task
from hanse.messages.wire import Hello, OfferReply
from hanse.sandbox import Sandbox, environment, interpreter_paths

OneSite = Any  # of conftest.py

ESCAPES = """
import os, socket
from pathlib import Path
from hanse import App, FLModel

app = App()

def tried(attempt):
    try:
        return str(attempt())
    except OSError as error:
        return type(error).__name__

def connect(port):
    with socket.create_connection(("127.0.0.1", port), 5):
        return "connected"

@app.train
def train(model, site):
    kit, about = Path(site.config["kit"]), {}
    about["key"] = tried(lambda: (kit / "credentials" / "key.pem").read_text())
    about["other_job"] = tried(lambda: (kit / "state" / "jobs" / "other" / "secret").read_text())
    about["audit"] = tried(lambda: (kit / "state" / "audit.jsonl").read_text())
    about["network"] = tried(lambda: connect(site.config["port"]))
    about["above"] = tried(lambda: Path("../escaped").write_text("x"))
    about["outside"] = tried(lambda: (kit / "escaped").write_text("x") and None)
    about["job"] = tried(lambda: (Path(__file__).parent / "escaped").write_text("x"))
    about["data"] = tried(lambda: Path(site.config["data"]).read_text())
    about["change_data"] = tried(lambda: Path(site.config["data"]).write_text("x"))
    about["work"] = tried(lambda: Path("mine").write_text("x"))
    about["environment"] = ",".join(sorted(os.environ))
    about["processes"] = str(len([name for name in os.listdir("/proc") if name.isdigit()]))
    about["system"] = tried(lambda: Path("/usr/escaped").write_text("x"))
    about["home"] = tried(lambda: Path("/root/.ssh").exists())
    return FLModel(metrics={}, meta={"examples": 1, **about})
"""
TASK = Task("train", FLModel({"w": np.zeros(3, "f4")}))


@pytest.mark.usefixtures("sandboxed")
async def test_training_code_cannot_get_out(
    one_site: OneSite, job_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import msgspec

    monkeypatch.setenv("AGENTS_SECRET", "of the agent alone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the agent alone")
    data = tmp_path / "data" / "rows.csv"
    data.parent.mkdir()
    data.write_text("1,2,3")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = {"kit": str(one_site.kit.folder), "port": listener.getsockname()[1], "data": str(data)}
        write_kit(one_site.kit.folder, msgspec.structs.replace(one_site.kit, config=config, data=[str(data.parent)]))
        secret = one_site.kit.state_folder / "jobs" / "other" / "secret"
        secret.parent.mkdir(parents=True)
        secret.write_text("another job's")
        one_site.policy("sandbox: required\nmeta: {allow: ['*']}\n")
        await one_site.start()
        await one_site.take(job_folder(ESCAPES))
        one_site.server.assign((0, 0), TASK)
        update = await one_site.server.update((0, 0))
        assert update.failure is None, update.failure
        found = update.model.meta
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert found["key"] == found["other_job"] == found["audit"] == "FileNotFoundError"
    assert (one_site.kit.folder / CREDENTIALS / "key.pem").exists()
    assert found["network"] == "ConnectionRefusedError"  # its own loopback, where nobody listens
    assert found["job"] == found["change_data"] == found["system"] == "OSError"  # read-only
    assert found["data"] == "1,2,3"
    assert found["work"] == "1"
    assert (one_site.kit.state_folder / "jobs" / "j1" / "work" / "mine").read_text() == "x"
    assert found["home"] in ("False", "PermissionError")
    assert "SECRET" not in found["environment"]
    assert int(found["processes"]) <= 3  # bubblewrap's own, and this one
    assert not list(one_site.folder.rglob("escaped"))  # where it seemed to work, it wrote into what nobody else sees
    assert data.read_text() == "1,2,3"


async def test_without_a_sandbox_the_environment_is_still_clean(
    one_site: OneSite, job_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTS_SECRET", "of the agent alone")
    one_site.policy("sandbox: 'off'\nmeta: {allow: ['*']}\n")
    await one_site.start()
    await one_site.take(
        job_folder(
            ESCAPES[: ESCAPES.index("    kit, about")]
            + "    return FLModel(meta={'environment': ','.join(sorted(os.environ)), 'descriptors': len(os.listdir('/proc/self/fd'))})\n"
        )
    )
    one_site.server.assign((0, 0), TASK)
    found = (await one_site.server.update((0, 0))).model.meta
    assert "SECRET" not in found["environment"]
    assert found["descriptors"] <= 8


@pytest.mark.parametrize(("setting", "refused"), [("required", True), ("preferred", False)])
async def test_where_bubblewrap_does_not_work(
    one_site: OneSite, job_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, refused: bool
) -> None:
    broken = tmp_path / "bin" / "bwrap"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'no user namespaces here' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:/usr/bin:/bin")
    one_site.policy(f"sandbox: {setting}\n")
    await one_site.start()
    await one_site.server.expect(Hello)
    one_site.server.send(
        one_site.offer(job_folder("from hanse import App\napp = App()\n\n@app.train\ndef train(model, site):\n    return model\n"))
    )
    reply = await one_site.server.expect(OfferReply)
    (line,) = [line for line in one_site.audit() if line["kind"] == "no sandbox"]
    assert "no user namespaces here" in line["why"]
    if refused:
        assert reply.refusal is not None
        assert "[sandbox]" in reply.refusal.message
        return
    assert reply.refusal is None
    assert "without a sandbox" in one_site.log()
    one_site.server.assign((0, 0), TASK)
    assert (await one_site.server.update((0, 0))).failure is None


@pytest.mark.usefixtures("sandboxed")
def test_what_is_hidden_is_empty_even_below_what_can_be_read(tmp_path: Path) -> None:
    hidden, job, work = tmp_path / "data" / "kit", tmp_path / "data" / "kit" / "jobs" / "job", tmp_path / "data" / "kit" / "jobs" / "work"
    for folder in (job, work):
        folder.mkdir(parents=True)
    (hidden / "key").touch()
    (tmp_path / "data" / "rows").touch()
    sandbox = Sandbox(readable=[tmp_path / "data"], hidden=[hidden])
    code = f"import os; print(sorted(os.listdir({str(tmp_path / 'data')!r})), os.listdir({str(hidden)!r}), os.getcwd())"
    done = subprocess.run(sandbox.command(["-c", code], job=job, work=work), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"['kit', 'rows'] ['jobs'] {work}"


def test_an_interpreter_without_hanse_is_named() -> None:
    with pytest.raises(ConfigError, match="/usr/bin/false cannot run training code"):
        interpreter_paths("/usr/bin/false")
    problem = Sandbox(python="/usr/bin/false").problem()
    assert problem is not None
    assert "cannot run training code" in problem or "bubblewrap is not installed" in problem


def test_the_environment_has_nothing_of_the_agents_but_where_programs_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/some/bin")
    monkeypatch.setenv("TOKEN", "secret")
    found = environment(tmp_path)
    assert found["PATH"] == "/some/bin"
    assert found["HOME"] == found["TMPDIR"] == str(tmp_path)
    assert "TOKEN" not in found


KEEPS = """
from pathlib import Path
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    about = {}
    for name, path in site.config["paths"].items():
        try:
            with Path(path).open("a") as file:
                file.write("x")
            about[name] = "written"
        except OSError as error:
            about[name] = type(error).__name__
    return FLModel(meta={"examples": 1, **about})
"""


@pytest.mark.usefixtures("sandboxed")
async def test_a_folder_that_is_kept_can_be_written_and_stays(one_site: OneSite, job_folder: Callable[..., Path], tmp_path: Path) -> None:
    import msgspec

    kept, beside = tmp_path / "project", tmp_path / "beside"
    beside.mkdir()
    paths = {"kept": kept / "file", "beside": beside / "file", "own": one_site.kit.folder / "mine" / "file"}
    config = {"paths": {name: str(path) for name, path in paths.items()}}
    write_kit(one_site.kit.folder, msgspec.structs.replace(one_site.kit, config=config, keep=["../project", "mine"]))
    one_site.policy("sandbox: required\nmeta: {allow: ['*']}\n")
    await one_site.start()
    await one_site.take(job_folder(KEEPS))
    for number in range(2):
        one_site.server.assign((number, 0), TASK)
        found = (await one_site.server.update((number, 0))).model.meta
        assert (found["kept"], found["beside"], found["own"]) == ("written", "FileNotFoundError", "written")
    one_site.end()
    one_site.agents[0].terminate()
    await one_site.agents[0].wait()
    assert paths["kept"].read_text() == paths["own"].read_text() == "xx"
    assert not paths["beside"].exists()
