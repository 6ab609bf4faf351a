"""A real server, real TLS, real workflow processes; sites are small ones in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from hanse.environments import SimEnv
from hanse.errors import Failure, HanseError, IdentityError, Refused
from hanse.identity.authority import new_key, request
from hanse.identity.certificates import Credentials, Role, identity_of
from hanse.identity.tokens import read_token
from hanse.jobs.archive import pack
from hanse.jobs.fedavg import FedAvgRecipe
from hanse.jobs.recipe import Recipe, WorkflowRecipe
from hanse.messages.codec import encode_update
from hanse.messages.flmodel import FLModel
from hanse.messages.task import TaskId
from hanse.messages.update import Update
from hanse.messages.wire import Assignment, Blob, Delivery, Hello, Output, Payload, Received, Resources, TaskRef, Withdraw
from hanse.sandbox import Sandbox
from hanse.server.run import Run
from hanse.transport.blobs import FolderBlobs
from hanse.transport.grpc import Client

if TYPE_CHECKING:
    from tests.server.conftest import Federates, RealFederation, SmallSite

APP = """
import numpy as np
from hanse import App, FLModel

app = App()

@app.train
def train(model, site):
    rounds = site.state["rounds"] = site.state.get("rounds", 0) + 1
    w = model.params["w"] + site.rng.normal(size=model.params["w"].shape) + rounds + site.config.get("offset", 0)
    return FLModel({"w": w.astype("f4")}, metrics={"loss": float(w[0])}, meta={"examples": 10 + site.rank})
"""
SLY = """
import os
from pathlib import Path

if not os.environ.get("PYTEST_CURRENT_TEST"):
    folder = Path(__file__).resolve().parents[2]
    (folder / "innocent.txt").symlink_to("SECRET")
    (folder / "more").symlink_to("ELSEWHERE")
    os.mkfifo(folder / "pipe")
    (folder / "made").write_text("made")
    (folder / "server.log").unlink()
    (folder / "server.log").symlink_to("AUTHORIZED")
    os._exit(3)
"""
CURIOUS = """
import os, socket
from pathlib import Path

if not os.environ.get("PYTEST_CURRENT_TEST"):
    try:
        socket.create_connection(("127.0.0.1", PORT), timeout=5)
        reached = "reached"
    except OSError:
        reached = "OSError"
    keys = [str(path) for path in Path("KEYS").rglob("*")]
    print("SEEN", keys, sorted(os.listdir("STATE")), os.listdir("STATE/jobs"), reached)
