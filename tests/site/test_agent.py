from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from numpy.testing import assert_array_equal
from prometheus_client.parser import text_string_to_metric_families

from hanse.app import App
from hanse.client.script import Script
from hanse.client.session import SiteInfo
from hanse.identity.authority import Authority
from hanse.identity.kit import CREDENTIALS, write_kit
from hanse.messages.codec import decode_update, encode_update
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Update
from hanse.messages.wire import Delivery, End, Hello, Left, OfferReply, Output, Received, TaskRef, Withdraw
from hanse.site.ledger import verify
from hanse.site.runner import SiteRunner

OneSite = Any  # of conftest.py

STATEFUL = """
import os, time
import numpy as np
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    w = model.params["w"]
    if w[0] == 666 and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), 9)
    while w[0] == 777:
        time.sleep(0.01)
    if w[0] == 999:
        os._exit(3)
    rounds = site.state["rounds"] = site.state.get("rounds", 0) + 1
    print("round", rounds)
    return FLModel({"w": (w + site.rng.normal(size=w.size) * rounds).astype("f4")}, metrics={"rounds": rounds}, meta={"examples": 1})
"""


def task(value: float, size: int = 3) -> Task:
    return Task("train", FLModel({"w": np.full(size, value, "f4")}))


def same(update: Update, expected: Update) -> None:
    assert update.failure is None, update.failure
    assert update.task_id == expected.task_id
    assert dict(update.model.metrics) == dict(expected.model.metrics)
    assert_array_equal(update.model.params["w"], expected.model.params["w"])


def simulated(code: App | Script, values: list[float], size: int = 3) -> list[Update]:
    """What a simulation's worker gives for one task a commit, with a model of all that value."""
    runner, state = SiteRunner(code, sink=lambda site, line: None), dict[str, Any]()
    updates = []
    for commit, value in enumerate(values):
        update = runner.run(SiteInfo("site-1", job_id="job"), task(value, size), TaskId("job", commit, 0, "site-1"), state)
        updates.append(decode_update(b"".join(encode_update(update))))
    runner.close()
    return updates


async def test_a_whole_job_gives_the_bits_of_the_simulation(
    one_site: OneSite,
    job_folder: Callable[..., Path],
    load: Callable[[str], Any],
    training_processes: Callable[..., list[psutil.Process]],
) -> None:
    await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    expected = simulated(load(STATEFUL).app, [0, 1, 2])
    for number, value in enumerate([0, 1, 2]):
        one_site.server.assign((number, 0), task(value))
        same(await one_site.server.update((number, 0)), expected[number])
    (trainer,) = training_processes(one_site.agents[0])
    one_site.end()
    await asyncio.to_thread(psutil.wait_procs, [trainer], 60)
    job = one_site.kit.state_folder / "jobs" / "j1"
    one_site.agents[0].terminate()
    await one_site.agents[0].wait()
    assert not job.exists()
    kinds = [line["kind"] for line in one_site.audit()]
    assert kinds[:2] == ["start", "offer"]
    assert kinds.count("update") == 3
    assert kinds[-2:] == ["end", "stop"]
    assert verify(one_site.kit.state_folder / "audit.jsonl") == len(kinds)
    assert (one_site.kit.state_folder / "logs" / "j1.log").read_text() == "round 1\nround 2\nround 3\n"


