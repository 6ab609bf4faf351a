"""The gate: whether a candidate may follow the version before it, decided on the vendor's holdout by rules fixed in the contract.

docs/gate.md says what it asks and why. Nothing here draws on a clock or on chance beyond the seed, so a decision can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from hanse.errors import ConfigError
from hanse.finetuning.contract import Gate
from hanse.finetuning.evidence import Evidence, Finding, Outcome, Verdict
from hanse.finetuning.metrics import Scores, evaluate, read_scores, rows_by_value, scores_file
from hanse.seeds import generator
from hanse.statistics.error_rates import Array, checked, metric
from hanse.statistics.intervals import bootstrap, bounds, clopper_pearson
from hanse.statistics.paired import Changes, changes, holm, mcnemar, needed_per_class, paired_bootstrap

GATE_VERSION = "1"
"""Changes with whatever may change a decision or its evidence."""
MIN_GROUPS = 20
"""With fewer groups, resampling them says too little of how much groups differ."""


def decide(
    old_scores: Array,
    new_scores: Array,
    labels: Array,
    *,
    old_threshold: float,
    new_threshold: float,
    gate: Gate,
    tries_before: int,
    seed: int,
    slices: Mapping[str, Sequence[str]] | None = None,
    groups: Sequence[str] | None = None,
    first: tuple[Array, float] | None = None,
    about: Mapping[str, str] | None = None,
    names: Sequence[str] | None = None,
) -> Evidence:
    """Whether the new version may follow the old one, with the evidence. The same arguments give the same bytes.

    old_scores, new_scores: float in [0, 1], shape (n,), of the same rows; each version is judged at its own threshold. labels: 0 or 1.
    tries_before: how many candidates were put to the gate on this holdout before. slices, groups, names: one value a row.
    first: scores and threshold of the first released version, if the old one is another.
    Raises ConfigError for rows that are none.
    """
    columns, of_rows = slices or {}, [str(row) for row in range(len(labels))] if names is None else names
    versions = {"old": (old_scores, old_threshold), "new": (new_scores, new_threshold)} | ({"first": first} if first else {})
    thresholds = {name: float(threshold) for name, (_, threshold) in versions.items()}
    stored = {}
    for name, (scores, _) in versions.items():
        values, truth = checked(scores, labels)
        stored[name] = Scores(of_rows, truth, values, columns, groups)
    found = findings(stored, thresholds, gate=gate, tries_before=tries_before, seed=seed)
    outcome = outcome_of(found)
    evaluations = {
        name: evaluate(rows.scores, rows.labels, thresholds[name], slices=columns, groups=groups, seed=seed, resamples=gate.resamples)
        for name, rows in stored.items()
    }
    evidence = Evidence(
        gate_version=GATE_VERSION,
        outcome=outcome,
        words=_words(outcome, found),
        findings=found,
        gate=gate,
        attempt=tries_before + 1,
        seed=seed,
        about=dict(about or {}),
        rows=stored["old"].rows_digest,
        scores={name: scores.digest for name, scores in stored.items()},
        old=evaluations["old"],
        new=evaluations["new"],
        first=evaluations.get("first"),
        numpy=np.__version__,
    )
    return evidence.canonical()


def findings(scores: Mapping[str, Scores], thresholds: Mapping[str, float], *, gate: Gate, tries_before: int, seed: int) -> list[Finding]:
    """What each of the gate's tests found. scores, thresholds: by "old", "new" and, if there is one, "first", all of the same rows."""
    comparison = _Comparison(scores, thresholds, gate, seed)
    found = [*_tries(gate, tries_before), *comparison.size()]
    if comparison.smaller_class:
        found += [comparison.non_inferiority(), *comparison.ceilings(), comparison.veto(), *comparison.slices(), *comparison.anti_ratchet()]
    return found


def outcome_of(found: Sequence[Finding]) -> Outcome:
    """Too few rows prove nothing, not even a loss: inconclusive. Otherwise one failed test rejects, and one open test leaves it open."""
    if any(finding.test == "size" for finding in found):
        return "inconclusive"
    verdicts = {finding.verdict for finding in found}
    return "rejected" if "failed" in verdicts else "inconclusive" if "open" in verdicts else "accepted"