"""
ROUNDS = 4


@pytest.fixture
def recipe(load: Callable[[str], Any]) -> FedAvgRecipe:
    return FedAvgRecipe(name="count", model={"w": np.zeros(3, "f4")}, app=load(APP).app, rounds=ROUNDS)


def simulated(recipe: Recipe, tmp_path: Path, sites: list[str], **about: Any) -> Run:
    # threads=2: workers that are not forked, for gRPC does not survive a fork
    return recipe.execute(SimEnv(sites=sites, runs=tmp_path / "simulated", workers=1, threads=2, console="quiet", **about))


def result_of(federation: RealFederation, job: str) -> Run:
    return Run(federation.settings.state / "jobs" / job)


def assert_same(run: Run, expected: Run) -> None:
    assert run.get_status() == expected.get_status() == "completed"
    np.testing.assert_array_equal(run.get_result().params["w"], expected.get_result().params["w"])
    assert run.metrics == expected.metrics
    steady = lambda events: [{k: v for k, v in e.items() if k not in ("seconds", "time")} for e in events]  # noqa: E731
    assert steady(run.events("round")) == steady(expected.events("round"))


async def test_a_job_has_the_bits_of_its_simulation(real_federation: Federates, recipe: FedAvgRecipe, tmp_path: Path) -> None:
    async with real_federation() as federation:
        sites = [await federation.site(name, recipe) for name in ("b", "a")]
        answer = await federation.submit(recipe, site_config={"b": {"offset": 5}})
        assert answer == {"job": "count-0001", "refusals": {}}
        about = await federation.finished("count-0001")
        assert {name: about[name] for name in ("status", "rounds", "total_rounds", "sites", "submitter", "reason")} == {
            "status": "completed", "rounds": ROUNDS, "total_rounds": ROUNDS, "sites": ["a", "b"], "submitter": "ada", "reason": "",
        }  # fmt: skip
        for site in sites:
            await site.until(lambda site=site: bool(site.ended))  # type: ignore[misc]
            assert site.ended == {"count-0001": "completed"}
            assert not site.unacknowledged
        assert await federation.service.store.update_keys("count-0001") == set()
        expected = simulated(recipe, tmp_path, ["a", "b"], site_config={"b": {"offset": 5}})
        assert_same(result_of(federation, "count-0001"), expected)


async def test_large_models_travel_as_blobs_and_leave_none_behind(
    real_federation: Federates, load: Callable[[str], Any], tmp_path: Path
) -> None:
    recipe = FedAvgRecipe(name="large", model={"w": np.zeros(1 << 18, "f4")}, app=load(APP).app, rounds=3)
    async with real_federation() as federation:
        for name in ("a", "b", "c"):
            await federation.site(name, recipe)
        job = (await federation.submit(recipe))["job"]
        assert (await federation.finished(job))["status"] == "completed"
        assert_same(result_of(federation, job), simulated(recipe, tmp_path, ["a", "b", "c"]))
        kept = {path.name for path in (federation.settings.state / "blobs").glob("??/*")}
        wanted = {blob.hex for blob in await federation.service.store.blobs()}
        assert wanted <= kept
        assert len(kept) == 2  # what was submitted, and what sites get
        assert not (federation.settings.state / "jobs" / job / "tasks").exists()


async def test_the_result_comes_whole_to_whom_it_is_for(real_federation: Federates, recipe: FedAvgRecipe, tmp_path: Path) -> None:
    async with real_federation() as federation:
        await federation.site("a", recipe)
        job = (await federation.submit(recipe))["job"]
        await federation.finished(job)
        ada = federation.client()
        files = (await ada.call("result", job=job))["files"]
        assert {"run.json", "metrics.jsonl", "model.safetensors", "report.html", "job/job.yaml"} <= files.keys()
        blob = _blob(files["model.safetensors"])
        path = await ada.download(blob, FolderBlobs(tmp_path / "fetched"))
        assert path.read_bytes() == (federation.settings.state / "jobs" / job / "model.safetensors").read_bytes()
        eve = federation.client(Role.RESEARCHER, "eve")
        with pytest.raises(Refused, match="ada's"):
            await eve.call("result", job=job)
        with pytest.raises(Refused, match="not for"):
            await eve.download(blob, FolderBlobs(tmp_path / "stolen"))
        assert "files" in await federation.client(Role.PROJECT_ADMIN, "root").call("result", job=job)


async def test_followers_get_what_was_and_what_comes(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    go = asyncio.Event()

    async def wait_in_the_third_round(site: SmallSite, assignment: Assignment) -> bool:
        if assignment.task.commit == 2:
            await go.wait()
        return True

    async with real_federation() as federation:
        site = await federation.site("a", recipe, hook=wait_in_the_third_round)
        job = (await federation.submit(recipe))["job"]
        await site.until(lambda: any(isinstance(m, Assignment) and m.task.commit == 2 for m in site.heard))
        events: list[dict[str, Any]] = []
        async for event in federation.client(Role.AUDITOR, "carl").follow("logs", job=job, follow=True):
            events.append(event)
            if event["event"] == "round" and event["round"] == 1:
                go.set()
        kinds = [event["event"] for event in events]
        assert kinds == ["start", *["update", "round"] * ROUNDS, "end"]
        assert events[-1]["status"] == "completed"
        later = [event async for event in federation.client().follow("logs", job=job)]
        assert later == events
        assert later == [json.loads(line) for line in (result_of(federation, job).folder / "metrics.jsonl").read_text().splitlines()]


async def test_kill_9_of_the_workflow_uses_the_updates_that_are_there(
    real_federation: Federates, recipe: FedAvgRecipe, tmp_path: Path
) -> None:
    async with real_federation() as federation:
        go = asyncio.Event()

        async def wait(site: SmallSite, assignment: Assignment) -> bool:
            if assignment.task.commit == 2:
                await go.wait()
            return True

        quick, slow = await federation.site("a", recipe), await federation.site("b", recipe, hook=wait)
        job = (await federation.submit(recipe))["job"]
        third = TaskRef(2, 0)
        await quick.until(lambda: Received(job=job, task=third) in quick.heard)
        await slow.until(lambda: any(isinstance(m, Assignment) and m.task == third for m in slow.heard))
        running = federation.service._active[job].running
        assert running is not None
        before = running.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        await slow.until(lambda: sum(isinstance(m, Assignment) and m.task == third for m in slow.heard) == 2)  # asked for again
        assert running.pid != before
        go.set()
        assert (await federation.finished(job))["status"] == "completed"
        assert quick.performed == [TaskRef(commit, 0) for commit in range(ROUNDS)]  # none was asked for twice
        assert_same(result_of(federation, job), simulated(recipe, tmp_path, ["a", "b"]))


async def test_a_server_that_is_started_again_goes_on_with_what_it_had(
    real_federation: Federates, recipe: FedAvgRecipe, tmp_path: Path
) -> None:
    async with real_federation() as federation:
        go = asyncio.Event()

        async def wait(site: SmallSite, assignment: Assignment) -> bool:
            if assignment.task.commit == 2:
                await go.wait()
            return True

        quick, slow = await federation.site("a", recipe), await federation.site("b", recipe, hook=wait)
        job = (await federation.submit(recipe))["job"]
        third = TaskRef(2, 0)
        await quick.until(lambda: Received(job=job, task=third) in quick.heard)
        await slow.until(lambda: any(isinstance(m, Assignment) and m.task == third for m in slow.heard))
        running = federation.service._active[job].running
        assert running is not None
        assert running.pid is not None
        workflow = psutil.Process(running.pid)
        await federation.stop()
        assert not workflow.is_running()
        await federation.start()
        go.set()
        for site in (quick, slow):
            await federation.disconnect(site)
            await federation.site(site.name, recipe, again=site)
        assert (await federation.finished(job))["status"] == "completed"
        assert quick.performed == [TaskRef(commit, 0) for commit in range(ROUNDS)]
        assert slow.performed == [TaskRef(commit, 0) for commit in range(ROUNDS)]
        assert_same(result_of(federation, job), simulated(recipe, tmp_path, ["a", "b"]))


async def test_an_update_brought_before_the_workflow_asks_again_is_kept(
    real_federation: Federates, recipe: FedAvgRecipe, tmp_path: Path
) -> None:
    """The server was killed after the site had its task and before the update came."""
    async with real_federation() as federation:

        async def keep_it(site: SmallSite, assignment: Assignment) -> bool:
            site.unacknowledged[assignment.task] = await site.delivery(assignment)
            site.changed.set()
            return False

        site = await federation.site("a", recipe, hook=keep_it)
        job = (await federation.submit(recipe))["job"]
        await site.until(lambda: bool(site.unacknowledged))
        await federation.stop()
        await federation.disconnect(site)
        await federation.start()
        running = federation.service._active[job].running
        assert running is not None
        first = TaskRef(0, 0)
        answer = await running.deliver("a", site.unacknowledged[first])  # no workflow can have asked yet: its interpreter starts
        assert not running._open
        assert answer == Received(job=job, task=first)
        site.hook = lambda site, assignment: _yes()
        await federation.site("a", recipe, again=site)
        assert (await federation.finished(job))["status"] == "completed"
        assert site.performed == [TaskRef(commit, 0) for commit in range(ROUNDS)]
        assert_same(result_of(federation, job), simulated(recipe, tmp_path, ["a"]))


async def _yes() -> bool:
    return True


async def test_duplicates_are_acknowledged_and_counted_once(real_federation: Federates, recipe: FedAvgRecipe, tmp_path: Path) -> None:
    async with real_federation() as federation:

        async def three_times(site: SmallSite, assignment: Assignment) -> bool:
            delivery = await site.delivery(assignment)
            for _ in range(3):
                await site.stream.send(delivery)
            return False

        sites = [await federation.site("a", recipe, hook=three_times), await federation.site("b", recipe)]
        job = (await federation.submit(recipe))["job"]
        assert (await federation.finished(job))["status"] == "completed"
        acknowledged = [m for m in sites[0].heard if isinstance(m, Received)]
        await sites[0].until(lambda: sum(isinstance(m, Received) for m in sites[0].heard) == 3 * ROUNDS)
        assert all(m.problem is None for m in acknowledged)
        assert_same(result_of(federation, job), simulated(recipe, tmp_path, ["a", "b"]))


async def test_a_malformed_update_counts_as_its_sites_failure(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    def frame(site: str, task_id: TaskId) -> bytes:
        return b"".join(encode_update(Update(site, task_id, FLModel({"w": np.ones(3, "f4")}, meta={"examples": 1}))))

    bad = {
        0: b"no frame at all",
        1: frame("b", TaskId("count", 1, 0, "b")),  # another site's name
        2: frame("a", TaskId("count", 1, 0, "a")),  # an old one, replayed
        3: frame("a", TaskId("other", 3, 0, "a")),
    }
    tolerant = FedAvgRecipe(name="count", model=recipe.model, app=recipe.app, rounds=ROUNDS, min_updates=1)

    async def lie(site: SmallSite, assignment: Assignment) -> bool:
        payload = Payload(inline=bad[assignment.task.commit])
        await site.stream.send(Delivery(job=assignment.job, task=assignment.task, payload=payload))
        return False

    async with real_federation() as federation:
        liar, _ = await federation.site("a", tolerant, hook=lie), await federation.site("b", tolerant)
        job = (await federation.submit(tolerant))["job"]
        assert (await federation.finished(job))["status"] == "completed"
        await liar.until(lambda: sum(isinstance(m, Received) for m in liar.heard) == ROUNDS)
        assert all(m.problem is not None and m.problem.code == "WireError" for m in liar.heard if isinstance(m, Received))
        failures = result_of(federation, job).events("failure")
        assert [(event["round"], event["site"], event["code"]) for event in failures] == [(n, "a", "WireError") for n in range(ROUNDS)]


async def test_updates_that_nobody_waits_for_are_not_kept(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        hold = asyncio.Event()

        async def wait(site: SmallSite, assignment: Assignment) -> bool:
            await hold.wait()
            return True

        site = await federation.site("a", recipe, hook=wait)
        job = (await federation.submit(recipe))["job"]
        await site.until(lambda: any(isinstance(m, Assignment) for m in site.heard))
        running = federation.service._active[job].running
        assert running is not None
        for commit, index in [(7, 0), (0, 0), (0, 1)] + [(1, number) for number in range(40)]:
            task = TaskRef(commit, index)
            update = Update(
                "b" if (commit, index) == (0, 0) else "a", TaskId("count", commit, index, "a"), FLModel({"w": np.ones(3, "f4")})
            )
            delivery = Delivery(job=job, task=task, payload=Payload(inline=b"".join(encode_update(update))))
            if (commit, index) != (0, 0):
                assert (await running.deliver("a", delivery)).problem is None
            assert (await running.deliver("stranger", delivery)).problem is None
        kept = await federation.service.store.update_keys(job)
        assert {each.site for each in kept} == {"a"}
        assert len(kept) == 16  # what a site may bring early, before a workflow that was started again has asked for it
        assert all(each.task.commit <= 1 for each in kept)
        hold.set()


async def test_refusals_come_with_their_clause_at_submission(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    refusal = Failure("PolicyRefused", "this code may not run here [code.digests]")
    async with real_federation() as federation:
        await federation.site("a", recipe)
        strict = await federation.site("b", recipe, refusal=refusal)
        with pytest.raises(Refused, match=r"needs 2 sites, and 1 of 2 can take it:\n  b: .*\[code.digests\]"):
            await federation.submit(recipe, min_sites=2)
        assert await federation.client().call("jobs") == []
        assert list((federation.settings.state / "jobs").iterdir()) == []
        answer = await federation.submit(recipe, min_sites=1)
        assert answer["refusals"] == {"b": str(refusal)}
        about = await federation.finished(answer["job"])
        assert (about["status"], about["sites"]) == ("completed", ["a"])
        assert not strict.performed
        with pytest.raises(Refused, match="names sites that are not in this federation, or disabled or revoked: nowhere"):
            await federation.submit(recipe, sites=["a", "nowhere"])
        with pytest.raises(Refused, match="needs 3 sites, and this federation has 2"):
            await federation.submit(recipe, min_sites=3)


async def test_a_job_that_asks_for_too_much_is_refused(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        await federation.site("a", recipe, resources=Resources(cores=2))
        with pytest.raises(Refused, match="a: Resources: the job takes more than the site has"):
            await federation.submit(recipe, resources=Resources(gpus=1))


async def test_a_job_waits_in_the_queue_for_its_sites(real_federation: Federates, recipe: FedAvgRecipe, tmp_path: Path) -> None:
    async with real_federation() as federation:
        a, b = await federation.site("a", recipe), await federation.site("b", recipe)
        await federation.disconnect(b)
        job = (await federation.submit(recipe, sites=["a", "b"]))["job"]
        about = await federation.client().call("job", job=job)
        assert about["status"] == "queued"
        assert {(m["site"], m["state"], m["connected"]) for m in about["members"]} == {("a", "accepted", True), ("b", "offered", False)}
        assert not a.performed
        await federation.site("b", recipe, again=b)
        assert (await federation.finished(job))["status"] == "completed"
        assert_same(result_of(federation, job), simulated(recipe, tmp_path, ["a", "b"]))


async def test_jobs_share_sites_as_far_as_there_is_room(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        hold = asyncio.Event()

        async def wait(site: SmallSite, assignment: Assignment) -> bool:
            await hold.wait()
            return True

        site = await federation.site("a", recipe, resources=Resources(cores=2), hook=wait)
        jobs = [(await federation.submit(recipe, resources=Resources(cores=1)))["job"] for _ in range(3)]
        assert jobs == ["count-0001", "count-0002", "count-0003"]
        await site.until(lambda: len({m.job for m in site.heard if isinstance(m, Assignment)}) == 2)
        listed = await federation.client(Role.AUDITOR, "carl").call("jobs")
        assert [(job["job"], job["status"]) for job in listed] == list(zip(jobs, ["running", "running", "queued"], strict=True))
        assert (await federation.client().call("abort", job=jobs[0])) == {"job": jobs[0], "status": "stopped"}
        await site.until(lambda: any(isinstance(m, Assignment) and m.job == jobs[2] for m in site.heard))
        await federation.client().call("abort", job=jobs[1])
        await federation.client().call("abort", job=jobs[2])


async def test_a_stopped_job_goes_on_to_the_same_bits(real_federation: Federates, recipe: FedAvgRecipe, tmp_path: Path) -> None:
    async with real_federation() as federation:
        hold, go = asyncio.Event(), asyncio.Event()

        async def wait(site: SmallSite, assignment: Assignment) -> bool:
            if assignment.task.commit == 2 and not go.is_set():
                hold.set()
                return False
            return True

        sites = [await federation.site(name, recipe, hook=wait) for name in ("a", "b")]
        job = (await federation.submit(recipe))["job"]
        async with asyncio.timeout(30):
            await hold.wait()
        client = federation.client()
        with pytest.raises(Refused, match="running: only one that failed or was stopped goes on"):
            await client.call("resume", job=job)
        assert await client.call("abort", job=job) == {"job": job, "status": "stopped"}
        about = await client.call("job", job=job)
        assert (about["status"], about["reason"], about["rounds"]) == ("stopped", f"stopped after 2 of {ROUNDS} rounds", 2)
        assert result_of(federation, job).get_status() == "stopped"
        await sites[0].until(lambda: bool(sites[0].ended))
        with pytest.raises(Refused, match="nothing to stop"):
            await client.call("abort", job=job)
        go.set()
        assert await client.call("resume", job=job) == {"job": job}
        assert (await federation.finished(job))["status"] == "completed"
        assert_same(result_of(federation, job), simulated(recipe, tmp_path, ["a", "b"]))


async def test_a_job_that_cannot_go_on_keeps_no_other_from_it(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        a, b = await federation.site("a", recipe), await federation.site("b", recipe)
        await federation.disconnect(b)
        broken = (await federation.submit(recipe, sites=["a", "b"]))["job"]
        await federation.stop()
        for path in (federation.settings.state / "blobs").glob("??/*"):
            path.unlink()
        await federation.start()
        about = await federation.client().call("job", job=broken)
        assert about["status"] == "failed"
        assert "is not here" in about["reason"]
        await federation.disconnect(a)
        await federation.site("a", recipe, again=a)
        await a.until(lambda: a.ended == {broken: "failed"})
        assert (await federation.finished((await federation.submit(recipe, sites=["a"]))["job"]))["status"] == "completed"


async def test_a_queued_job_can_be_stopped(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        a, b = await federation.site("a", recipe), await federation.site("b", recipe)
        await federation.disconnect(b)
        job = (await federation.submit(recipe, sites=["a", "b"]))["job"]
        with pytest.raises(Refused, match="ada's"):
            await federation.client(Role.ORG_ADMIN, "otto", "elsewhere").call("abort", job=job)
        await federation.client(Role.ORG_ADMIN, "olga").call("abort", job=job)
        await a.until(lambda: a.ended == {job: "stopped"})


async def test_code_that_kills_its_workflow_is_tried_a_few_times(real_federation: Federates, load: Callable[[str], Any]) -> None:
    module = load(
        APP
        + """
