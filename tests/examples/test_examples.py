"""Each example, run as a user runs it: a process of its own, in a folder of its own. What comes out has to be far from chance."""

from __future__ import annotations

import contextlib
import difflib
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression
from tests.examples.running import EXAMPLES, ROOT, finished, run_example

from hanse import FedAvgRecipe, Run, SimEnv
from hanse.messages import codec


def test_hello_finds_the_slope(tmp_path: Path) -> None:
    printed = run_example("hello/job.py", tmp_path)
    run = finished(tmp_path, "hello")
    assert run.get_result().params["slope"] == pytest.approx(3, abs=0.1)
    assert run.metrics[-1]["loss"] < 2 < 50 < run.metrics[0]["loss"]
    assert "report  runs/hello-001/report.html" in printed


def test_digits_as_a_script(tmp_path: Path) -> None:
    run_example("digits/job.py", tmp_path)
    run = finished(tmp_path, "digits")
    assert run.metrics[0]["accuracy"] < 0.3
    assert run.facts["best"]["value"] > 0.85
    assert set(run.get_best().params) == {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}
    printed_at_a_site = (run.folder / "logs" / "site-8.log").read_text().splitlines()
    assert len(printed_at_a_site) == len(run.metrics) == 20
    assert re.fullmatch(r"accuracy 0\.\d{3} before, 0\.\d{3} after", printed_at_a_site[0])


def test_digits_as_functions_stop_by_themselves(tmp_path: Path) -> None:
    printed = run_example("digits/job_function.py", tmp_path)
    run = finished(tmp_path, "digits-function")
    assert run.metrics[-1]["accuracy"] >= 0.88
    assert all(metrics["accuracy"] < 0.88 for metrics in run.metrics[:-1])
    assert f"stopped after round {len(run.metrics)} of 20: accuracy >= 0.88" in printed
    assert {path.name for path in (run.folder / "job" / "code").iterdir()} == {"job_function.py", "train.py"}


def test_the_script_before_and_after_differ_by_five_lines() -> None:
    before, after = (EXAMPLES / "digits" / name for name in ("train_local.py", "train.py"))
    lines = [path.read_text().partition('"""\n')[2].splitlines() for path in (before, after)]  # without the docstring
    changed = [line for line in difflib.ndiff(*lines) if line.startswith("+ ") and line[2:].strip()]
    assert len(changed) == 5
    assert "hanse" not in before.read_text()
    assert all("flare" in line for line in changed)


def test_the_readme_shows_the_lines_that_changed() -> None:
    diff = (EXAMPLES / "digits" / "README.md").read_text("utf-8").partition("```diff\n")[2].partition("```")[0]
    after = [line.strip() for line in (EXAMPLES / "digits" / "train.py").read_text().splitlines()]
    shown = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    assert len(shown) == 5
    assert set(shown) <= set(after)


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("digits/train.py", r"accuracy 0\.\d+ before, (0\.\d+) after\nhanse: round 1 of 2"),
        ("linear/train.py", r"round 2 of 2: auc (0\.\d+)"),
    ],
)
def test_a_script_runs_alone(name: str, score: str, tmp_path: Path) -> None:
    found = re.search(score, run_example(name, tmp_path))
    assert found is not None
    assert float(found[1]) > 0.6
    assert list(tmp_path.iterdir()) == []


def test_demo_on_clothes(tmp_path: Path, data_folder: Path) -> None:
    printed = run_example("demo/job.py", tmp_path, data=data_folder)
    run = finished(tmp_path, "demo")
    assert "Fashion-MNIST" in printed
    assert "report  runs/demo-001/report.html" in printed
    assert run.facts["best"]["metric"] == "accuracy"
    assert run.facts["best"]["value"] > 0.8
    weights = {event["site"]: event["weight"] for event in run.events("update") if event["task"] == "train"}
    assert sum(weights.values()) == 60_000  # every picture is at one site
    assert max(weights.values()) > 2 * min(weights.values())


def test_demo_without_data_says_so_and_goes_on(tmp_path: Path) -> None:
    printed = run_example("demo/job.py", tmp_path, data=tmp_path / "missing")
    run = finished(tmp_path, "demo")
    assert f"There is no {tmp_path / 'missing' / 'fashion_mnist.npz'}" in printed
    assert "digits" in printed
    assert run.facts["best"]["value"] > 0.85


def test_linear_on_credit_data(tmp_path: Path, data_folder: Path) -> None:
    run_example("linear/job.py", tmp_path, data=data_folder)
    run = finished(tmp_path, "linear")
    assert run.facts["best"]["value"] > 0.7
    assert sum(event["weight"] for event in run.events("update") if event["round"] == 0) == 24_000
    assert run.get_best().params["coef_"].shape == (1, 23)


def test_linear_without_data_says_so_and_goes_on(tmp_path: Path) -> None:
    printed = run_example("linear/job.py", tmp_path)
    run = finished(tmp_path, "linear")
    assert "There is no /nowhere/credit_default.npz" in printed
    assert run.facts["best"]["value"] > 0.95