async def test_prometheus_reads_the_sites_figures(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        one_site.kit.metrics = f"127.0.0.1:{free.getsockname()[1]}"
    write_kit(one_site.kit.folder, one_site.kit)
    await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    one_site.server.assign((0, 0), task(1))
    update = await one_site.server.update((0, 0))

    def figures() -> dict[str, float]:
        with urllib.request.urlopen(f"http://{one_site.kit.metrics}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {" ".join([each.name, *each.labels.values()]): each.value for family in families for each in family.samples}

    found = await asyncio.to_thread(figures)
    assert found["hanse_site_connected"] == found["hanse_site_jobs"] == 1
    assert found["hanse_site_audit_lines_total update"] == 1
    assert found["hanse_site_bytes_total update"] == sum(memoryview(part).nbytes for part in encode_update(update))
    assert found["hanse_site_bytes_total task"] > 12


async def test_a_script_goes_on_between_tasks_as_in_the_simulation(
    one_site: OneSite, job_folder: Callable[..., Path], script: Path
) -> None:
    await one_site.start()
    await one_site.take(job_folder(script, argv=["2"]))
    expected = simulated(Script(script, ("2",)), [0, 5])
    for number, value in enumerate([0, 5]):
        one_site.server.assign((number, 0), task(value))
        same(await one_site.server.update((number, 0)), expected[number])


async def test_a_large_model_goes_both_ways_as_a_blob(
    one_site: OneSite, job_folder: Callable[..., Path], load: Callable[[str], Any]
) -> None:
    size = 12_000_000
    agent = await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    expected = simulated(load(STATEFUL).app, [0, 1], size)
    for number, value in enumerate([0, 1]):
        one_site.server.assign((number, 0), task(value, size))
        same(await one_site.server.update((number, 0)), expected[number])
    memory = psutil.Process(agent.pid).memory_info()
    assert memory.rss < 128 << 20
    assert not [path for path in (one_site.kit.state_folder / "jobs/j1/blobs").rglob("*") if len(path.name) == 64]


async def test_a_trainer_that_is_killed_is_started_again(
    one_site: OneSite,
    job_folder: Callable[..., Path],
    load: Callable[[str], Any],
    training_processes: Callable[..., list[psutil.Process]],
) -> None:
    agent = await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    (one_site.folder / "died").touch()
    expected = simulated(load(STATEFUL.replace('"died"', repr(str(one_site.folder / "died")))).app, [0, 666, 2])
    one_site.server.assign((0, 0), task(0))
    same(await one_site.server.update((0, 0)), expected[0])
    one_site.server.assign((1, 0), task(666))  # kills itself while it trains
    same(await one_site.server.update((1, 0)), expected[1])
    (trainer,) = training_processes(agent)
    trainer.kill()  # between two tasks
    await asyncio.to_thread(trainer.wait, 60)
    one_site.server.assign((2, 0), task(2))
    same(await one_site.server.update((2, 0)), expected[2])


async def test_training_code_that_always_dies_is_given_up(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    one_site.server.assign((0, 0), task(999))
    update = await one_site.server.update((0, 0))
    assert update.failure is not None
    assert update.failure.code == "TrainerDied"
    assert "status 3, 3 times" in update.failure.message
    one_site.server.assign((0, 1), task(0))
    assert (await one_site.server.update((0, 1))).failure is None


async def test_an_agent_that_is_killed_goes_on(one_site: OneSite, job_folder: Callable[..., Path], load: Callable[[str], Any]) -> None:
    agent = await one_site.start()
    offer = await one_site.take(job_folder(STATEFUL))
    expected = simulated(load(STATEFUL).app, [0, 1, 2])
    one_site.server.assign((0, 0), task(0))
    same(await one_site.server.update((0, 0)), expected[0])
    one_site.server.assign((1, 0), task(1))
    delivered = await one_site.server.expect(Delivery)  # and not acknowledged
    one_site.server.assign((1, 1), Task("unknown", FLModel()))  # begins when that update is on the disk
    assert (await one_site.server.update((1, 1))).failure is not None
    agent.send_signal(signal.SIGKILL)
    await agent.wait()
    await one_site.start()
    hello = await one_site.server.expect(Hello)
    assert hello.accepted == ["j1"]
    one_site.server.send(offer)
    assert (await one_site.server.expect(OfferReply)).refusal is None
    one_site.server.assign((1, 0), task(1))
    again = await one_site.server.expect(Delivery)
    assert again == delivered  # from the disk: it was not trained again
    one_site.server.send(Received(job="j1", task=TaskRef(1, 0)))
    one_site.server.assign((2, 0), task(2))
    same(await one_site.server.update((2, 0)), expected[2])


async def test_an_agent_killed_while_its_code_trains_does_the_task_again(
    one_site: OneSite,
    job_folder: Callable[..., Path],
    load: Callable[[str], Any],
    training_processes: Callable[..., list[psutil.Process]],
) -> None:
    size = 400_000
    agent = await one_site.start()
    offer = await one_site.take(job_folder(STATEFUL))
    expected = simulated(load(STATEFUL).app, [0, 1], size)
    one_site.server.assign((0, 0), task(0, size))
    same(await one_site.server.update((0, 0)), expected[0])
    one_site.server.assign((1, 0), task(1, size))
    await one_site.server.expect(Delivery)  # a large one: its only copy at the site is the trainer's
    (trainer,) = training_processes(agent)
    agent.send_signal(signal.SIGKILL)
    await agent.wait()
    await asyncio.to_thread(psutil.wait_procs, [trainer], 60)
    assert not trainer.is_running()
    await one_site.start()
    await one_site.server.expect(Hello)
    one_site.server.send(offer)
    one_site.server.assign((1, 0), task(1, size))
    same(await one_site.server.update((1, 0)), expected[1])


async def test_a_cut_loses_nothing_and_a_task_is_done_once(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    await one_site.start()
    offer = await one_site.take(job_folder(STATEFUL))
    one_site.server.assign((0, 0), task(0))
    one_site.server.assign((0, 0), task(0))
    first = await one_site.server.expect(Delivery)
    assert one_site.listening.drop(lambda peer: True) == 1
    assert (await one_site.server.expect(Hello)).accepted == ["j1"]
    one_site.server.send(offer)
    one_site.server.assign((0, 0), task(0))
    assert await one_site.server.expect(Delivery) == first
    one_site.server.send(Received(job="j1", task=TaskRef(0, 0)))
    one_site.server.assign((1, 0), task(0))
    assert (await one_site.server.update((1, 0))).model.metrics["rounds"] == 2  # not 3: it ran once, though assigned three times
    assert [line["index"] for line in one_site.audit() if line["kind"] == "training"] == [0, 0]


async def test_a_jobs_place_among_its_sites_may_change_until_it_starts(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    code = "from hanse import App, FLModel\napp = App()\n\n@app.train\ndef train(model, site):\n"
    code += "    return FLModel(metrics={'rank': site.rank, 'count': site.count, 'own': site.config['own']}, meta={'examples': 1})\n"
    await one_site.start()
    offer = await one_site.take(job_folder(code), site_config={"site-1": {"own": 5}})
    for number, (rank, count) in enumerate([(2, 7), (1, 4)]):
        one_site.server.send(msgspec.structs.replace(offer, rank=rank, sites=count))
        one_site.server.assign((number, 0), task(1))
        update = await one_site.server.update((number, 0))
        assert dict(update.model.metrics) == {"rank": rank, "count": count, "own": 5}


async def test_an_update_waits_for_room_at_the_server(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    one_site.server.full = 2
    await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    one_site.server.assign((0, 0), task(1, 400_000))
    assert (await one_site.server.update((0, 0))).failure is None
    assert one_site.server.full == 0


async def test_a_full_disk_is_waited_out(one_site: OneSite, job_folder: Callable[..., Path], load: Callable[[str], Any]) -> None:
    state, size = one_site.kit.state_folder, 400_000
    state.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(state)], check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes more rights than these")
    try:
        agent = await one_site.start()
        await one_site.take(job_folder(STATEFUL))
        expected = simulated(load(STATEFUL).app, [0, 1], size)
        one_site.server.assign((0, 0), task(0, size))  # 1.6 MB
        log = one_site.folder / "agent-0.log"
        async with asyncio.timeout(60):
            while "waits: " not in log.read_text():
                await asyncio.sleep(0.05)
        assert subprocess.run(["mount", "-o", "remount,size=50m", str(state)], check=False).returncode == 0
        same(await one_site.server.update((0, 0)), expected[0])
        one_site.server.assign((1, 0), task(1, size))
        same(await one_site.server.update((1, 0)), expected[1])
        agent.terminate()
        assert await agent.wait() == 0
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


async def test_an_agent_that_is_told_to_stop_leaves_no_process_and_goes_on_later(
    one_site: OneSite, job_folder: Callable[..., Path], training_processes: Callable[..., list[psutil.Process]]
) -> None:
    agent = await one_site.start()
    offer = await one_site.take(job_folder(STATEFUL))
    one_site.server.assign((0, 0), task(1))
    await one_site.server.update((0, 0))
    (trainer,) = training_processes(agent)
    one_site.server.assign((1, 0), task(777))
    one_site.server.assign((1, 1), task(1))
    one_site.server.send(offer)
    await one_site.server.expect(OfferReply)  # both have arrived
    agent.terminate()
    assert await agent.wait() == 0, one_site.log()
    assert "Traceback" not in one_site.log()
    assert not trainer.is_running()
    await one_site.start()
    assert (await one_site.server.expect(Hello)).accepted == ["j1"]
    one_site.server.assign((1, 1), task(1))
    assert (await one_site.server.update((1, 1))).model.metrics["rounds"] == 2


async def test_a_withdrawn_task_is_stopped(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    one_site.server.assign((0, 0), task(1))
    await one_site.server.update((0, 0))
    one_site.server.assign((1, 0), task(777))  # never ends
    one_site.server.assign((1, 1), task(777))
    one_site.server.send(Withdraw(job="j1", tasks=[TaskRef(1, 1), TaskRef(1, 0)]))
    one_site.server.assign((1, 2), task(1))
    update = await one_site.server.update((1, 2))
    assert update.model.metrics["rounds"] == 2


async def test_a_job_that_is_stopped_ends_at_once(
    one_site: OneSite, job_folder: Callable[..., Path], training_processes: Callable[..., list[psutil.Process]]
) -> None:
    agent = await one_site.start()
    offer = await one_site.take(job_folder(STATEFUL))
    one_site.server.assign((0, 0), task(1))
    await one_site.server.update((0, 0))
    (trainer,) = training_processes(agent)
    one_site.server.assign((1, 0), task(777))
    one_site.end("stopped")
    one_site.server.send(offer)  # it may be resumed
    assert (await one_site.server.expect(OfferReply)).refusal is None
    assert not trainer.is_running()
    one_site.server.assign((1, 0), task(1))
    assert (await one_site.server.update((1, 0))).model.metrics["rounds"] == 1  # of a job that begins anew


@pytest.mark.parametrize(
    ("policy", "clause"),
    [
        ("submitters: {names: [someone-else]}", "submitters.names"),
        ("workflows: [cyclic]", "workflows"),
        ("code: {signers: []}", "code.digests"),
        ("caps: {rounds: 2}", "caps.rounds"),
    ],
)
async def test_a_job_that_the_policy_does_not_allow_is_refused(
    one_site: OneSite, job_folder: Callable[..., Path], policy: str, clause: str
) -> None:
    one_site.policy(f"sandbox: 'off'\n{policy}\n")
    await one_site.start()
    await one_site.server.expect(Hello)
    one_site.server.send(one_site.offer(job_folder(STATEFUL)))
    reply = await one_site.server.expect(OfferReply)
    assert reply.refusal is not None
    assert reply.refusal.code == "PolicyRefused"
    assert f"[{clause}]" in reply.refusal.message
    (line,) = [line for line in one_site.audit() if line["kind"] == "offer"]
    assert line["decision"] == "refused"
    assert clause in line["why"]
    assert "'rita'" in line["submitter"]
    assert not (one_site.kit.state_folder / "jobs" / "j1").exists()


async def test_a_job_with_another_authoritys_signature_is_refused(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    await one_site.start()
    await one_site.server.expect(Hello)
    good = one_site.authority
    one_site.authority = Authority.new_root("test")
    foreign = one_site.signer("rita")
    one_site.authority = good
    one_site.server.send(one_site.offer(job_folder(STATEFUL), signer=foreign))
    reply = await one_site.server.expect(OfferReply)
    assert reply.refusal is not None
    assert reply.refusal.code == "IdentityError"


async def test_a_signed_job_runs_once(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    await one_site.start()
    await one_site.server.expect(Hello)
    offer = one_site.offer(job_folder(STATEFUL))
    one_site.server.send(offer)
    assert (await one_site.server.expect(OfferReply)).refusal is None
    one_site.server.send(End(job=offer.job, status="completed"))
    one_site.server.send(msgspec.structs.replace(offer, job="again"))
    reply = await one_site.server.expect(OfferReply)
    assert reply.refusal is not None
    assert reply.refusal.message == f"job 'again' has the manifest of job {offer.job!r}: a signed job runs once."


async def test_a_job_id_cannot_lead_out_of_the_state_folder(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    await one_site.start()
    await one_site.server.expect(Hello)
    one_site.server.send(msgspec.structs.replace(one_site.offer(job_folder(STATEFUL)), job=".."))
    reply = await one_site.server.expect(OfferReply)
    assert reply.refusal is not None
    assert "no name for a folder" in reply.refusal.message


@pytest.mark.parametrize(
    ("policy", "clause", "leaves"),
    [
        ("tensors: {deny: [w]}", "tensors.deny", False),
        ("metrics: {allow: [loss]}", "metrics.allow", False),
        ("caps: {wall_seconds_per_task: 0.3}", "caps.wall_seconds_per_task", False),
        ("caps: {upload_bytes: 100}", "caps.upload_bytes", True),
        ("caps: {download_bytes: 100}", "caps.download_bytes", True),
    ],
)
async def test_an_update_that_may_not_leave_stays(
    one_site: OneSite, job_folder: Callable[..., Path], policy: str, clause: str, leaves: bool
) -> None:
    one_site.policy(f"sandbox: 'off'\n{policy}\n")
    await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    one_site.server.assign((0, 0), task(777 if "wall" in clause else 1))
    if leaves:
        assert clause in (await one_site.server.expect(Left)).why.message
    update = await one_site.server.update((0, 0))
    assert update.failure is not None
    assert update.failure.code == "PolicyRefused"
    assert f"[{clause}]" in update.failure.message
    assert update.model.params is None
    if leaves:
        one_site.server.assign((0, 1), task(1))
        later = await one_site.server.update((0, 1))
        assert later.failure == update.failure


async def test_cpu_seconds_are_limited(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    one_site.policy("sandbox: 'off'\ncaps: {cpu_seconds: 0.5}\n")
    await one_site.start()
    await one_site.take(job_folder(STATEFUL.replace("time.sleep(0.01)", "pass")))
    one_site.server.assign((0, 0), task(777))
    assert "caps.cpu_seconds" in (await one_site.server.expect(Left)).why.message


async def test_the_sites_filters_are_applied(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    one_site.policy("sandbox: 'off'\nfilters:\n- {kind: clip_norm, max_norm: 0.001}\n")
    await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    for number, size in enumerate((3, 400_000)):
        one_site.server.assign((number, 0), task(1, size))
        update = await one_site.server.update((number, 0))
        assert np.linalg.norm(update.model.params["w"].astype("f8") - 1) == pytest.approx(0.001, rel=1e-2)


async def test_what_the_code_prints_leaves_only_if_the_policy_says_so(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    await one_site.start()
    await one_site.take(job_folder(STATEFUL))
    one_site.server.assign((0, 0), task(1))
    assert (await one_site.server.expect(Output)).lines == ["round 1"]
    await one_site.server.update((0, 0))


async def test_code_that_does_not_import_fails_with_its_line(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    await one_site.start()
    folder = job_folder(STATEFUL)
    (code,) = (folder / "code").glob("*.py")
    code.write_text("import numpy\n\nimport no_such_package\n")
    text = (folder / "job.yaml").read_text()
    (folder / "job.yaml").write_text(text[: text.index("digests:")])
    await one_site.take(folder)
    one_site.server.assign((0, 0), task(1))
    failure = (await one_site.server.update((0, 0))).failure
    assert failure is not None
    assert failure.code == "ModuleNotFoundError"
    assert f"{code.name}:3" in failure.message


async def test_an_expiring_certificate_is_renewed_and_no_work_is_lost(one_site: OneSite, job_folder: Callable[..., Path]) -> None:
    one_site.credentials(days=20 / 86400).save(one_site.kit.folder / CREDENTIALS)  # began 10 minutes ago
    before = (one_site.kit.folder / CREDENTIALS / "certificate.pem").read_bytes()
    await one_site.start()
    assert (await one_site.server.expect(Hello)).accepted == []
    one_site.server.send(one_site.offer(job_folder(STATEFUL)))
    await one_site.server.expect(Hello)
    assert [call.name for call in one_site.server.calls] == ["renew"]
    assert (one_site.kit.folder / CREDENTIALS / "certificate.pem").read_bytes() != before
    assert one_site.server.serials[0] != one_site.server.serials[1]
    one_site.server.send(one_site.offer(job_folder(STATEFUL)))
    one_site.server.assign((0, 0), task(1))
    assert (await one_site.server.update((0, 0))).failure is None
    assert "renewal" in [line["kind"] for line in one_site.audit()]


def test_importing_the_agent_is_light() -> None:
    heavy = ["torch", "sqlalchemy", "hanse.workflows", "hanse.server", "hanse.jobs.recipe"]
    code = f"import sys, hanse.site.agent; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