import os, sys

async def die(cohort, model, rounds):
    print("these were my last words", file=sys.stderr)
    os._exit(7)
"""
    )
    recipe = WorkflowRecipe(name="dies", model={"w": np.zeros(3, "f4")}, app=module.app, run=module.die, arguments={"rounds": 2})
    async with real_federation() as federation:
        await federation.site("a", recipe)
        job = (await federation.submit(recipe))["job"]
        about = await federation.finished(job)
        assert about["status"] == "failed"
        assert about["reason"].startswith("the workflow's process ended with status 7, 4 times without a commit in between.")
        assert about["reason"].count("these were my last words") == 4
        assert result_of(federation, job).get_status() == "failed"
        assert [site["connected"] for site in await federation.client().call("sites")] == [True]  # the server goes on


async def test_a_workflow_that_hangs_is_killed_when_it_is_stopped(
    real_federation: Federates, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(APP + "async def hang(cohort, model, rounds):\n    cohort.log('hanging')\n    while True: pass\n")
    monkeypatch.setattr("hanse.server.running_job.STOP_WITHIN_S", 0.5)
    recipe = WorkflowRecipe(name="hangs", model={"w": np.zeros(3, "f4")}, app=module.app, run=module.hang, arguments={"rounds": 2})
    async with real_federation() as federation:
        await federation.site("a", recipe)
        job = (await federation.submit(recipe))["job"]
        async for event in federation.client().follow("logs", job=job, follow=True):
            if event["event"] == "message":
                break
        running = federation.service._active[job].running
        assert running is not None
        assert running.pid is not None
        workflow = psutil.Process(running.pid)
        assert await federation.client().call("abort", job=job) == {"job": job, "status": "stopped"}
        assert not workflow.is_running()
        assert result_of(federation, job).get_status() == "stopped"


async def test_what_training_code_prints_goes_to_followers_and_the_sites_log(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async def print_a_line(site: SmallSite, assignment: Assignment) -> bool:
        await site.stream.send(Output(job=assignment.job, lines=[f"round {assignment.task.commit}", "done"]))
        return True

    async with real_federation() as federation:
        await federation.site("a", recipe, hook=print_a_line)
        job = (await federation.submit(recipe))["job"]
        await federation.finished(job)
        expected = [line for number in range(ROUNDS) for line in (f"round {number}", "done")]
        assert (result_of(federation, job).folder / "logs" / "a.log").read_text().splitlines() == expected
        events = [event async for event in federation.client().follow("logs", job=job)]
        assert [event["line"] for event in events if event["event"] == "output"] == expected
        assert "logs/a.log" in (await federation.client().call("result", job=job))["files"]


async def test_jobs_live_in_postgresql_and_blobs_in_an_object_store(
    real_federation: Federates, load: Callable[[str], Any], tmp_path: Path, postgres: str, bucket: str
) -> None:
    """The workflow is killed and the folder of blobs emptied: updates come back from the store, and no site is asked twice."""
    recipe = FedAvgRecipe(name="large", model={"w": np.zeros(1 << 18, "f4")}, app=load(APP).app, rounds=3)
    async with real_federation(database=postgres, blobs=bucket) as federation:
        go = asyncio.Event()

        async def wait(site: SmallSite, assignment: Assignment) -> bool:
            if assignment.task.commit == 1:
                await go.wait()
            return True

        quick, slow = await federation.site("a", recipe), await federation.site("b", recipe, hook=wait)
        job = (await federation.submit(recipe))["job"]
        second = TaskRef(1, 0)
        await quick.until(lambda: Received(job=job, task=second) in quick.heard)
        await slow.until(lambda: any(isinstance(m, Assignment) and m.task == second for m in slow.heard))
        running = federation.service._active[job].running
        assert running is not None
        assert running.pid is not None
        for path in (federation.settings.state / "blobs").glob("??/*"):
            path.unlink()
        os.kill(running.pid, signal.SIGKILL)
        await slow.until(lambda: sum(isinstance(m, Assignment) and m.task == second for m in slow.heard) == 2)
        go.set()
        assert (await federation.finished(job))["status"] == "completed"
        assert quick.performed == [TaskRef(commit, 0) for commit in range(3)]
        assert_same(result_of(federation, job), simulated(recipe, tmp_path, ["a", "b"]))


async def test_a_site_that_comes_back_is_not_asked_for_what_is_kept(
    real_federation: Federates, recipe: FedAvgRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its update is still being read for the workflow, which was started again."""
    second = TaskRef(1, 0)
    async with real_federation() as federation, asyncio.timeout(60):
        reading, go = asyncio.Event(), asyncio.Event()

        async def wait(site: SmallSite, assignment: Assignment) -> bool:
            if assignment.task == second:
                await go.wait()
            return True

        quick, slow = await federation.site("a", recipe), await federation.site("b", recipe, hook=wait)
        job = (await federation.submit(recipe))["job"]
        await quick.until(lambda: Received(job=job, task=second) in quick.heard)
        await slow.until(lambda: any(isinstance(m, Assignment) and m.task == second for m in slow.heard))
        running, read = federation.service._active[job].running, federation.service.store.update
        assert running is not None
        assert running.pid is not None

        async def read_late(*key: Any) -> Any:
            reading.set()
            await go.wait()
            return await read(*key)

        monkeypatch.setattr(federation.service.store, "update", read_late)
        os.kill(running.pid, signal.SIGKILL)
        await reading.wait()
        await federation.disconnect(quick)
        again = await federation.site("a", recipe)
        go.set()
        assert (await federation.finished(job))["status"] == "completed"
        assert again.performed == [TaskRef(commit, 0) for commit in range(2, ROUNDS)]


