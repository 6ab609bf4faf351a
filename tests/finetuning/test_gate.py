from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hanse.cli.finetune.gate import app
from hanse.errors import ConfigError, IdentityError, Refused
from hanse.finetuning.contract import Gate
from hanse.finetuning.evidence import Evidence, Finding, override, read_evidence, signed_by, write_evidence
from hanse.finetuning.gate import decide, findings, outcome_of, reproduce, stored_scores
from hanse.finetuning.metrics import Scores, keep_scores
from hanse.identity.authority import Authority, new_signing_key, public_key
from hanse.identity.certificates import Identity, Role
from hanse.identity.signatures import Signer

GATE = Gate(resamples=400)


def versions(
    per_class: int, *, lost: int, won: int, both: int = 20, positives: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of an old and a new version, and labels.

    Of each class the new one gets `lost` more rows wrong and `won` more right, and both get `both` wrong; they stand in this order.
    """
    labels = np.repeat([0, 1], [per_class, per_class if positives is None else positives])
    place = np.concatenate([np.arange((labels == label).sum()) for label in (0, 1)])
    old_wrong = (place >= lost) & (place < lost + won + both)
    new_wrong = (place < lost) | ((place >= lost + won) & (place < lost + won + both))
    sure = np.linspace(0.6, 1, len(labels))
    return (*(np.where(labels ^ missed, sure, 1 - sure) for missed in (old_wrong, new_wrong)), labels)


def decided(rows, *, gate: Gate = GATE, tries_before: int = 0, **options) -> Evidence:
    old, new, labels = rows
    return decide(
        old, new, labels, old_threshold=0.5, new_threshold=0.5, gate=gate, tries_before=tries_before, seed=options.pop("seed", 1), **options
    )


def verdicts(evidence: Evidence) -> dict[str, str]:
    return {finding.test: finding.verdict for finding in evidence.findings}


def finding(evidence: Evidence, test: str) -> Finding:
    return next(found for found in evidence.findings if found.test == test)


def test_an_equal_version_is_accepted():
    evidence = decided(versions(3000, lost=15, won=15), gate=Gate())
    assert evidence.outcome == "accepted"
    assert evidence.passes
    assert verdicts(evidence) == {"non-inferiority": "passed", "mcnemar": "passed"}
    numbers = finding(evidence, "non-inferiority").numbers
    assert numbers["difference"] == 0
    assert numbers["margin"] == 0.005
    assert numbers["alpha"] == pytest.approx(0.05 / 3)
    spread = np.sqrt(0.01 / 6000)  # of the difference: √((d₀ + d₁) / 4 n), d = 1 %
    assert numbers["high"] == pytest.approx(2.13 * spread, rel=0.2)
    assert "HTER is 1.17 %" in evidence.words


def test_the_margin_grows_with_the_old_versions_rate():
    evidence = decided(versions(3000, lost=15, won=15, both=285))  # old HTER 10 %
    assert finding(evidence, "non-inferiority").numbers["margin"] == pytest.approx(0.025)


def test_a_version_that_is_worse_by_more_than_the_margin_is_rejected():
    evidence = decided(versions(3000, lost=60, won=5))  # by 1.8 pp
    assert evidence.outcome == "rejected"
    assert not evidence.passes
    assert "worse by more than the margin" in evidence.words


def test_a_large_loss_that_is_not_proven_is_left_open_with_how_many_rows_more():
    evidence = decided(versions(400, lost=6, won=2))
    assert evidence.outcome == "inconclusive"
    numbers = finding(evidence, "non-inferiority").numbers
    assert numbers["differing"] == 16 / 800
    # (2.128 + 0.842)² · (0.02 + 0.02) / 4 / 0.0075², as the old version's HTER is 5.5 % and δ a quarter of it
    margin = 0.25 * 22 / 400
    assert numbers["margin"] == pytest.approx(margin)
    assert numbers["needed_per_class"] == pytest.approx((2.128 + 0.842) ** 2 * 0.01 / margin**2, rel=0.01)
    assert numbers["more_negatives"] == numbers["needed_per_class"] - 400
    assert f"{numbers['more_negatives']:,} negatives" in evidence.words


@pytest.mark.parametrize(("per_class", "positives"), [(150, 150), (3000, 299), (3000, 0), (0, 0)])
def test_too_few_rows_are_never_a_pass(per_class, positives):
    evidence = decided(versions(per_class, lost=0, won=2, both=5, positives=positives))
    assert evidence.outcome == "inconclusive"
    assert f"{per_class:,} negatives and {positives:,} positives" in evidence.words
    numbers = finding(evidence, "size").numbers
    assert numbers["more_positives"] == numbers["needed_per_class"] - positives >= 300 - positives


def test_too_few_rows_do_not_reject_either():
    assert decided(versions(20, lost=15, won=0, both=0)).outcome == "inconclusive"


def test_too_few_groups():
    rows = versions(600, lost=0, won=3)
    groups = [str(row % 30) for row in range(1200)]
    assert decided(rows, groups=groups).outcome == "accepted"
    few = decided(rows, groups=[str(row % 5) for row in range(1200)])
    assert few.outcome == "inconclusive"
    assert "5 groups" in few.words


def test_groups_widen_the_bound():
    rows = versions(3000, lost=15, won=15)
    alone = finding(decided(rows), "non-inferiority").numbers
    together = finding(decided(rows, groups=[str(row // 15) for row in range(6000)]), "non-inferiority").numbers  # all lost ones in one
    assert together["high"] > alone["high"]


def test_a_proven_small_loss_needs_a_person():
    evidence = decided(versions(12_000, lost=50, won=15, both=100))  # 0.29 pp, surely
    assert verdicts(evidence) == {"non-inferiority": "passed", "mcnemar": "open"}
    assert evidence.outcome == "inconclusive"
    assert "person" in evidence.words
    assert finding(evidence, "mcnemar").numbers["worse"] == 100


def test_a_proven_gain_needs_nobody():
    assert decided(versions(3000, lost=2, won=40)).outcome == "accepted"


def test_a_slice_that_got_worse_is_found_among_others_that_got_better():
    rows = versions(3000, lost=15, won=15)
    place = np.arange(6000) % 3000
    slices = {"device": ["bad" if p < 15 else "good" if p < 30 else str(p % 5) for p in place]}
    evidence = decided(rows, slices=slices)
    assert verdicts(evidence)["slices"] == "open"
    assert "device = bad (30 worse, 0 better)" in evidence.words
    assert evidence.outcome == "inconclusive"
    assert verdicts(decided(rows, slices={"device": [str(p % 5) for p in place]}))["slices"] == "passed"
    assert set(evidence.new.slices["device"]) == {"bad", "good", "0", "1", "2", "3", "4"}


@pytest.mark.parametrize(("ceiling", "verdict"), [(0.02, "passed"), (0.012, "open"), (0.006, "failed")])
def test_ceilings(ceiling, verdict):
    gate = msgspec.structs.replace(GATE, fnr_ceiling=ceiling, fpr_ceiling=0.5)
    evidence = decided(versions(3000, lost=15, won=15), gate=gate)  # 35 of 3,000
    assert verdicts(evidence)["fpr ceiling"] == "passed"
    assert verdicts(evidence)["fnr ceiling"] == verdict
    assert evidence.outcome == {"passed": "accepted", "open": "inconclusive", "failed": "rejected"}[verdict]


def test_a_ceiling_by_groups():
    gate, groups = msgspec.structs.replace(GATE, fnr_ceiling=0.02), [str(row // 20) for row in range(6000)]
    rows = versions(3000, lost=15, won=15)
    alone, together = decided(rows, gate=gate), decided(rows, gate=gate, groups=groups)  # all 35 errors lie in two groups
    assert finding(together, "fnr ceiling").numbers["high"] > finding(alone, "fnr ceiling").numbers["high"]
    assert verdicts(together)["fnr ceiling"] == "open"


def test_enough_rows_are_not_said_to_be_lacking():
    evidence = decided(versions(6000, lost=45, won=10, both=30))
    assert verdicts(evidence)["non-inferiority"] == "open"
    assert finding(evidence, "non-inferiority").numbers["more_negatives"] == 0
    assert "The rows are enough" in evidence.words


def test_without_a_margin_no_number_is_enough():
    gate = msgspec.structs.replace(GATE, margin_abs=0.0, margin_rel=0.0)
    assert "no number of rows is enough" in decided(versions(3000, lost=15, won=15), gate=gate).words


def test_small_losses_do_not_add_up():
    first, old, labels = versions(3000, lost=40, won=0)
    _, new, _ = versions(3000, lost=42, won=0)
    assert decided((old, new, labels)).outcome == "accepted"
    evidence = decided((old, new, labels), first=(first, 0.5))  # worse than the first by 1.4 pp; 2 δ is 1 pp
    assert verdicts(evidence)["anti-ratchet"] == "failed"
    assert evidence.outcome == "rejected"
    assert finding(evidence, "anti-ratchet").numbers["margin"] == 0.01
    assert evidence.first is not None


def test_tries_spend_the_level_and_run_out():
    rows = versions(3000, lost=15, won=15)
    once = decided(rows, gate=msgspec.structs.replace(GATE, max_tries=1))
    often = decided(rows, gate=msgspec.structs.replace(GATE, max_tries=10))
    assert finding(often, "non-inferiority").numbers["high"] > finding(once, "non-inferiority").numbers["high"]
    assert decided(rows, tries_before=2).outcome == "accepted"
    spent = decided(rows, tries_before=3)
    assert spent.outcome == "inconclusive"
    assert "3 candidates were put to this gate before" in spent.words
    assert decided(versions(3000, lost=60, won=5), tries_before=3).outcome == "rejected"


@pytest.mark.parametrize("metric", ["hter", "eer", "fpr", "fnr", "error"])
def test_every_metric_decides(metric):
    gate = msgspec.structs.replace(GATE, metric=metric)
    assert decided(versions(3000, lost=5, won=6), gate=gate).outcome == "accepted"
    assert decided(versions(3000, lost=90, won=0), gate=gate).outcome == "rejected"


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 9))
def test_a_version_that_is_better_everywhere_is_never_worse_off(lost, won, seed):
    order = {"rejected": 0, "inconclusive": 1, "accepted": 2}
    gate = msgspec.structs.replace(GATE, margin_rel=0.0)
    some = decided(versions(1000, lost=lost, won=won), gate=gate, seed=seed).outcome
    better = decided(versions(1000, lost=max(0, lost - 12), won=won + 12), gate=gate, seed=seed).outcome
    assert order[better] >= order[some]


def test_of_equal_versions_most_are_accepted_and_of_worse_ones_few():
    """The benchmark has the full claims; this has 40 draws."""
    found = {}
    for lost, won in ((15, 15), (30, 0)):  # 1 % differ; equal, and worse by 1 pp
        rng, outcomes = np.random.default_rng(0), Counter[str]()
        for _ in range(40):
            old, new, labels = versions(3000, lost=rng.binomial(3000, lost / 3000), won=rng.binomial(3000, won / 3000))
            scores = {name: Scores([], labels, column) for name, column in (("old", old), ("new", new))}
            outcomes[outcome_of(findings(scores, {"old": 0.5, "new": 0.5}, gate=GATE, tries_before=0, seed=0))] += 1
        found[won] = outcomes
    assert found[15]["accepted"] >= 34
    assert found[15]["rejected"] == 0
    assert found[0]["accepted"] == 0


# ---------------------------------------------------------------------------------------------------------------------------- evidence


ROWS = versions(700, lost=9, won=3)
SLICES = {"device": [str(row % 4) for row in range(1400)]}
NAMES = [f"{row}.png" for row in range(1400)]


def evidence_with_scores(folder: Path, **options) -> Evidence:
    old, new, labels = ROWS
    for column in (old, new):
        keep_scores(folder / "scores", Scores(NAMES, labels, column, SLICES, options.get("groups")))
    evidence = decided(ROWS, slices=SLICES, names=NAMES, about={"contract": "blake3:00"}, **options)
    write_evidence(folder / "evidence.json", evidence)
    return evidence


@pytest.mark.parametrize(
    "options", [{}, {"groups": [str(row // 10) for row in range(1400)]}, {"first": (ROWS[0], 0.45)}, {"tries_before": 4}]
)
def test_a_decision_can_be_made_again_to_the_byte(tmp_path, options):
    evidence = evidence_with_scores(tmp_path, **options)
    read = read_evidence(tmp_path / "evidence.json")
    assert read == evidence
    again = reproduce(read, stored_scores(read, tmp_path / "scores"))
    assert again.json == (tmp_path / "evidence.json").read_bytes()
    assert again.digest == evidence.digest


def test_evidence_is_the_same_once_read_whatever_types_the_numbers_had(tmp_path):
    gate = Gate(margin_abs=0, margin_rel=1, fnr_ceiling=1, resamples=200)
    old, new, labels = ROWS
    evidence = decide(
        old.astype("f4"), new.tolist(), labels.tolist(), old_threshold=np.float32(0.5), new_threshold=1, gate=gate, tries_before=0, seed=1
    )
    write_evidence(tmp_path / "evidence.json", evidence)
    assert read_evidence(tmp_path / "evidence.json").json == evidence.json


def test_evidence_does_not_hold_rows(tmp_path):
    evidence_with_scores(tmp_path)
    assert b".png" not in (tmp_path / "evidence.json").read_bytes()


def test_other_scores_are_noticed(tmp_path):
    evidence = evidence_with_scores(tmp_path)
    scores = stored_scores(evidence, tmp_path / "scores")
    changed = scores["new"].scores.copy()
    changed[7] = 0.5
    with pytest.raises(ConfigError, match="scores of the new version are not those"):
        reproduce(evidence, scores | {"new": Scores(NAMES, ROWS[2], changed, SLICES)})
    with pytest.raises(ConfigError, match="scores of the old version are not those"):
        reproduce(evidence, {"new": scores["new"]})
    with pytest.raises(ConfigError, match="version 0 of the gate"):
        reproduce(msgspec.structs.replace(evidence, gate_version="0"), scores)


def test_a_file_that_holds_no_evidence(tmp_path):
    (tmp_path / "evidence.json").write_text('{"outcome": "accepted"}')
    with pytest.raises(ConfigError, match=r"evidence\.json holds no evidence"):
        read_evidence(tmp_path / "evidence.json")


WHEN = datetime(2026, 3, 2, 9, 14, 7, tzinfo=UTC)
ROOT = Authority.new_root("study")


def signer(name: str) -> Signer:
    key = new_signing_key()
    return Signer(key, ROOT.issue(Identity("study", Role.RESEARCHER, name, "Vendor"), public_key(key), days=1))


ADA, BOB = signer("ada@vendor.example"), signer("bob@vendor.example")


def test_a_person_decides_what_the_gate_left_open(tmp_path):
    evidence = evidence_with_scores(tmp_path)
    assert evidence.outcome == "inconclusive"
    assert not evidence.passes
    signed = override(evidence, ADA, accepted=True, why="the client waits", when=WHEN)
    assert signed.passes
    assert signed.outcome == "inconclusive"
    assert signed_by(signed, ROOT.roots).name == "ada@vendor.example"
    assert signed.human is not None
    assert signed.human.when == "2026-03-02T09:14:07+00:00"
    assert not override(evidence, ADA, accepted=False, why="no", when=WHEN).passes
    write_evidence(tmp_path / "signed.json", signed)
    read = read_evidence(tmp_path / "signed.json")
    assert signed_by(read, ROOT.roots).organisation == "Vendor"
    assert reproduce(read, stored_scores(read, tmp_path / "scores")).json == signed.json
    with pytest.raises(Refused, match="has decided already"):
        override(signed, BOB, accepted=False, why="no", when=WHEN)


@pytest.mark.parametrize("change", [{"why": "another"}, {"accepted": False}, {"by": "eve"}, {"evidence": "blake3:00"}, {"signature": b""}])
def test_an_altered_decision_is_noticed(tmp_path, change):
    signed = override(evidence_with_scores(tmp_path), ADA, accepted=True, why="the client waits", when=WHEN)
    altered = msgspec.structs.replace(signed, human=msgspec.structs.replace(signed.human, **change))
    with pytest.raises(IdentityError):
        signed_by(altered, ROOT.roots)


def test_a_decision_is_for_one_evidence_and_by_whom_it_names(tmp_path):
    evidence = evidence_with_scores(tmp_path)
    signed = override(evidence, ADA, accepted=True, why="the client waits", when=WHEN)
    with pytest.raises(IdentityError, match="other evidence"):
        signed_by(msgspec.structs.replace(signed, seed=2), ROOT.roots)
    pretender = SimpleNamespace(identity=ADA.identity, sign=BOB.sign)
    with pytest.raises(IdentityError, match=r"names ada@vendor\.example of Vendor, and bob@vendor\.example"):
        signed_by(override(evidence, pretender, accepted=True, why="the client waits", when=WHEN), ROOT.roots)
    with pytest.raises(IdentityError, match="no person has decided"):
        signed_by(evidence, ROOT.roots)


@pytest.mark.parametrize("rows", [versions(3000, lost=60, won=5), versions(3000, lost=5, won=5)])
def test_nobody_overrides_a_decision_of_the_gate(rows):
    evidence = decided(rows)
    with pytest.raises(Refused, match=evidence.outcome):
        override(evidence, ADA, accepted=evidence.outcome == "rejected", why="please", when=WHEN)
    forged = msgspec.structs.replace(override(decided(ROWS), ADA, accepted=True, why="please", when=WHEN), outcome="rejected")
    assert not forged.passes


def test_a_decision_needs_a_reason():
    with pytest.raises(ConfigError, match="reason"):
        override(decided(ROWS), ADA, accepted=True, why=" ", when=WHEN)


# ------------------------------------------------------------------------------------------------------------------------ command line


def test_the_command_shows_and_reproduces(tmp_path):
    evidence = evidence_with_scores(tmp_path)
    path, run = str(tmp_path / "evidence.json"), CliRunner().invoke
    shown = run(app, ["gate-show", path])
    assert shown.exit_code == 0, shown.output
    assert evidence.words in shown.output
    assert "device = 3" in shown.output
    assert run(app, ["gate-show", path, "--json"]).output.encode() == evidence.json
    assert "APCER" in run(app, ["gate-show", path, "--sector", "presentation attacks"]).output

    scores = ["--scores", str(tmp_path / "scores")]
    same = run(app, ["gate-reproduce", path, *scores])
    assert (same.exit_code, same.output) == (0, f"the same: inconclusive, {evidence.digest}\n")
    write_evidence(tmp_path / "evidence.json", msgspec.structs.replace(evidence, outcome="accepted"))
    other = run(app, ["gate-reproduce", path, *scores, "--json"])
    assert other.exit_code == 1
    assert json.loads(other.output) == {"same": False, "outcome": "inconclusive", "digest": evidence.digest}
    assert "the scores give inconclusive, the evidence says accepted" in run(app, ["gate-reproduce", path, *scores]).output
