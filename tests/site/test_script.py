"""Scripts as they are, run for many sites in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse.client.script import Script
from hanse.client.session import SiteInfo
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.messages.update import Record, Update
from hanse.site.runner import SiteRunner


class Job:
    """A runner for one script, and what its sites print."""

    def __init__(self, path: Path, argv: tuple[str, ...] = (), framework: str | None = None) -> None:
        self.lines: list[tuple[str, str]] = []
        self.runner = SiteRunner(Script(path, argv), framework=framework, sink=lambda site, line: self.lines.append((site, line)))

    def do(self, params: Any = None, *, site: int = 0, name: str = "train", round: int = 0, **more: Any) -> Update:
        info = SiteInfo(f"site-{site}", site, 50, "job", seed=3, config={"lr": 0.1})
        task = Task(name, FLModel(params, current_round=round, total_rounds=3, meta=more.get("meta", {})), more.get("config", {}))
        return self.runner.run(info, task, TaskId("job", round, 0, info.name), {})


@pytest.fixture
def job(tmp_path: Path) -> Any:
    jobs = []

    def make(source: str, *argv: str, framework: str | None = None) -> Job:
        path = tmp_path / "train.py"
        path.write_text(source)
        jobs.append(Job(path, argv, framework))
        return jobs[-1]

    yield make
    for each in jobs:
        each.runner.close()


Make = Callable[..., Job]

LOOP = """
import numpy as np
import hanse.client as flare

rounds = 0

def main():
    global rounds
    flare.init()
    while flare.is_running():
        model = flare.receive()
        rounds += 1
        print(f"{flare.get_site_name()} round {model.current_round} of {model.total_rounds}")
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"accuracy": model.params["w"].mean()}))
            continue
        if flare.is_submit_model():
            flare.send(flare.FLModel(params={"w": np.zeros(2)}, meta={"name": model.meta["submit_model_name"]}))
            continue
        w = model.params["w"] + flare.system_info()["rank"]
        flare.send(flare.FLModel(params={"w": w}, metrics={"rounds": rounds}, meta={"NUM_STEPS_CURRENT_ROUND": 4}))
    print("done")

if __name__ == "__main__":
    main()
"""


def test_a_loop_with_branches_for_every_task(job: Make) -> None:
    running = job(LOOP)
    trained = running.do({"w": np.ones(2)}, site=3)
    assert trained.failure is None
    np.testing.assert_array_equal(trained.model.params["w"], [4, 4])
    assert (trained.model.metrics, trained.model.meta) == ({"rounds": 1.0}, {"steps": 4})
    evaluated = running.do({"w": np.ones(2)}, site=3, name="evaluate", round=1)
    assert (evaluated.model.params, evaluated.model.metrics) == (None, {"accuracy": 1.0})
    submitted = running.do(None, site=3, name="submit_model", round=1, meta={"submit_model_name": "best"})
    assert submitted.model.meta == {"name": "best"}
    assert running.do({"w": np.ones(2)}, site=3, round=2).model.metrics == {"rounds": 4.0}
    assert running.runner.close() == []
    assert running.lines[0] == ("site-3", "site-3 round 0 of 3")
    assert running.lines[-1] == ("site-3", "done")


def test_fifty_sites_interleaved_keep_their_own_state(job: Make) -> None:
    running = job(LOOP)
    order = np.random.default_rng(0)
    for round in range(4):
        for site in order.permutation(50):
            update = running.do({"w": np.full(2, 10.0 * round)}, site=int(site), round=round)
            np.testing.assert_array_equal(update.model.params["w"], np.full(2, 10.0 * round + site))
            assert update.model.metrics == {"rounds": round + 1}
    running.runner.close()
    assert sorted(site for site, line in running.lines if line == "done") == sorted(f"site-{site}" for site in range(50))


DECORATED = """
import hanse.client as flare

@flare.evaluate
def check(model):
    return float(model.params["w"].sum())

@flare.train
def fit(model, add=1):
    return flare.FLModel(params={"w": model.params["w"] + add})

flare.init()
while flare.is_running():
    check()
    if flare.is_train():
        fit(add=5)
