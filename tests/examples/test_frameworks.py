"""The examples of frameworks; see test_examples.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.examples.running import finished, run_example


def test_torchrun_trains_in_two_processes_a_site(tmp_path: Path) -> None:
    run_example("torchrun/job.py", tmp_path)
    run = finished(tmp_path, "torchrun")
    assert run.metrics[0]["accuracy"] < 0.3 < 0.7 < run.metrics[-1]["accuracy"]
    lines = (run.folder / "logs" / "site-2.log").read_text().splitlines()
    assert {line.rpartition(":")[0] for line in lines} == {"process 0 of 2", "[1] process 1 of 2"}


def test_keras(tmp_path: Path) -> None:
    run_example("keras/job.py", tmp_path)
    assert finished(tmp_path, "keras").metrics[-1]["accuracy"] > 0.9


def test_monai_on_x_rays(tmp_path: Path, data_folder: Path) -> None:
    printed = run_example("monai/job.py", tmp_path, data=data_folder)
    assert "There is no" not in printed
    assert finished(tmp_path, "monai").facts["best"]["value"] > 0.75


def test_local_sgd_trains_many_sites_at_once(tmp_path: Path) -> None:
    printed = run_example("local_sgd/job.py", tmp_path)
    run = finished(tmp_path, "local-sgd")
    assert run.metrics[0]["loss"] > 2 > 1 > run.metrics[-1]["loss"]
    accuracy = re.search(r"no site has: (0\.\d+)", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.7


@pytest.mark.parametrize(
    ("name", "jobs", "least"),
    [
        ("xgboost/job.py", ["xgboost"], 0.77),
        ("jax/job.py", ["jax"], 0.95),
        ("sklearn_models/job.py", ["bayes", "ridge", "svm"], 0.92),
    ],
)
def test_frameworks_give_the_same_bits_simulated_and_in_processes(
    name: str, jobs: list[str], least: float, tmp_path: Path, data_folder: Path
) -> None:
    folders = {argument: tmp_path / (argument or "simulated") for argument in ("", "poc")}
    for argument, folder in folders.items():
        folder.mkdir()
        run_example(name, folder, *argument.split(), data=data_folder)
    for job in jobs:
        simulated, real = (finished(folder, job) for folder in folders.values())
        assert simulated.facts["best"]["value"] > least
        assert (real.facts["best"], real.metrics) == (simulated.facts["best"], simulated.metrics)
        models = [(run.folder / "model.safetensors").read_bytes() for run in (simulated, real)]
        assert models[0] == models[1]


def test_xgboost_without_data_says_so_and_goes_on(tmp_path: Path) -> None:
    assert "There is no /nowhere/credit_default.npz" in run_example("xgboost/job.py", tmp_path)
    assert finished(tmp_path, "xgboost").facts["best"]["value"] > 0.95


def test_lightning_learns_digits(tmp_path: Path) -> None:
    run_example("lightning/job.py", tmp_path)
    run = finished(tmp_path, "lightning")
    assert run.metrics[0]["accuracy"] < 0.3
    assert run.facts["best"]["value"] > 0.85
    weights = {event["weight"] for event in run.events("update")}
    assert weights == {24}  # 2 epochs of 360 pictures in batches of 32, in every round


def test_hugging_face_learns_spam_by_adapters(tmp_path: Path, data_folder: Path) -> None:
    printed = run_example("huggingface/job.py", tmp_path, data=data_folder)
    run = finished(tmp_path, "spam")
    assert "23,746 of 67,076 parameters travel" in printed
    assert sum(tensor.size for tensor in run.get_result().params.values()) == 23_746
    assert all("lora" in name or "classifier" in name for name in run.get_result().params)
    assert run.metrics[0]["eval_accuracy"] < 0.88 < 0.96 < run.facts["best"]["value"]  # 87 of 100 messages are no spam