def test_scaffold_is_ahead_where_sites_differ(tmp_path: Path) -> None:
    printed = run_example("scaffold/job.py", tmp_path)
    averaged, corrected = (finished(tmp_path, job).metrics[-1]["accuracy"] for job in ("averaged", "scaffold"))
    assert corrected > averaged + 0.03
    assert corrected > 0.8
    assert f"after 15 {corrected:.1%}" in printed


def test_a_head_for_each_site_beats_one_model_for_all(tmp_path: Path) -> None:
    printed = run_example("personal/job.py", tmp_path)
    shared, own = (finished(tmp_path, job) for job in ("shared", "personal"))
    assert shared.metrics[-1]["accuracy"] < 0.3
    assert own.metrics[-1]["accuracy"] > 0.65
    assert own.metrics[-1]["accuracy"] > float(re.findall(r"alone (\d+\.\d)%", printed)[0]) / 100
    first, last = (codec.read(own.folder / name)[0].params for name in ("job/model.safetensors", "model.safetensors"))
    assert all(np.array_equal(first[name], last[name]) is name.startswith("head.") for name in first)


def test_a_median_withstands_the_site_that_spoils_a_mean(tmp_path: Path) -> None:
    printed = run_example("robust/job.py", tmp_path)
    mean, median = (finished(tmp_path, f"robust-{name}").metrics[-1]["accuracy"] for name in ("mean", "median"))
    assert mean < 0.3 < 0.8 < median
    assert printed == f"mean    accuracy {mean:.3f}\nmedian  accuracy {median:.3f}\n"


def test_an_algorithm_of_your_own_outdoes_the_mean(tmp_path: Path) -> None:
    run_example("own_algorithm/job.py", tmp_path)
    run = finished(tmp_path, "median")
    assert run.metrics[-1]["accuracy"] > 0.85
    app = runpy.run_path(str(EXAMPLES / "own_algorithm" / "job.py"))["app"]
    mean = FedAvgRecipe(name="mean", app=app, model=run.get_result().params, rounds=3)
    assert mean.execute(SimEnv(num_clients=8, runs=tmp_path / "runs", console="quiet")).metrics[-1]["accuracy"] < 0.5
    assert len((EXAMPLES / "own_algorithm" / "job.py").read_text().splitlines()) < 40


def test_sites_with_different_models_learn_from_each_other(tmp_path: Path) -> None:
    printed = run_example("distillation/job.py", tmp_path)
    run = finished(tmp_path, "distillation")
    first, last = run.metrics[0], run.metrics[-1]
    assert last["accuracy"] > first["alone"] + 0.2
    assert min(last["networks"], last["forests"]) > 0.7
    assert f"on {first['alone']:.0%} of the test digits" in printed
    assert set(run.get_result().params) == {"scores", "rows"}  # no site's parameters came to the server


def test_statistics_groups_and_a_fit(tmp_path: Path, data_folder: Path) -> None:
    printed = run_example("statistics/job.py", tmp_path, data=data_folder)
    columns = finished(tmp_path, "statistics").events("statistics")[-1]["columns"]
    with np.load(data_folder / "credit_default.npz") as file:
        x, y = file["x"].astype(float), file["y"]
    assert columns["age"]["groups"][""]["mean"] == pytest.approx(x[:, 4].mean(), rel=1e-12)
    assert columns["age"]["groups"]["eu"]["count"] == 22_500
    assert columns["label"]["groups"][""]["sum"] == y.sum()
    assert all(n == 0 or n >= 20 for site in columns["age"]["sites"].values() for n in site["histogram"]["counts"])
    assert finished(tmp_path, "groups").get_result().params["counts"].sum() > 29_900  # cells of fewer than 20 are left out
    fitted = finished(tmp_path, "risk").get_result().params["coef_"]
    pooled = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000, solver="newton-cholesky")
    assert_allclose(fitted, pooled.fit(np.column_stack([x[:, 4], np.log10(x[:, 0]), x[:, 5]]), y).coef_, rtol=1e-4)
    assert "There is no" not in printed


def test_statistics_without_data_say_so_and_go_on(tmp_path: Path) -> None:
    printed = run_example("statistics/job.py", tmp_path)
    assert "There is no /nowhere/credit_default.npz" in printed
    assert finished(tmp_path, "statistics").events("statistics")[-1]["columns"]["radius"]["groups"][""]["count"] == 569