"""


def test_decorators(job: Make) -> None:
    running = job(DECORATED)
    update = running.do({"w": np.ones(2)})
    np.testing.assert_array_equal(update.model.params["w"], [6, 6])
    assert update.model.metrics == {"metric": 2.0}
    assert running.do({"w": np.ones(2)}, name="evaluate").model.metrics == {"metric": 2.0}
    assert running.do({"w": np.zeros(2)}).model.metrics == {"metric": 0.0}


ONE_SHOT = """
import hanse.client as flare
flare.init()
model = flare.receive()
flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
print("end of", model.current_round)
"""


def test_a_script_without_a_loop_starts_anew_for_each_task(job: Make) -> None:
    running = job(ONE_SHOT)
    for round in range(3):
        np.testing.assert_array_equal(running.do({"w": np.full(1, float(round))}, round=round).model.params["w"], [round + 1])
    running.runner.close()
    assert running.lines == [("site-0", f"end of {round}") for round in range(3)]


def test_it_is_the_main_program_with_its_own_arguments(job: Make, tmp_path: Path) -> None:
    (tmp_path / "beside_the_script.py").write_text("value = 7\n")
    running = job(
        """
import argparse, sys
from dataclasses import dataclass
import beside_the_script
import hanse.client as flare
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int)
args = parser.parse_args()

@dataclass
class Mine:
    x: int = beside_the_script.value

flare.init()
while flare.is_running():
    flare.receive()
    assert sys.modules["__main__"].Mine is Mine and __name__ == "__main__" and __file__ == sys.argv[0]
    flare.send(flare.FLModel(metrics={"epochs": args.epochs, "x": Mine().x, "arguments": len(sys.argv), **flare.get_config()}))
    sys.argv.append("more")
""",
        "--epochs",
        "4",
    )
    main, argv = sys.modules["__main__"], list(sys.argv)
    assert running.do(config={"mu": 1}).model.metrics == {"epochs": 4, "x": 7, "arguments": 3, "lr": 0.1, "mu": 1}
    assert running.do(site=1).model.metrics == {"epochs": 4, "x": 7, "arguments": 3, "lr": 0.1}
    assert (sys.modules["__main__"], sys.argv) == (main, argv)
    running.runner.close()
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("1 / 0", "ZeroDivisionError", "train.py:1: division by zero"),
        ("x = = 1", "SyntaxError", "train.py:1: "),
        ("import hanse.client as f\nf.receive()", "ConfigError", r"train.py:2: .*before init\(\)"),
        ("import hanse.client as f\nf.init()", "SiteFailed", "ended without asking for a task"),
        ("import hanse.client as f\nf.init()\nf.receive()", "SiteFailed", "ended without an answer to 'train'"),
        ("import hanse.client as f\nf.init()\nwhile f.is_running(): f.receive()", "SiteFailed", "asked for the next task without"),
        ("import hanse.client as f\nf.init()\nwhile f.is_running(): pass", "SiteFailed", "asked for the next task without"),
        ("import hanse.client as f\nf.init()\nf.send(f.FLModel(metrics={'a': 1}))", "ConfigError", "no task at hand"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--wrong'])", "SystemExit", "train.py:2: the code exited with status 2"),
        (
            "import hanse.client as f\nf.init()\nm = f.receive()\nm.params['w'][0] = 1",
            "ValueError",
            r"train.py:4: .*read-only .*change a copy",
        ),
        (
            "import hanse.client as f\nf.init()\nf.receive()\nf.send(f.FLModel(metrics={'loss': 'low'}))",
            "ConfigError",
            "metric 'loss' is a str, 'low'",
        ),
    ],
)
def test_what_goes_wrong_is_told(job: Make, source: str, code: str, says: str) -> None:
    running = job(source)
    update = running.do({"w": np.ones(1)})
    assert update.failure is not None
    assert update.failure.code == code
    with pytest.raises(RuntimeError, match=says):
        raise RuntimeError(f"{update.failure.message} {update.failure.hint}")
    assert update.records[-1].kind == "log"
    assert update.records[-1].value.rstrip().splitlines()[-1].startswith(("Z", "S", "C", "V", "hanse", "  File"))


def test_a_failed_script_starts_anew_and_the_others_go_on(job: Make) -> None:
    running = job("""
import hanse.client as flare
flare.init()
count = 0
while flare.is_running():
    model = flare.receive()
    count += 1
    if model.params["w"][0] < 0:
        raise ValueError("negative")
    flare.send(flare.FLModel(metrics={"count": count}))
""")
    good, bad = {"w": np.ones(1)}, {"w": -np.ones(1)}
    assert [running.do(good, site=site).model.metrics["count"] for site in (0, 1)] == [1, 1]
    failed = running.do(bad, site=0)
    assert failed.failure is not None
    assert "train.py:9: negative" in failed.failure.message
    assert [running.do(good, site=site).model.metrics["count"] for site in (0, 1)] == [1, 2]


def test_a_task_that_was_not_answered_leaves_the_script_running(job: Make) -> None:
    running = job("""