async def test_a_jobs_code_sees_no_keys_and_no_other_jobs_at_the_server(
    real_federation: Federates, recipe: FedAvgRecipe, load: Callable[[str], Any], tmp_path: Path
) -> None:
    if problem := Sandbox().problem():
        pytest.skip(problem)
    keys = tmp_path / "kit" / "credentials"
    keys.mkdir(parents=True)
    (keys / "key.pem").write_text("secret")
    places = {"KEYS": str(tmp_path / "kit"), "STATE": str(tmp_path / "state")}
    curious = APP + CURIOUS
    for name, value in places.items():
        curious = curious.replace(name, value)
    async with real_federation(sandbox="required", hidden=[tmp_path / "kit"]) as federation:
        curious = curious.replace("PORT", str(federation.server.port))
        await federation.site("a", recipe)
        await federation.finished((await federation.submit(recipe))["job"])
        about = await federation.finished((await federation.submit(replace(recipe, app=load(curious).app)))["job"])
        seen = (tmp_path / "state" / "jobs" / about["job"] / "server.log").read_text()
    assert (about["status"], about["reason"]) == ("completed", "")
    assert "SEEN [] ['blobs', 'jobs'] ['count-0002'] OSError" in seen


async def test_links_that_a_jobs_code_leaves_in_its_folder_lead_nowhere(
    real_federation: Federates, recipe: FedAvgRecipe, load: Callable[[str], Any], tmp_path: Path
) -> None:
    """Neither what a submitter fetches nor what the server writes there: site's output, the process's own, the end of the job."""
    secret, log, other = tmp_path / "key.pem", tmp_path / "authorized_keys", tmp_path / "elsewhere"
    for path in (secret, log):
        path.write_text("secret")
    other.mkdir()
    (other / "key.pem").write_text("secret")
    sly = APP + SLY
    for name, value in {"SECRET": secret, "AUTHORIZED": log, "ELSEWHERE": other}.items():
        sly = sly.replace(name, str(value))
    async with real_federation(sandbox="off") as federation:
        await federation.site("a", recipe)
        job = (await federation.submit(replace(recipe, app=load(sly).app)))["job"]
        await federation.finished(job)
        folder = federation.settings.state / "jobs" / job
        assert (folder / "made").is_file()  # the code has run
        assert "secret" not in "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())
        files = (await federation.client().call("result", job=job))["files"]
        assert "made" in files
        assert not {"innocent.txt", "more/key.pem"} & files.keys()
        (folder / "late.txt").symlink_to(secret)  # as code does that still runs
        (folder / "pipe").unlink(missing_ok=True)
        os.mkfifo(folder / "pipe")
        again = (await federation.client().call("result", job=job))["files"]
        assert again == files
        (folder / "made").unlink()
        (folder / "made").symlink_to(secret)
        with pytest.raises(Refused, match="is not here"):
            await federation.client().download(_blob(files["made"]), FolderBlobs(tmp_path / "stolen"))
    assert log.read_text() == "secret"