def reproduce(evidence: Evidence, scores: Mapping[str, Scores]) -> Evidence:
    """The decision made again from the stored scores: with the same versions of gate and NumPy, the same bytes.

    What a person decided, and the note of NumPy's version, are taken over. Raises ConfigError for other scores or another gate's evidence.
    """
    if evidence.gate_version != GATE_VERSION:
        raise ConfigError(f"the evidence is of version {evidence.gate_version} of the gate, and this is {GATE_VERSION}")
    for name, digest in evidence.scores.items():
        if name not in scores or scores[name].digest != digest:
            raise ConfigError(f"the scores of the {name} version are not those of the evidence: {digest}")
    old, new, first = scores["old"], scores["new"], scores.get("first") if evidence.first else None
    again = decide(
        old.scores,
        new.scores,
        old.labels,
        old_threshold=evidence.old.threshold,
        new_threshold=evidence.new.threshold,
        gate=evidence.gate,
        tries_before=evidence.attempt - 1,
        seed=evidence.seed,
        slices=old.slices,
        groups=old.groups,
        first=(first.scores, evidence.first.threshold) if first and evidence.first else None,
        about=evidence.about,
        names=old.names,
    )
    return msgspec.structs.replace(again, human=evidence.human, numpy=evidence.numpy)


def stored_scores(evidence: Evidence, folder: Path) -> dict[str, Scores]:
    """The scores of the evidence, from where `keep_scores` kept them."""
    return {name: read_scores(scores_file(folder, digest)) for name, digest in evidence.scores.items()}


