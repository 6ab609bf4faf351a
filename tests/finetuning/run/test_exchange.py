from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hanse.environments import PocEnv, resume
from hanse.errors import JobFailed
from hanse.finetuning.contract import read_project, write_project
from hanse.finetuning.points import digest_of
from hanse.server.run import Run
from hanse.site.ledger import read, verify

Figures = Callable[[Run, str, str], dict[str, float]]


def result(run: Run) -> str:
    return digest_of(run.get_result().params)


def tasks_of(run: Run, party: str) -> list[str]:
    return [event["task"] for event in run.events("crossed") if event["party"] == party]


@pytest.mark.parametrize(
    ("learning", "trained"),
    [
        ({"mode": "rehearsed"}, ["train"] * 4),
        ({"mode": "rehearsed", "bits": 4, "adapter": "lora", "lora_rank": 2}, ["train"] * 4),
        ({"mode": "gradient-mix", "iterations": 60}, ["gradient"] * 60),
        ({"mode": "one-shot", "client_alone_steps": 60}, ["train"]),
        ({"mode": "average", "round_trips": 6, "client_steps": 20}, ["train"] * 6),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_every_mode_makes_the_client_better(pair: Any, figures: Figures, learning: dict[str, Any], trained: list[str]) -> None:
    run = pair.execute(**learning)
    assert [task for task in tasks_of(run, "north") if task in ("train", "gradient")] == trained
    before, after = figures(run, "base", "north"), figures(run, "candidate", "north")
    assert after["eer"] < before["eer"] * (1 if learning["mode"] == "one-shot" else 0.8)
    forgot = figures(run, "candidate", "acme")["eer"] - figures(run, "base", "acme")["eer"]
    assert forgot < (0.2 if learning["mode"] == "one-shot" else 0.05)  # nobody rehearses there
    assert run.get_result().meta["finetuning"]["outcome"] in ("accepted", "inconclusive", "rejected")


def test_the_same_bits_with_any_number_of_workers_and_over_real_processes(pair: Any) -> None:
    recipe = pair.recipe()
    expected = result(recipe.execute(pair.env()))
    for env in (pair.env(workers=2), PocEnv(sites=["acme", "north"], site_config=pair.env().site_config, runs=pair.runs, console="quiet")):
        for folder in (pair.vendor, pair.client):
            shutil.rmtree(folder / "exchange")
        assert result(recipe.execute(env)) == expected


def test_what_crosses_is_small_whole_and_written_down_on_both_sides(pair: Any) -> None:
    run = pair.execute()
    left = [event for event in run.events("crossed") if event["party"] == "north" and event["task"] == "train"]
    tensors = {tensor["name"] for event in left for tensor in event["tensors"]}
    assert {name.partition("/")[0] for name in tensors} == {"values", "scales"}
    assert {tensor["dtype"] for event in left for tensor in event["tensors"] if tensor["name"].startswith("values/")} == {"int8"}
    ledger = pair.client / "exchange" / "left.jsonl"
    assert verify(ledger) > 0
    theirs = [line["tensors"] for line in read(ledger) if line["task"] == "train"]
    assert theirs == [event["tensors"] for event in left]


def test_only_the_adapter_travels(pair: Any) -> None:
    run = pair.execute(adapter="lora", lora_rank=2)
    names = {t["name"] for event in run.events("crossed") for t in event["tensors"] if t["name"].startswith("values/")}
    assert names == {
        f"values/{name}"
        for name in ("0.weight.lora_a", "0.weight.lora_b", "3.weight.lora_a", "3.weight.lora_b", "1.weight", "1.bias", "5.weight", "5.bias")
    }
    frozen = {"0.bias", "3.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    base, after = pair.recipe(adapter="lora", lora_rank=2).first_model()[0].params, run.get_result().params
    assert all(np.array_equal(base[name], after[name]) for name in frozen)
    assert not np.array_equal(base["0.weight"], after["0.weight"])


def test_it_goes_on_where_it_was_even_where_a_party_has_lost_what_it_remembered(pair: Any) -> None:
    undisturbed = result(pair.execute())
    for folder in (pair.vendor, pair.client):
        shutil.rmtree(folder / "exchange")
    recipe = pair.recipe()
    state: dict[str, int] = {"turns": 0}
    original = recipe.app._handlers["train"]

    def failing(model: Any, site: Any) -> Any:
        state["turns"] += 1
        if state["turns"] == 4:
            raise RuntimeError("the power is gone")
        return original(model, site)

    recipe.app._handlers["train"] = failing
    try:
        with pytest.raises(JobFailed, match="the power is gone"):
            recipe.execute(pair.env())
    finally:
        recipe.app._handlers["train"] = original
    (folder,) = [path for path in pair.runs.iterdir() if Run(path).get_status() == "failed"]
    for path in (pair.client / "exchange" / "points").rglob("*.safetensors"):
        path.unlink()
    assert result(resume(folder, console="quiet", workers=1)) == undisturbed


def test_a_failed_data_check_ends_the_run_before_anything_is_trained(pair: Any) -> None:
    data = dict(np.load(pair.client / "train.npz"))
    np.savez(pair.client / "train.npz", **{**data, "labels": np.zeros_like(data["labels"])})
    with pytest.raises(JobFailed, match="data check failed at 'north'"):
        pair.execute()
    (run,) = [Run(path) for path in pair.runs.iterdir()]
    assert set(tasks_of(run, "acme")) | set(tasks_of(run, "north")) <= {"prepare", "install"}
    assert (pair.client / "reports" / "data-check.html").is_file()


def test_parties_must_have_agreed_on_the_same(pair: Any) -> None:
    recipe = pair.recipe()
    project = read_project(pair.client)
    write_project(pair.client, msgspec.structs.replace(project, seed=1))
    with pytest.raises(JobFailed, match="another contract"):
        recipe.execute(pair.env())


def test_it_stops_when_the_client_gets_no_better(pair: Any) -> None:
    run = pair.execute(round_trips=10, patience=2, client_learning_rate=1e-7, vendor_learning_rate=1e-7)
    assert tasks_of(run, "north").count("train") == 3
    assert any("has not improved" in event["text"] for event in run.events("message"))


def test_both_controls_are_run_and_measured_by_both(pair: Any, figures: Figures) -> None:
    run = pair.execute(controls=True, vendor_alone_steps=20, client_alone_steps=100)
    assert figures(run, "client alone", "north")["eer"] < figures(run, "base", "north")["eer"]
    assert figures(run, "client alone", "acme")["eer"] > figures(run, "candidate", "acme")["eer"]
    assert figures(run, "vendor alone", "acme")["rows"] == 800


def test_the_vendors_evidence_says_what_was_decided(pair: Any) -> None:
    run = pair.execute()
    (gate,) = run.events("gate")
    evidence = json.loads(gate["evidence"])
    assert evidence["about"]["new"] == result(run)
    (kept,) = (pair.vendor / "evidence").glob("*.json")
    assert kept.read_text() == gate["evidence"]
    assert not (pair.client / "evidence").exists()


def test_a_second_candidate_spends_a_second_try(pair: Any) -> None:
    pair.execute()
    run = pair.execute(client_steps=60)
    assert json.loads(run.events("gate")[0]["evidence"])["attempt"] == 2
    again = pair.recipe(client_steps=60).execute(pair.env())
    assert json.loads(again.events("gate")[0]["evidence"])["attempt"] == 2  # the same candidate once more is no new try


def test_nothing_of_a_slice_leaves_the_client(pair: Any) -> None:
    run = pair.execute()
    sent = {name for event in run.events("update") if event["site"] == "north" for name in event["metrics"]}
    assert not any("device" in name or "north-" in name for name in sent)
    (report, *_) = sorted(Path(pair.client / "reports").glob("evaluation-*.json"))
    assert "north-0" in report.read_text()
