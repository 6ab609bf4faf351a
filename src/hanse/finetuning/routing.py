"""Which version answers. The current one does; the file `current` is looked at before each batch, so that a rollback takes effect at once.

A candidate beside it is either a *shadow*, which scores the same inputs and never answers, or a *canary*, which answers a share of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from blake3 import blake3

from hanse.errors import ConfigError
from hanse.finetuning.scoring import Answer, Input, Scored, Scorer

logger = logging.getLogger(__name__)
KEPT = 3
"""So many versions stay loaded: the way back has to be quick."""


class Pair(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One input that both versions scored; a line of a file in scores/pairs. input: digest of its decoded values. time: Unix seconds."""

    name: str
    input: str
    time: float
    current: str
    candidate: str
    current_score: float
    candidate_score: float
    current_decision: int
    candidate_decision: int
    answered_by: Literal["current", "candidate"]
    columns: Mapping[str, str] = {}
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """version: its digest. share: of the inputs that it answers, by the hash of seed and input; None: a shadow."""

    version: str
    share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}: a canary answers a share above 0 and at most 1")

    def takes(self, digest: bytes) -> bool:
        """Whether the canary answers the input of this digest: the same input always goes the same way, and stays when the share grows."""
        drawn = int.from_bytes(blake3(digest, key=self.seed.to_bytes(32, "little")).digest(8), "little")
        return self.share is not None and drawn < self.share * 2**64


class Router:
    """The versions in use. All of it runs in one thread.

    file: the project's `current`. read: which version it names. load: a version by its digest, ready to score.
    Raises what they raise, when no version is current or it cannot be loaded.
    """

    def __init__(self, file: Path, read: Callable[[], str], load: Callable[[str], Scorer], candidate: Candidate | None = None) -> None:
        self.problem = ""
        self.candidate_failures = 0
        self._file, self._read, self._load = file, read, load
        self._loaded: dict[str, Scorer] = {}
        self._seen = self._stat()
        self.current = self._scorer(read())
        self.candidate = candidate
        if candidate is not None:
            if candidate.version == self.current.version:
                raise ConfigError(f"{candidate.version[:19]} is the current version: there is nothing to compare")
            self._same_inputs(self._scorer(candidate.version))

    @property
    def since(self) -> float:
        """When the current version was deployed here, in Unix seconds."""
        return self._seen[0] / 1e9

    def follow(self) -> None:
        """Switch if `current` names another version by now. If that one cannot be used, the last one goes on, and `problem` says why."""
        if (seen := self._stat()) == self._seen:
            return
        try:
            scorer = self._scorer(self._read())
            self._same_inputs(scorer)
        except Exception as error:  # whatever is wrong with the other version, this one answers
            if str(error) != self.problem:
                logger.error("still serving %s: %s", self.current.version, error)
            self.problem = str(error)
            return
        self._seen, self.problem = seen, ""
        if scorer.version != self.current.version:
            logger.warning("serving %s instead of %s", scorer.version, self.current.version)
        self.current = scorer
        if self.candidate is not None and self.candidate.version == scorer.version:
            logger.warning("the candidate is the current version now: it is compared no more")
            self.candidate = None  # also after a rollback: what was rolled back must not answer again by itself

    def answer(self, inputs: Sequence[Input]) -> tuple[list[Answer], list[Pair]]:
        """One answer an input, in order; and the pairs of those that a canary answered."""
        self.follow()
        answers = [self.current.answer(each.item, score) for each, score in zip(inputs, self.current.scores(inputs).tolist(), strict=True)]
        if self.candidate is None or self.candidate.share is None:
            return answers, []
        chosen = [row for row, each in enumerate(inputs) if self.candidate.takes(each.digest)]
        return self._compared(self.candidate, inputs, answers, chosen)

    def shadow(self, inputs: Sequence[Input], answers: Sequence[Answer]) -> list[Pair]:
        """What the shadow says to inputs that `answer` has answered; nothing without one."""
        if self.candidate is None or self.candidate.share is not None:
            return []
        return self._compared(self.candidate, inputs, answers, range(len(inputs)))[1]

    def _compared(
        self, candidate: Candidate, inputs: Sequence[Input], answers: Sequence[Answer], chosen: Sequence[int]
    ) -> tuple[list[Answer], list[Pair]]:
        """The answers with those of a canary in the chosen rows, and the pairs. Where the candidate fails, the current answer stays."""
        answered, pairs = list(answers), []
        scorer = self._scorer(candidate.version)
        now = time.time()
        scores = scorer.scores([inputs[row] for row in chosen]).tolist()
        for row, score in zip(chosen, scores, strict=True):
            item, mine, other = inputs[row].item, answers[row], scorer.answer(inputs[row].item, score)
            if not (isinstance(mine, Scored) and isinstance(other, Scored)):
                self.candidate_failures += isinstance(mine, Scored)
                continue
            if candidate.share is not None:
                answered[row] = other
            pairs.append(
                Pair(
                    name=item.name,
                    input=inputs[row].digest.hex(),
                    time=now,
                    current=mine.version,
                    candidate=other.version,
                    current_score=mine.score,
                    candidate_score=other.score,
                    current_decision=mine.decision,
                    candidate_decision=other.decision,
                    answered_by="current" if candidate.share is None else "candidate",
                    columns=item.columns,
                    label=item.label,
                )
            )
        return answered, pairs

    def _scorer(self, version: str) -> Scorer:
        scorer = self._loaded.pop(version, None) or self._load(version)
        self._loaded[version] = scorer
        while len(self._loaded) > KEPT:
            self._loaded.pop(next(iter(self._loaded)))
        return scorer

    def _same_inputs(self, other: Scorer) -> None:
        mine, its = self.current.schema, other.schema
        if (mine.kind, mine.shape, mine.columns) != (its.kind, its.shape, its.columns):
            raise ConfigError(f"{other.version[:19]} takes other inputs than {self.current.version[:19]}", hint="Start anew to serve it.")

    def _stat(self) -> tuple[int, int, int]:
        """When the file was last written, its inode and size. A file that is gone has none of them."""
        try:
            found = self._file.stat()
        except FileNotFoundError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_ino, found.st_size