class _Comparison:
    """Old, new and first version on the same rows, and the tests that compare them. Each draws from a stream of its own."""

    def __init__(self, scores: Mapping[str, Scores], thresholds: Mapping[str, float], gate: Gate, seed: int) -> None:
        self.scores, self.thresholds, self.gate, self.seed = scores, thresholds, gate, seed
        rows = scores["new"]
        self.labels, self.groups, self.columns = rows.labels, rows.groups, rows.slices
        self.negatives, self.positives = (int((rows.labels == label).sum()) for label in (0, 1))
        self.smaller_class = min(self.negatives, self.positives)
        self.alpha = gate.alpha / gate.max_tries  # Bonferroni: every try spends its share, whether it comes or not
        self._drawn: dict[str, Array] = {}

    def size(self) -> list[Finding]:
        """Open if there are too few rows, or groups."""
        least, says, numbers = self.gate.min_per_class, [], dict[str, int | float | None]()
        if self.smaller_class < least:
            lack, numbers = self._lack("old", self._margin("old"))
            has = f"The holdout has {self.negatives:,} negatives and {self.positives:,} positives"
            says.append(f"{has}; this gate decides nothing with fewer than {least:,} of each. {lack}")
        if self.groups is not None and (groups := len(set(self.groups))) < MIN_GROUPS:
            says.append(f"The holdout's rows come from {groups:,} groups; resampling groups says nothing with fewer than {MIN_GROUPS}.")
        return [Finding("size", "open", " ".join(says), numbers | {"least": least})] if says else []

    def non_inferiority(self) -> Finding:
        """Whether new - old is at most δ."""
        return self._difference("non-inferiority", "old", self._margin("old"))

    def anti_ratchet(self) -> list[Finding]:
        """Whether new - first is at most 2 δ, so that many small losses do not add up."""
        return [self._difference("anti-ratchet", "first", 2 * self._margin("first"))] if "first" in self.scores else []

    def ceilings(self) -> list[Finding]:
        """Whether FPR and FNR of the new version are at most what the contract says."""
        found = []
        if self.gate.fpr_ceiling is not None:
            found.append(self._ceiling("fpr", self.gate.fpr_ceiling))
        if self.gate.fnr_ceiling is not None:
            found.append(self._ceiling("fnr", self.gate.fnr_ceiling))
        return found

    def veto(self) -> Finding:
        """Whether it is proven that more is decided worse than better. Then a person has to say that the loss is worth it."""
        counts = self._changes(np.arange(len(self.labels)))
        p = mcnemar(counts)
        proven = p < self.gate.mcnemar_alpha and counts.worse > counts.better
        unit = "Rows" if self.groups is None else "Groups"
        words = f"{unit} decided worse than before: {counts.worse:,}; better: {counts.better:,} (exact McNemar test, p = {p:.3g})."
        if proven:
            words += " So it is proven that the candidate is worse, if only a little: it does not pass without a person's decision."
        numbers: dict[str, int | float | None] = {"worse": counts.worse, "better": counts.better, "p": p, "alpha": self.gate.mcnemar_alpha}
        return Finding("mcnemar", "open" if proven else "passed", words, numbers)

    def slices(self) -> list[Finding]:
        """The same in each slice, with Holm's correction for their number."""
        counts = {
            f"{column} = {value}": self._changes(chosen)
            for column, values in self.columns.items()
            for value, chosen in rows_by_value(values).items()
        }
        if not counts:
            return []
        adjusted = holm({name: mcnemar(count) for name, count in counts.items()})
        worse = [name for name, count in counts.items() if adjusted[name] < self.gate.mcnemar_alpha and count.worse > count.better]
        if not worse:
            return [Finding("slices", "passed", f"In none of {len(counts):,} slices is the candidate proven worse.", dict(adjusted))]
        listed = ", ".join(f"{name} ({counts[name].worse:,} worse, {counts[name].better:,} better)" for name in worse)
        words = f"In {len(worse):,} of {len(counts):,} slices it is proven that the candidate is worse: {listed}."
        return [Finding("slices", "open", words, dict(adjusted))]

    def _difference(self, test: str, against: str, margin: float) -> Finding:
        name = self.gate.metric
        before, now, draws = self._metric(against), self._metric("new"), self._draws(against)
        low, high = bounds(draws, level=1 - 2 * self.alpha)
        verdict: Verdict = "passed" if high <= margin else "failed" if low > margin else "open"
        lack, needed = self._lack(against, margin) if verdict == "open" else ("", {})
        version = "the old version" if against == "old" else "the first released version"
        words = (
            f"{name.upper()} is {_percent(now)}, and of {version} {_percent(before)}: {_points(now - before)}. With"
            f" {_percent(1 - self.alpha)} confidence it is at most {_points(high)}; the margin is {100 * margin:.2f} pp."
        )
        if verdict == "failed":
            words += f" With the same confidence it is more than {_points(low)}: the candidate is worse by more than the margin."
        elif verdict == "open":
            words += f" {lack}"
        numbers: dict[str, int | float | None] = {
            "before": before, "now": now, "difference": now - before, "low": low, "high": high, "margin": margin, "alpha": self.alpha,
        }  # fmt: skip
        return Finding(test, verdict, words, numbers | needed)

    def _ceiling(self, rate: Literal["fpr", "fnr"], ceiling: float) -> Finding:
        scores, threshold = self.scores["new"].scores, self.thresholds["new"]
        value, level = metric(rate, scores, self.labels, threshold), 1 - 2 * self.alpha
        if self.groups is None:
            trials = self.negatives if rate == "fpr" else self.positives
            low, high = clopper_pearson(round(value * trials), trials, level=level)
        else:
            rng = generator(self.seed, "gate", rate)
            drawn = bootstrap(scores, self.labels, threshold, resamples=self.gate.resamples, rng=rng, groups=self.groups)
            low, high = bounds(drawn[rate], level=level)
        verdict: Verdict = "passed" if high <= ceiling else "failed" if low > ceiling else "open"
        words = f"{rate.upper()} is {_percent(value)}, with {_percent(1 - self.alpha)} confidence at most {_percent(high)};"
        words += f" the ceiling is {_percent(ceiling)}." + (" The candidate is above it." if verdict == "failed" else "")
        numbers: dict[str, int | float | None] = {"value": value, "low": low, "high": high, "ceiling": ceiling, "alpha": self.alpha}
        return Finding(f"{rate} ceiling", verdict, words, numbers)

    def _metric(self, version: str) -> float:
        return metric(self.gate.metric, self.scores[version].scores, self.labels, self.thresholds[version])

    def _margin(self, version: str) -> float:
        """δ. Of rows without one of the classes, its absolute part."""
        return max(self.gate.margin_abs, self.gate.margin_rel * self._metric(version)) if self.smaller_class else self.gate.margin_abs

    def _draws(self, against: str) -> Array:
        if against not in self._drawn:
            self._drawn[against] = self._draw(against)
        return self._drawn[against]

    def _draw(self, against: str) -> Array:
        return paired_bootstrap(
            self.gate.metric,
            self.scores[against].scores,
            self.scores["new"].scores,
            self.labels,
            old_threshold=self.thresholds[against],
            new_threshold=self.thresholds["new"],
            resamples=self.gate.resamples,
            rng=generator(self.seed, "gate", against),
            groups=self.groups,
        )

    def _changes(self, chosen: Array, against: str = "old", *, by_group: bool = True) -> Changes:
        """Of the chosen rows."""
        return changes(
            self.scores[against].scores[chosen],
            self.scores["new"].scores[chosen],
            self.labels[chosen],
            old_threshold=self.thresholds[against],
            new_threshold=self.thresholds["new"],
            groups=[self.groups[row] for row in chosen] if by_group and self.groups is not None else None,
        )

    def _lack(self, against: str, margin: float) -> tuple[str, dict[str, int | float | None]]:
        """How many rows are lacking for truly equal versions to pass with 80 % power, in words and numbers."""
        if margin <= 0:
            return "With a margin of 0, no number of rows is enough.", {}
        by_class = [np.flatnonzero(self.labels == label) for label in (0, 1)]
        differing = [sum(self._changes(rows, against, by_group=False)) for rows in by_class]
        needed = self.gate.min_per_class
        if self.smaller_class:
            shares = [max(count, 1) / len(rows) for count, rows in zip(differing, by_class, strict=True)]  # none seen is not none
            needed = max(needed, needed_per_class(self._variance(against, *shares), margin, alpha=self.alpha))
        more = {"more_negatives": max(0, needed - self.negatives), "more_positives": max(0, needed - self.positives)}
        share = sum(differing) / max(1, len(self.labels))
        numbers: dict[str, int | float | None] = {"needed_per_class": needed, **more, "differing": share}
        if not any(more.values()):
            return "The rows are enough for an equal version to pass 4 times in 5; more help only if the candidate is no worse.", numbers
        words = (
            f"The versions decide {_percent(share)} of the rows differently; if they are equally good, they pass"
            f" 4 times in 5 with about {needed:,} rows of each class: {more['more_negatives']:,} negatives and"
            f" {more['more_positives']:,} positives more."
        )
        return words, numbers

    def _variance(self, against: str, negatives: float, positives: float) -> float:
        """Of the difference, times the rows of a class. negatives, positives: which share of each is decided differently."""
        if self.gate.metric == "eer" or self.groups is not None:
            return float(np.var(self._draws(against))) * self.smaller_class
        return {"fpr": negatives, "fnr": positives}.get(self.gate.metric, (negatives + positives) / 4)


def _tries(gate: Gate, before: int) -> list[Finding]:
    """Open if all tries are spent: then the gate accepts no more."""
    if before < gate.max_tries:
        return []
    words = f"{before:,} candidates were put to this gate before, and the contract allows {gate.max_tries:,}: it accepts none any more."
    return [Finding("tries", "open", f"{words} It takes a new holdout, or a person's decision.", {"before": before})]


def _words(outcome: Outcome, found: Sequence[Finding]) -> str:
    """The outcome, then what decided it; of an accepted candidate the main test."""
    titles = {
        "accepted": "Accepted: the candidate is not worse by more than the margin.",
        "rejected": "Rejected: it is proven that the candidate does not keep what the contract asks.",
        "inconclusive": "Inconclusive: more rows, or a person's signed decision, are needed.",
    }
    says = [
        finding.words for finding in found if finding.verdict != "passed" or (outcome == "accepted" and finding.test == "non-inferiority")
    ]
    return " ".join([titles[outcome], *says])


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _points(share: float) -> str:
    return f"{100 * share:+.2f} pp"