import hanse.client as flare
flare.init()
count = 0
while flare.is_running():
    model = flare.receive()
    count += 1
    if flare.is_train():
        flare.send(flare.FLModel(metrics={"count": count, "round": model.current_round}))
""")
    assert running.do().model.metrics["count"] == 1
    unanswered = running.do(name="evaluate", round=1)
    assert unanswered.failure is not None
    assert "is_evaluate()" in unanswered.failure.hint
    assert running.do(round=2).model.metrics == {"count": 3, "round": 2}


def test_a_task_that_was_not_even_received_is_gone_at_the_end(job: Make) -> None:
    running = job("import hanse.client as f\nf.init()\nwhile f.is_running(): print('a task')\nprint('end')")
    assert running.do().failure is not None
    assert running.runner.close() == []
    assert running.lines == [("site-0", "a task"), ("site-0", "end")]


AFTER = """
import numpy as np
import hanse.client as flare
from hanse.client.tracking import SummaryWriter
writer = SummaryWriter()
w = np.ones(2)
flare.init()
while flare.is_running():
    model = flare.receive()
    w += 1
    writer.add_scalar("before", w[0])
    flare.send(flare.FLModel(params={"w": w}))
    w += 100
    writer.add_scalar("after", w[0])
    if model.current_round == 5:
        raise ValueError("too late")
"""


def test_an_answer_is_taken_where_it_is_sent(job: Make) -> None:
    running = job(AFTER)
    update = running.do(round=0)
    np.testing.assert_array_equal(update.model.params["w"], [2, 2])
    assert update.records == (Record("before", 2.0),)
    assert running.do(round=1).records == (Record("after", 102.0), Record("before", 103.0))
    [ending] = running.runner.close()
    assert (ending.site, ending.failure, ending.records) == ("site-0", None, (Record("after", 203.0),))


def test_an_error_after_the_answer_fails_the_next_task_or_shows_at_the_end(job: Make) -> None:
    running = job(AFTER)
    assert running.do(round=5).failure is None
    assert running.do(round=5, site=1).failure is None
    update = running.do(round=6)
    assert update.failure is not None
    assert "after its answer to the task before, train.py raised ValueError: too late" in update.failure.message
    assert update.failure.message.startswith("train.py:16: ")
    assert running.do(round=7).failure is None
    endings = {ending.site: ending.failure for ending in running.runner.close()}
    assert endings["site-0"] is None
    assert endings["site-1"] is not None
    assert "too late" in endings["site-1"].message


def test_a_script_that_never_stops_asking_is_stopped(job: Make) -> None:
    running = job("""
import hanse.client as flare
flare.init()
while True:
    if model := flare.receive():
        flare.send(flare.FLModel(metrics={"a": 1}))
""")
    assert running.do().failure is None
    [ending] = running.runner.close()
    assert ending.failure is not None
    assert "goes on asking" in ending.failure.message


def test_a_normal_exit_is_no_failure(job: Make) -> None:
    running = job(ONE_SHOT + "import sys\nsys.exit(0)\n")
    assert [running.do({"w": np.ones(1)}, round=round).failure for round in range(2)] == [None, None]
    assert running.runner.close() == []


def test_an_interrupt_stops_everything(job: Make) -> None:
    running = job("import hanse.client as f\nf.init()\nf.receive()\nraise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        running.do()


def test_shutdown_ends_the_loop(job: Make) -> None:
    running = job("""
import hanse.client as flare
flare.init()
while flare.is_running():
    flare.receive()
    flare.send(flare.FLModel(metrics={"a": 1}))
    flare.shutdown()
print("out")
""")
    assert running.do().failure is None
    assert running.do(round=1).failure is None  # a new start
    running.runner.close()
    assert running.lines == [("site-0", "out")] * 2


RANDOM = """
import random
import numpy as np
import hanse.client as flare
from framework_of_its_own import draw
at_start = [random.random(), np.random.random(), draw()]
flare.init()
while flare.is_running():
    flare.receive()
    flare.send(flare.FLModel(params={"start": np.array(at_start), "task": np.array([random.random(), np.random.random(), draw()])}))
    flare.log("after", random.random() + draw())
