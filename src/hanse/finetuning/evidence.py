"""What the gate leaves behind: a decision with all that it rests on, as JSON, and what a person decided where the gate could not."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import blake3
import msgspec

from hanse.errors import ConfigError, IdentityError, Refused
from hanse.finetuning.contract import Gate
from hanse.finetuning.files import write_whole
from hanse.finetuning.metrics import Evaluation

if TYPE_CHECKING:
    from hanse.identity.certificates import Identity
    from hanse.identity.signatures import Signer

Outcome: TypeAlias = Literal["accepted", "rejected", "inconclusive"]
Verdict: TypeAlias = Literal["passed", "open", "failed"]


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one test of the gate found. "failed": what it asks is proven not to hold. "open": neither that nor the contrary is proven, or
    somebody has to decide."""

    test: str
    verdict: Verdict
    words: str
    numbers: dict[str, int | float | None] = {}


class HumanDecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a person decided where the gate could not. evidence: digest of the evidence they saw. when: UTC, ISO 8601."""

    accepted: bool
    by: str
    organisation: str
    why: str
    when: str
    evidence: str
    signature: bytes = b""


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decision with all that it rests on. words: the decision in sentences.

    about: what the caller knows of it, such as the digests of both models and of the contract. rows: digest of the holdout's rows.
    scores: digests of the stored scores, by "old", "new" and "first"; so are the evaluations. attempt: counted from 1.
    numpy: the version that drew the random numbers.
    """

    gate_version: str
    outcome: Outcome
    words: str
    findings: list[Finding]
    gate: Gate
    attempt: int
    seed: int
    about: dict[str, str]
    rows: str
    scores: dict[str, str]
    old: Evaluation
    new: Evaluation
    first: Evaluation | None = None
    numpy: str
    human: HumanDecision | None = None

    @property
    def passes(self) -> bool:
        """Whether the candidate may go on: accepted, or left to a person who accepted it. `signed_by` checks their signature."""
        return self.outcome == "accepted" or (self.outcome == "inconclusive" and self.human is not None and self.human.accepted)

    def canonical(self) -> Evidence:
        """As it is when its JSON is read again: a threshold of 1 is 1.0."""
        return msgspec.json.decode(self.json, type=Evidence)

    @property
    def json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2) + b"\n"

    @property
    def digest(self) -> str:
        """BLAKE3 of the JSON, as `blake3:` and 64 hexadecimal digits."""
        return f"blake3:{blake3.blake3(self.json).hexdigest()}"


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write the JSON, whole or not at all."""
    write_whole(path, evidence.json)


def read_evidence(path: Path) -> Evidence:
    """What `write_evidence` wrote. Raises ConfigError that names the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Evidence)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} holds no evidence: {error}") from error


def override(evidence: Evidence, signer: Signer, *, accepted: bool, why: str, when: datetime) -> Evidence:
    """The evidence with a person's signed decision. why: their reason, for whoever reads it later. when: aware.

    Raises: Refused if the gate has decided, or a person has; ConfigError without a reason.
    """
    if evidence.outcome != "inconclusive":
        raise Refused(f"the gate has decided: {evidence.outcome}.", hint="Only an inconclusive outcome is left to a person.")
    if evidence.human:
        raise Refused(f"{evidence.human.by} has decided already")
    if not why.strip():
        raise ConfigError("a decision needs a reason")
    who = signer.identity
    decision = HumanDecision(
        accepted=accepted,
        by=who.name,
        organisation=who.organisation,
        why=why.strip(),
        when=when.astimezone(UTC).isoformat(timespec="seconds"),
        evidence=evidence.digest,
    )
    signed = msgspec.structs.replace(decision, signature=signer.sign(_to_sign(decision)))
    return msgspec.structs.replace(evidence, human=signed)


def signed_by(evidence: Evidence, roots: bytes, *, now: datetime | None = None) -> Identity:
    """Who signed the person's decision in the evidence. roots: PEM, the authorities that are believed.

    Raises: IdentityError if nobody did, it was altered, it was for other evidence, or it names somebody else.
    """
    from hanse.identity.signatures import verify

    if (decision := evidence.human) is None:
        raise IdentityError("no person has decided")
    if msgspec.structs.replace(evidence, human=None).digest != decision.evidence:
        raise IdentityError("the decision was made on other evidence")
    who = verify(_to_sign(decision), decision.signature, roots, now=now)
    if (who.name, who.organisation) != (decision.by, decision.organisation):
        raise IdentityError(f"the decision names {decision.by} of {decision.organisation}, and {who.name} of {who.organisation} signed it")
    return who


def _to_sign(decision: HumanDecision) -> bytes:
    return b"hanse gate decision\0" + msgspec.json.encode(msgspec.structs.replace(decision, signature=b""), order="sorted")
