"""Routing: which inputs a canary takes, when the current version changes, and when a candidate is one no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import ConfigError
from hanse.finetuning.contract import Schema
from hanse.finetuning.routing import Candidate, Router
from hanse.finetuning.scoring import Input, Item, Scorer, as_input

SCHEMA = Schema(kind="table", columns=["x"])
A, B, C = (f"blake3:{letter * 64}" for letter in "abc")
LOGITS = {A: -1.0, B: 0.0, C: 1.0}


class Constant(torch.nn.Module):
    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), 1), self.logit)


def load(version: str) -> Scorer:
    schema = Schema(kind="table", columns=["x", "y"]) if version.endswith("wide") else SCHEMA
    return Scorer(module=Constant(LOGITS.get(version, 0.0)), schema=schema, threshold=0.5, version=version)


def router(folder: Path, candidate: Candidate | None = None) -> Router:
    file = folder / "current"
    if not file.exists():
        file.write_text(A)
    return Router(file, file.read_text, load, candidate)


def switch(folder: Path, version: str) -> None:
    (folder / "part").write_text(version)
    (folder / "part").replace(folder / "current")


def inputs(count: int) -> list[Input]:
    read = [as_input(Item(str(row), [float(row)]), SCHEMA) for row in range(count)]
    return [each for each in read if isinstance(each, Input)]


def versions(routed: Router, count: int = 3) -> set[str]:
    routed.follow()
    return {answer.version for answer in routed.answer(inputs(count))[0]}


@given(st.binary(min_size=1, max_size=40), st.integers(0, 2**63), st.floats(1e-9, 1), st.floats(1e-9, 1))
def test_what_a_canary_takes_it_keeps_when_its_share_grows(digest: bytes, seed: int, one: float, other: float):
    small, large = sorted((one, other))
    assert Candidate(A, small, seed).takes(digest) <= Candidate(B, large, seed).takes(digest)
    assert Candidate(A, 1.0, seed).takes(digest)
    assert not Candidate(A, None, seed).takes(digest)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_share_is_met_and_the_seed_matters(share: float):
    digests = [number.to_bytes(8, "little") for number in range(4000)]
    taken = {seed: [Candidate(A, share, seed).takes(digest) for digest in digests] for seed in (0, 1)}
    deviation = 4 * (share * (1 - share) / 4000) ** 0.5
    assert all(abs(np.mean(each) - share) < deviation for each in taken.values())
    assert taken[0] != taken[1]


@pytest.mark.parametrize("share", [-0.1, 0.0, 1.01, float("nan")])
def test_shares_that_are_none(share: float):
    with pytest.raises(ConfigError, match="share"):
        Candidate(A, share)


def test_it_follows_the_file(tmp_path: Path):
    routed = router(tmp_path)
    assert versions(routed) == {A}
    for version in (B, A, C, A):
        switch(tmp_path, version)
        assert versions(routed) == {version}
    assert routed.problem == ""


def test_a_file_that_is_gone_or_names_another_kind_of_input_changes_nothing(tmp_path: Path):
    routed = router(tmp_path)
    (tmp_path / "current").unlink()
    assert versions(routed) == {A}
    assert routed.problem
    switch(tmp_path, "blake3:wide")
    assert versions(routed) == {A}
    assert "takes other inputs" in routed.problem
    switch(tmp_path, B)
    assert versions(routed) == {B}
    assert routed.problem == ""


def test_a_shadow_is_asked_after_the_answers(tmp_path: Path):
    routed = router(tmp_path, Candidate(C))
    given_ = inputs(5)
    answers, pairs = routed.answer(given_)
    assert pairs == []
    assert {answer.version for answer in answers} == {A}
    kept = routed.shadow(given_, answers)
    assert [pair.name for pair in kept] == list("01234")
    assert {(pair.current_decision, pair.candidate_decision, pair.answered_by) for pair in kept} == {(0, 1, "current")}


def test_a_canary_is_scored_by_both(tmp_path: Path):
    routed = router(tmp_path, Candidate(C, 0.3, seed=3))
    answers, pairs = routed.answer(inputs(100))
    took = [answer.name for answer in answers if answer.version == C]
    assert [pair.name for pair in pairs] == took
    assert 0 < len(took) < 100
    assert {(pair.current, pair.candidate, pair.answered_by) for pair in pairs} == {(A, C, "candidate")}
    assert routed.shadow(inputs(100), answers) == []


def test_a_candidate_that_was_deployed_and_rolled_back_answers_no_more(tmp_path: Path):
    routed = router(tmp_path, Candidate(C, 1.0))
    assert versions(routed) == {C}
    switch(tmp_path, B)  # another version is deployed: the canary goes on beside it
    assert routed.answer(inputs(1))[1] or versions(routed) == {C}
    switch(tmp_path, C)
    assert versions(routed) == {C}
    switch(tmp_path, A)
    assert versions(routed) == {A}