"""


def test_the_same_task_has_the_same_random_numbers(job: Make, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "framework_of_its_own.py").write_text("def draw():\n    import torch\n    return torch.rand(1).item()\n")

    def numbers(*sites: int, rounds: tuple[int, ...] = (0, 1)) -> dict[tuple[int, int], list[float]]:
        running = job(RANDOM)
        updates = {(site, round): running.do(site=site, round=round) for round in rounds for site in sites}
        assert all(update.failure is None for update in updates.values())
        return {
            key: [*update.model.params["start"], *update.model.params["task"], *(record.value for record in update.records)]
            for key, update in updates.items()
        }

    first = numbers(0, 1, 2)
    assert numbers(2, 0) == {key: value for key, value in first.items() if key[0] != 1}  # whoever else is there
    assert numbers(1, rounds=(1,)) == {(1, 1): first[1, 1][:6]}  # by another process, that did not do round 0
    assert len({tuple(value) for value in first.values()}) == 6


def test_the_framework_a_script_imports_is_seeded_for_the_first_site_too(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "net.py").write_text("import torch\ndraw = torch.rand\n")
    (tmp_path / "train.py").write_text("""
from net import draw
import hanse.client as flare
start = draw(1)
flare.init()
flare.receive()
flare.send(flare.FLModel(params={"start": start}))
""")
    (tmp_path / "run.py").write_text(f"""
import sys
from hanse.client.script import Script
from hanse.client.session import SiteInfo
from hanse.messages.flmodel import FLModel
from hanse.messages.task import Task, TaskId
from hanse.site.runner import SiteRunner
from hanse.client.script import Script
runner = SiteRunner(Script({str(tmp_path / "train.py")!r}))
assert "torch" not in sys.modules
for name in sys.argv[1:]:
    update = runner.run(SiteInfo(name), Task("train", FLModel()), TaskId("j", 0, 0, name), {{}})
    print(name, update.model.params["start"])
""")

    def starts(*names: str) -> list[str]:
        done = subprocess.run([sys.executable, str(tmp_path / "run.py"), *names], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return sorted(done.stdout.splitlines())

    assert starts("a", "b") == starts("b", "a")


TORCH = """
import torch
import hanse.client as flare
net = torch.nn.Linear(2, 1, bias=False)
optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
flare.init()
while flare.is_running():
    model = flare.receive()
    net.load_state_dict(model.params{how})
    assert net.weight.requires_grad and torch.is_grad_enabled()
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    params = net.state_dict()
    if {in_place}:
        model.params["weight"].add_(100)
        model.params["weight"].data.mul_(2)
    {guard}
        flare.send(flare.FLModel(params=params, metrics={{"loss": torch.tensor(0.5)}}))
"""


@pytest.mark.parametrize("how", ["", ", assign=True"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("guard", ["if True:", "with torch.no_grad():"])
def test_torch_scripts_see_nothing_of_each_other(job: Make, how: str, in_place: bool, guard: str) -> None:
    pytest.importorskip("torch")
    source = TORCH.format(how=how, in_place=in_place, guard=guard)
    if how:  # the optimizer has to know the new parameters
        source = source.replace("    assert net", "    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)\n    assert net", 1)
    running = job(source, framework="torch")
    shared = {"weight": np.zeros((1, 2), np.float32)}
    expected = np.full((1, 2), -1.5) if not (how and in_place) else np.full((1, 2), 197.0)
    for round in range(2):
        for site in range(3):
            update = running.do(shared, site=site, round=round)
            assert update.failure is None, update.records
            np.testing.assert_array_equal(update.model.params["weight"], expected)
            assert update.model.metrics == {"loss": 0.5}
    np.testing.assert_array_equal(shared["weight"], 0)


STATEFUL = """
import numpy as np
import hanse.client as flare

flare.init()
state = flare.get_state()
while flare.is_running():
    model = flare.receive()
    state["sum"] = state.get("sum", np.zeros(1)) + model.params["w"]
    state["rounds"] = state.get("rounds", 0) + 1
    if model.current_round == 1:
        raise ValueError("not this one")
    flare.send(flare.FLModel(metrics={"sum": float(state["sum"][0]), "rounds": state["rounds"]}))
    state["sum"] += 100
"""


def test_a_scripts_state_lasts_when_its_process_does_not(tmp_path: Path) -> None:
    """Here each task is done by another process's runner; the second one fails, and leaves the state as it was."""
    path = tmp_path / "train.py"
    path.write_text(STATEFUL)
    state: dict[str, Any] = {}
    seen = []
    for round in range(4):
        runner = SiteRunner(Script(path), sink=lambda site, line: None)
        task = Task("train", FLModel({"w": np.full(1, 2.0)}, current_round=round))
        update = runner.run(SiteInfo("site-1"), task, TaskId("job", round, 0, "site-1"), state)
        seen.append(None if update.failure else dict(update.model.metrics))
        runner.close()
    assert seen == [{"sum": 2, "rounds": 1}, None, {"sum": 4, "rounds": 2}, {"sum": 6, "rounds": 3}]
    assert state == {"sum": 6, "rounds": 3}