def test_cross_site_scores_every_model_everywhere(tmp_path: Path) -> None:
    printed = run_example("cross_site/job.py", tmp_path)
    [event] = finished(tmp_path, "cross-site").events("cross_site")
    accuracy = {model: {site: metrics["accuracy"] for site, metrics in row.items()} for model, row in event["scores"].items()}
    sites = ["ada", "bob", "cy"]
    assert list(accuracy) == ["server", *sites]
    for site in sites:
        assert accuracy[site][site] > 0.95
        assert accuracy[site][site] > max(accuracy[other][site] for other in sites if other != site) + 0.1
    assert min(accuracy["server"].values()) > 0.8
    assert accuracy["cy"]["ada"] < 0.5
    assert re.search(rf"server +{accuracy['server']['ada']:.4f} ", printed)


def test_a_federation_of_processes_keeps_to_the_sites_policies(tmp_path: Path) -> None:
    printed = run_example("federation/job.py", tmp_path)
    run = finished(tmp_path, "federation")
    assert abs(float(re.findall(r"the slope is \[(.*?)\]", printed)[0]) - 3) < 0.1
    assert [set(metrics) for metrics in run.metrics] == [{"loss"}] * 3
    assert "known of each round: loss\n" in printed


def test_fine_tuning_from_init_to_deployment_and_back(tmp_path: Path) -> None:
    printed = run_example("finetuning/demo.py", tmp_path)
    (report,) = tmp_path.glob("runs/finetuning-001/acme/runs/*/finetuning.html")
    assert f"report   {report}" in printed
    assert "Accepted" in report.read_text("utf-8")
    run = Run(report.parent)
    figures = {(event["what"], event["party"]): event for event in run.events("figures")}
    before, together = figures["base", "north"], figures["candidate", "north"]
    assert together["eer"] < 0.7 * before["eer"]
    assert together["hter"] < 0.7 * before["hter"]
    assert together["eer"] < figures["vendor alone", "north"]["eer"]  # augmentation alone does not repair it
    assert figures["candidate", "acme"]["hter"] < figures["base", "acme"]["hter"] + 0.02 < figures["client alone", "acme"]["hter"]
    table = printed[printed.index("EER north") :]
    assert re.search(rf"together +{together['eer']:.1%} +{together['hter']:.1%} ", table)
    assert "Accepted: the candidate is not worse by more than the margin." in table
    assert processes_in(tmp_path) == []
    for line in re.findall(r"^  hanse (.*)$", printed, re.MULTILINE):  # what it says to try
        command = [sys.executable, "-m", "hanse.cli.main", *shlex.split(line)]
        done = subprocess.run(command, cwd=tmp_path / "runs" / "finetuning-001", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "rolled back" in done.stdout


def test_fine_tuning_leaves_no_process_behind_when_it_is_stopped(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", EXAMPLES / "finetuning" / "demo.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        begun = any(line.startswith("data check") for line in process.stdout)  # both sites are at it
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert begun, said
    assert process.returncode == 130
    assert processes_in(tmp_path) == []


def processes_in(folder: Path) -> list[list[str]]:
    """The command lines of the processes that work in the folder or below."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(folder):
                found.append(process.cmdline())
    return found


def test_asynchronous_needs_less_simulated_time(tmp_path: Path) -> None:
    printed = run_example("asynchronous/job.py", tmp_path)
    runs = {name: finished_late(tmp_path, name) for name in ("all-together", "deadline", "buffered", "one-by-one")}
    ended_s = {name: run.events("round")[-1]["virtual_s"] for name, run in runs.items()}
    assert ended_s["all-together"] > 10 * ended_s["deadline"] > 15 * ended_s["buffered"]
    for name in ("all-together", "deadline", "buffered"):
        assert runs[name].metrics[-1]["accuracy"] >= 0.9
        assert re.search(rf"{name} +{len(runs[name].metrics)} .* {ended_s[name] / 60:.1f} min", printed)
    assert float(printed.split()[-1]) > 0.85  # one by one, on all


def finished_late(folder: Path, job: str) -> Run:
    """The complete run of a job whose slow sites may have missed a deadline; nothing else failed."""
    run = Run(folder / "runs" / f"{job}-001")
    assert run.get_status() == "completed"
    assert {event["code"] for event in run.events("failure")} <= {"DeadlineExceeded"}
    return run


def test_every_example_is_described_and_tested() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    tests = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for folder in folders:
        assert (EXAMPLES / folder / "README.md").is_file()
        assert f"examples/{folder}/" in page
        assert f'"{folder}/' in tests


@pytest.mark.parametrize(("page", "job"), [("README.md", "hello"), ("docs/recipes.md", "first"), ("docs/own-algorithm.md", "line-search")])
def test_the_first_program_on_a_page_runs(page: str, job: str, tmp_path: Path) -> None:
    program = re.search(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert program is not None
    (tmp_path / "job.py").write_text(program[1])
    run_example(str(tmp_path / "job.py"), tmp_path)
    run = finished(tmp_path, job)
    params = run.get_result().params
    if job == "hello":
        assert params["mean"] == pytest.approx(2.9, abs=0.1)  # 3 · (1 - 0.5 ** 5)
    if job == "line-search":
        losses = [metrics["loss"] for metrics in run.metrics]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]
