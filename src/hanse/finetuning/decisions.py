"""What a person of a party decided about a version, signed: the vendor's approval, a client's acceptance or refusal."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import msgspec

from hanse.errors import ConfigError, IdentityError
from hanse.finetuning.contract import Party, Project
from hanse.identity.certificates import Identity
from hanse.identity.signatures import Signer, verify

Digest = Annotated[str, msgspec.Meta(pattern=r"^blake3:[0-9a-f]{64}\Z")]
Decision = Literal["approve", "accept", "refuse"]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]

_CONTEXT = b"hanse version decision 1\0"
_CLOCKS = timedelta(minutes=10)


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is signed. role: the vendor approves, a client accepts or refuses. site: the party's. by: the name in the certificate."""

    version: Digest
    decision: Decision
    role: Literal["vendor", "client"]
    site: str
    by: str
    when: Moment
    why: str = ""

    @property
    def who(self) -> str:
        return f"{self.by} ({self.site})"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    statement: Statement
    signature: bytes


@dataclass(frozen=True, slots=True)
class Signed:
    """A statement whose signature is good, and whose it is."""

    statement: Statement
    signer: Identity


def decide(project: Project, version: str, decision: Decision, signer: Signer, *, client: str | None = None, why: str = "") -> bytes:
    """A signed statement, as the bytes of a `.signature` file. client: the site of the client that is meant, if there are several.

    Raises IdentityError if the signer's organisation is not that of the party whose decision it is.
    """
    party = project.vendor if decision == "approve" else project.client(client)
    now = datetime.now(UTC).replace(microsecond=0)
    statement = Statement(
        version=version,
        decision=decision,
        role="vendor" if decision == "approve" else "client",
        site=party.site,
        by=signer.identity.name,
        when=now,
        why=why,
    )
    _check(statement, signer.identity, project)
    return msgspec.json.format(msgspec.json.encode(_File(statement, signer.sign(_signed(statement)))), indent=1) + b"\n"


def read_decision(data: bytes, roots: bytes, project: Project) -> Signed:
    """The statement in a `.signature` file, which must be of a party of the project.

    The certificate must have been good when the statement was made, by the clock of who made it; it may have expired since.
    Raises IdentityError for anything else.
    """
    file = _file(data)
    if file.statement.when > datetime.now(UTC) + _CLOCKS:
        raise IdentityError(f"it says that it was signed at {file.statement.when}, which is yet to come")
    identity = verify(_signed(file.statement), file.signature, roots, now=file.statement.when)
    _check(file.statement, identity, project)
    return Signed(file.statement, identity)


def statement_in(data: bytes) -> Statement:
    """What a `.signature` file says, unchecked. Raises IdentityError if it is none."""
    return _file(data).statement


def _file(data: bytes) -> _File:
    try:
        return msgspec.json.decode(data, type=_File)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IdentityError(f"this is no signed decision: {error}") from error


def _check(statement: Statement, identity: Identity, project: Project) -> None:
    if (statement.role == "vendor") != (statement.decision == "approve"):
        raise IdentityError(f"a {statement.role} cannot {statement.decision}: the vendor approves, the client accepts or refuses")
    party = _party(statement, project)
    if identity.organisation != party.organisation:
        raise IdentityError(
            f"{identity} cannot sign for the {statement.role}, {party.site!r}: project.yaml says that its people are of"
            f" {party.organisation!r}.",
            hint="Sign with a kit of that organisation.",
        )
    if (statement.by, statement.site) != (identity.name, party.site):
        raise IdentityError(f"it says that {statement.by!r} of {statement.site!r} signed, and {identity} of {party.site!r} did")


def _party(statement: Statement, project: Project) -> Party:
    try:
        return project.vendor if statement.role == "vendor" else project.client(statement.site)
    except ConfigError as error:
        raise IdentityError(f"it is of no party of the project: {error.message}") from error


def _signed(statement: Statement) -> bytes:
    return _CONTEXT + msgspec.json.encode(statement, order="sorted")
