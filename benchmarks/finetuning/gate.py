"""`gate`: what the gate decides, of versions whose true rates are known, since their scores are drawn.

Old and new version decide a share of the rows differently, as often in each other's favour, or more often in the old one's, by as much as
the new one is truly worse. At 3,000 rows a class, of truly equal versions at least 90 % are accepted and none is rejected; of versions
truly worse by 1 pp at most 5 % are accepted. At 150 a class the outcome is inconclusive, and says how many rows are lacking: with so many,
about 80 % are accepted.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from claims import Claim, parser, run

from hanse.finetuning.contract import Gate
from hanse.finetuning.gate import Finding, findings, outcome_of
from hanse.finetuning.metrics import Scores
from hanse.seeds import generator

OLD_HTER = 0.015
Draw = tuple[str, list[Finding]]


def draw(rng: np.random.Generator, per_class: int, *, differing: float, worse_by: float) -> dict[str, Scores]:
    """Scores of an old version of HTER 1.5 %, and of a new one of that and `worse_by`; the threshold is 0.5 for both."""
    n, labels = 2 * per_class, np.repeat([0, 1], per_class)
    lost, won = (differing + worse_by) / 2, (differing - worse_by) / 2
    kind = rng.choice(4, n, p=[lost, won, OLD_HTER - won, 1 - lost - OLD_HTER])  # only new wrong, only old wrong, both, none
    wrong = {"old": (kind == 1) | (kind == 2), "new": (kind == 0) | (kind == 2)}
    names = [str(row) for row in range(n)]
    sure = rng.uniform(0.5, 1, n)  # of the decision
    return {version: Scores(names, labels, np.where(labels ^ missed, sure, 1 - sure)) for version, missed in wrong.items()}


def decisions(options: Namespace, per_class: int, *, differing: float, worse_by: float = 0.0, tries: int = 3, draws: int = 0) -> list[Draw]:
    """The outcome of each draw, with what the gate's tests found."""
    decided, gate = [], Gate(max_tries=tries)
    for number in range(draws or options.draws):
        rng = generator(options.seed, per_class, differing, worse_by, tries, number)
        scores = draw(rng, per_class, differing=differing, worse_by=worse_by)
        found = findings(scores, dict.fromkeys(scores, 0.5), gate=gate, tries_before=0, seed=number)
        decided.append((outcome_of(found), found))
    what = f"{per_class:,} a class, {100 * differing:g} % decided differently, worse by {100 * worse_by:g} pp, {tries} tries"
    print(f"{what}: {dict(Counter(outcome for outcome, _ in decided))}", flush=True)
    return decided


def share(decided: list[Draw], outcome: str) -> float:
    return 100 * sum(found == outcome for found, _ in decided) / len(decided)


def claim(what: str, figure: float, limit: float | None = None, *, at_least: bool = False) -> Claim:
    return Claim(what=f"gate: {what}", hanse=f"{figure:.3g} %", bare="", figure=figure, unit="%", limit=limit, at_least=at_least)


def measure(options: Namespace) -> Iterator[Claim]:
    equal = decisions(options, 3_000, differing=0.01)
    yield claim("equal, 1 % differ: accepted", share(equal, "accepted"), 90, at_least=True)
    yield claim("equal, 1 % differ: rejected", share(equal, "rejected"), 0)
    yield claim("equal, 1 % differ: would pass `new ≤ old`", 100 * sum(_no_worse(found) for _, found in equal) / len(equal))
    for differing, tries in ((0.02, 3), (0.02, 1)):
        equal = decisions(options, 3_000, differing=differing, tries=tries)
        what = f"equal, {100 * differing:g} % differ, {tries} tries"
        yield claim(f"{what}: accepted", share(equal, "accepted"))
        yield claim(f"{what}: rejected", share(equal, "rejected"), 0)
    equal = decisions(options, 5_000, differing=0.02)
    yield claim("equal, 2 % differ, 5,000 a class: accepted", share(equal, "accepted"), 90, at_least=True)
    for differing in (0.01, 0.02):
        worse = decisions(options, 3_000, differing=differing, worse_by=0.01)
        yield claim(f"worse by 1 pp, {100 * differing:g} % differ: accepted", share(worse, "accepted"), 5)
        yield claim(f"worse by 1 pp, {100 * differing:g} % differ: rejected", share(worse, "rejected"))
    for per_class in (300, 3_000):
        at_margin = decisions(options, per_class, differing=0.01, worse_by=0.005, draws=5 * options.draws)
        yield claim(f"worse by the margin, {per_class:,} a class: accepted", share(at_margin, "accepted"))
    yield from _lacking(options)


def _no_worse(found: list[Finding]) -> bool:
    difference = next(finding.numbers["difference"] for finding in found if finding.test == "non-inferiority")
    return difference is not None and difference <= 0


def _lacking(options: Namespace) -> Iterator[Claim]:
    """With 300 rows: inconclusive, and says how many are lacking; with so many as it says, equal versions pass 4 times in 5."""
    few = decisions(options, 150, differing=0.01)
    saying = [re.search(r"([\d,]+) negatives and ([\d,]+) positives more", found[0].words) for _, found in few]
    told = sum(outcome == "inconclusive" and said is not None for (outcome, _), said in zip(few, saying, strict=True))
    yield claim("300 rows: inconclusive, with how many more", 100 * told / len(few), 100, at_least=True)
    print(few[0][1][0].words)
    needed = int(np.median([float(found[0].numbers["needed_per_class"] or 0) for _, found in few]))
    enough = decisions(options, needed, differing=0.01)
    yield claim(f"equal, 1 % differ, {needed:,} a class, as it said: accepted", share(enough, "accepted"))


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--draws", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    sys.exit(run(measure, options.parse_args()))