async def test_code_that_cannot_be_imported_fails_the_job_at_once(real_federation: Federates, load: Callable[[str], Any]) -> None:
    app = load(APP + "import sys\nif sys.argv[0].endswith('job_process.py'): raise RuntimeError('not on a server')\n").app
    recipe = FedAvgRecipe(name="picky", model={"w": np.zeros(3, "f4")}, app=app, rounds=2)
    async with real_federation() as federation:
        await federation.site("a", recipe)
        about = await federation.finished((await federation.submit(recipe))["job"])
        assert (about["status"], about["reason"]) == ("failed", "RuntimeError: not on a server")


async def test_a_site_that_stays_away_fails_and_the_rest_go_on(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    tolerant = FedAvgRecipe(name="count", model=recipe.model, app=recipe.app, rounds=ROUNDS, min_updates=1)
    async with real_federation(absence_s=0.2) as federation:
        leave = asyncio.Event()

        async def stop_answering(site: SmallSite, assignment: Assignment) -> bool:
            leave.set()
            return False

        away, stays = await federation.site("a", tolerant, hook=stop_answering), await federation.site("b", tolerant)
        job = (await federation.submit(tolerant))["job"]
        async with asyncio.timeout(30):
            await leave.wait()
        await federation.disconnect(away)
        about = await federation.finished(job)
        assert about["status"] == "completed"
        failures = result_of(federation, job).events("failure")
        assert [(event["round"], event["site"], event["code"]) for event in failures] == [(n, "a", "SiteAway") for n in range(ROUNDS)]
        assert len(stays.performed) == ROUNDS


async def test_tasks_that_are_given_up_are_withdrawn(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    hurried = FedAvgRecipe(name="count", model=recipe.model, app=recipe.app, rounds=1, min_updates=1, grace_s=0.05)

    async def never(site: SmallSite, assignment: Assignment) -> bool:
        return False

    async with real_federation() as federation:
        silent, _ = await federation.site("a", hurried, hook=never), await federation.site("b", hurried)
        job = (await federation.submit(hurried))["job"]
        assert (await federation.finished(job))["status"] == "completed"
        await silent.until(lambda: Withdraw(job=job, tasks=[TaskRef(0, 0)]) in silent.heard)


async def test_revoking_ends_open_connections_and_shuts_the_door(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        site, other = await federation.site("a", recipe), await federation.site("b", recipe)
        root = federation.client(Role.PROJECT_ADMIN, "root")
        with pytest.raises(Refused, match=r"researcher 'ada'.* may not call 'revoke'"):
            await federation.client().call("revoke", name="a")
        with pytest.raises(Refused, match="their own"):
            await root.call("revoke", name="root")
        await root.call("revoke", name="a")
        (task,) = [task for task, of in federation.tasks.items() if of is site]
        await asyncio.wait([task], timeout=30)
        assert task.done()
        with pytest.raises(IdentityError, match="revoked"):
            await federation.client(Role.SITE, "a").call("renew", csr="")
        assert {row["site"]: (row["connected"], row["revoked"]) for row in await root.call("sites")} == {
            "a": (False, True),
            "b": (True, False),
        }
        await federation.stop()
        await federation.start()  # it lasts
        with pytest.raises(IdentityError, match="revoked"):
            await federation.client(Role.SITE, "a").call("renew", csr="")
        assert other.name == "b"


async def test_a_disabled_site_is_out_until_it_is_enabled(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        site = await federation.site("a", recipe)
        with pytest.raises(Refused, match="its own organisation only"):
            await federation.client(Role.ORG_ADMIN, "otto", "elsewhere").call("disable", site="a")
        olga = federation.client(Role.ORG_ADMIN, "olga")
        assert (await olga.call("disable", site="a"))["disabled"] is True
        (task,) = federation.tasks
        await asyncio.wait([task], timeout=30)
        assert task.done()
        with pytest.raises(Refused, match="disabled"):
            await federation.client(Role.SITE, "a").call("renew", csr="")
        with pytest.raises(Refused, match="has 0 that take jobs"):
            await federation.submit(recipe)
        assert (await olga.call("enable", site="a"))["disabled"] is False
        await federation.site("a", recipe, again=site)
        assert (await olga.call("site", site="a"))["connected"] is True
        with pytest.raises(Refused, match="no site 'x'; there are: a"):
            await olga.call("site", site="x")


async def test_a_site_joins_by_a_token_once_and_renews(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        olga = federation.client(Role.ORG_ADMIN, "olga")
        with pytest.raises(Refused, match="its own organisation only"):
            await olga.call("token", site="new", organisation="elsewhere", hours=1)
        token = read_token((await olga.call("token", site="new", organisation="lab", hours=1))["token"])
        joining = Client(f"localhost:{federation.port}", token.credentials)
        federation.clients.append(joining)
        key = new_key()
        with pytest.raises(IdentityError):
            await joining.call("enrol", csr="no request")  # which does not use the token up
        chain = (await joining.call("enrol", csr=request(key).decode()))["certificate"].encode()
        who = identity_of(chain)
        assert (who.role, who.name, who.organisation) == (Role.SITE, "new", "lab")
        with pytest.raises(IdentityError, match="used before"):
            await joining.call("enrol", csr=request(key).decode())
        with pytest.raises(Refused, match="may not call 'jobs'"):
            await joining.call("jobs")
        federation.credentials[Role.SITE, "new"] = Credentials(key, chain, federation.identities.root.roots)
        await federation.site("new", recipe)
        client = federation.client(Role.SITE, "new")
        renewed = (await client.call("renew", csr=request(key).decode()))["certificate"].encode()
        assert identity_of(renewed) == who
        with pytest.raises(Refused, match="may not call 'enrol'"):
            await client.call("enrol", csr=request(key).decode())
        (row,) = await olga.call("sites")
        assert (row["site"], row["connected"], row["organisation"]) == ("new", True, "lab")
        assert row["expires"] > row["since"]


async def test_calls_of_the_wrong_role_or_form_are_refused(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        auditor, site = federation.client(Role.AUDITOR, "carl"), federation.client(Role.SITE, "a")
        for name in ("submit", "abort", "resume", "result", "disable", "token", "revoke", "enrol"):
            with pytest.raises(Refused, match=f"may not call '{name}'"):
                await auditor.call(name)
        with pytest.raises(Refused, match="may not call 'jobs'"):
            await site.call("jobs")
        with pytest.raises(Refused, match="no call 'destroy'"):
            await auditor.call("destroy")
        with pytest.raises(HanseError, match="job: Object missing required field `job`"):
            await auditor.call("job")
        with pytest.raises(Refused, match="no job 'x'"):
            await auditor.call("job", job="x")
        with pytest.raises(Refused, match="may not call 'Control'"):
            async for _ in await _hello(federation.client()):
                pass
        with pytest.raises(Refused, match="nothing to send"):
            await site.upload(_blob(["00" * 32, 5]), lambda offset, size: b"12345")


async def test_a_job_signed_by_another_or_not_there_is_refused(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        await federation.site("a", recipe)
        ada = federation.identities.signer(Role.RESEARCHER, "ada")
        client = federation.client()
        with pytest.raises(HanseError, match="base64"):
            await client.call("submit", manifest="!", signature="!", archive=["00" * 32, 1])
        with pytest.raises(IdentityError, match=r"eve.* submits a job that researcher 'ada'"):
            await _submit_as(federation, recipe, submitter="eve", signer=ada)


async def _submit_as(federation: RealFederation, recipe: Recipe, *, submitter: str, signer: Any) -> None:
    recipe.export(federation.folder / "forged")
    manifest, signature = pack(federation.folder / "forged", federation.folder / "forged.zip", signer=signer)
    client = federation.client(Role.RESEARCHER, submitter)
    encoded = [base64.b64encode(data).decode() for data in (manifest, signature)]
    await client.call("submit", manifest=encoded[0], signature=encoded[1], archive=["00" * 32, 1])


async def _hello(client: Client) -> Any:
    stream = await client.control()
    await stream.send(Hello(version="1"))
    return stream


async def test_the_newer_connection_of_a_site_counts(real_federation: Federates, recipe: FedAvgRecipe) -> None:
    async with real_federation() as federation:
        old = await federation.site("a", recipe)
        (task,) = federation.tasks
        new = await federation.site("a", recipe)
        await asyncio.wait([task], timeout=30)
        assert task.done()
        job = (await federation.submit(recipe))["job"]
        assert (await federation.finished(job))["status"] == "completed"
        assert (len(old.performed), len(new.performed)) == (0, ROUNDS)


def _blob(pair: list[Any]) -> Blob:
    return Blob(bytes.fromhex(pair[0]), pair[1])
