"""The versions of a project's model: immutable, named by what is in them, signed by both parties before they are deployed.

versions/HEX/ holds version.json, model.safetensors, model.py, evidence.json if there is any, and SITE.signature of each party that decided.
HEX is the BLAKE3 of version.json, which has the digests of the others; so one signature on it covers all.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import blake3
import msgspec
import numpy as np

from hanse.errors import ConfigError, IdentityError, Refused, WireError
from hanse.finetuning.contract import Fraction, Project, Schema, read_project
from hanse.finetuning.decisions import Decision, Digest, Moment, Signed, Statement, decide, read_decision, statement_in
from hanse.finetuning.evidence import Evidence, Outcome, read_evidence, signed_by
from hanse.finetuning.files import write_whole
from hanse.finetuning.history import History, State
from hanse.finetuning.points import norm
from hanse.finetuning.version_file import CODE, EVIDENCE, VERSION, WEIGHTS, is_signature, pack, unpack
from hanse.identity.signatures import Signer
from hanse.messages.codec import read, write
from hanse.messages.flmodel import FLModel

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

CURRENT = "current"
_FOLLOWS: dict[Decision, tuple[tuple[State, ...], State]] = {
    "approve": (("vendor gate", "inconclusive"), "client acceptance"),
    "accept": (("client acceptance",), "approved"),
    "refuse": (("client acceptance", "approved"), "rejected"),
}
"""In which states a decision is waited for, and what it leads to."""


class Version(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """version.json. Digests are BLAKE3, `blake3:` and 64 hexadecimal digits.

    model: of the weights (model.safetensors; `digest_of` of hanse.finetuning.points). code: of model.py. project: of the contract.
    parent: the version that it was made from. threshold: positive if the score is at least this. schema: how data is prepared for it,
    and what the classes are called. evidence: of the gate's evidence.json. metrics: a summary, name to number.
    """

    model: Digest
    code: Digest
    project: Digest
    threshold: Fraction
    schema: Schema
    created: Moment
    parent: Digest | None = None
    evidence: Digest | None = None
    metrics: dict[str, float] = {}
    notes: str = ""

    @property
    def digest(self) -> str:
        return _digest(self.encoded)

    @property
    def encoded(self) -> bytes:
        """The bytes of version.json: sorted, so that the same content has one form."""
        return msgspec.json.encode(self, order="sorted")


@dataclass(frozen=True, slots=True)
class Diff:
    """How b differs from a. changed: field of version.json to its value in a and in b. code: a unified diff of model.py, "" if they are
    equal. tensors: name to the L2 norm of b - a and that of a, for tensors that both have in one shape. only: the other tensors' names."""

    changed: dict[str, tuple[Any, Any]]
    code: str
    tensors: dict[str, tuple[float, float]]
    only: list[str]


class Versions:
    """The versions in a party's project folder. client: whose deployments are meant, at a vendor of several clients."""

    def __init__(self, folder: Path, client: str | None = None) -> None:
        self.folder, self.client = folder, client

    @property
    def project(self) -> Project:
        return read_project(self.folder)

    @cached_property
    def history(self) -> History:
        return History(self.folder, self.client)

    def add(
        self,
        params: Mapping[str, Array],
        *,
        threshold: float,
        parent: str | None = None,
        evidence: bytes | None = None,
        metrics: Mapping[str, float] | None = None,
        notes: str = "",
        code: Path | None = None,
        created: datetime | None = None,
    ) -> Version:
        """Keep a new version, all of it or nothing.

        params: the module's state by name. parent: a digest. evidence: the bytes of the gate's JSON, which names the model's digest.
        metrics: finite numbers. code: default the project's. created: default now; the same of everything gives the same version.
        """
        project = self.project
        source = code or self.folder / project.model.code
        if unfit := [name for name, value in {"threshold": threshold, **(metrics or {})}.items() if not math.isfinite(value)]:
            raise ConfigError(f"{unfit[0]} of a version must be finite")
        with self._unfinished() as part:
            write(part / WEIGHTS, FLModel({name: params[name] for name in sorted(params)}))
            try:
                shutil.copyfile(source, part / CODE)
            except OSError as error:
                raise ConfigError(f"{source} cannot be read: {error.strerror}", hint="A version holds the model's code too.") from error
            if evidence is not None:
                (part / EVIDENCE).write_bytes(evidence)
            version = _version(
                {
                    "model": _digest_of(part / WEIGHTS),
                    "code": _digest_of(part / CODE),
                    "project": project.digest,
                    "threshold": threshold,
                    "schema": project.schema,
                    "created": (created or datetime.now(UTC)).replace(microsecond=0),
                    "parent": parent,
                    "evidence": None if evidence is None else _digest(evidence),
                    "metrics": dict(metrics or {}),
                    "notes": notes,
                }
            )
            _check_gate(_evidence(version, part), project)
            (part / VERSION).write_bytes(version.encoded)
            self._keep(part, version)
        return version

    def path(self, version: Version | str) -> Path:
        """The folder of a version: of its digest, or of the object."""
        return self.folder / "versions" / (version.digest if isinstance(version, Version) else version).removeprefix("blake3:")

    def get(self, prefix: str) -> Version:
        """The version whose digest begins so, with or without `blake3:`, or the one that is "current".

        Raises ConfigError if there is none, or more than one, and WireError if its version.json was altered.
        """
        if prefix == CURRENT:
            if (current := self.current) is None:
                raise ConfigError(f"no version is deployed in {self.folder}")
            return current
        digits = prefix.removeprefix("blake3:")
        found = [path for path in self._folders() if path.name.startswith(digits)] if digits else []
        if len(found) != 1:
            names = ", ".join(path.name[:12] for path in found or self._folders())
            what = f"{len(found)} versions begin with {prefix!r}" if found else f"no version begins with {prefix!r}"
            raise ConfigError(f"{what} in {self.folder}; there are: {names or 'none'}")
        return _read(found[0])

    def list(self) -> Sequence[Version]:
        """All of them, oldest first. Raises WireError if a version.json was altered."""
        return sorted((_read(path) for path in self._folders()), key=lambda version: (version.created, version.digest))

    def params(self, version: Version) -> dict[str, Array]:
        """Its weights by name, to be read only. Raises WireError if they were altered."""
        self._check_file(version, WEIGHTS, version.model)
        params: dict[str, Array] = read(self.path(version) / WEIGHTS)[0].params
        return params

    def verify(self, version: Version, roots: bytes) -> Sequence[Signed]:
        """Check every file and signature of a version. Returns the decisions on it.

        roots: PEM, the authorities that are believed, such as `kit.credentials().roots`.
        Raises WireError that names the altered or superfluous file, IdentityError that names the signature.
        """
        return _verify(self.path(version), version, roots, self.project)

    def diff(self, a: Version, b: Version) -> Diff:
        """What b has other than a."""
        before, after = (msgspec.to_builtins(version) for version in (a, b))
        changed = {name: (before.get(name), after.get(name)) for name in sorted({*before, *after}) if before.get(name) != after.get(name)}
        lines = [(self.path(version) / CODE).read_text(errors="replace").splitlines() for version in (a, b)]
        code = difflib.unified_diff(lines[0], lines[1], a.digest, b.digest, lineterm="")
        old, new = self.params(a), self.params(b)
        both = [name for name in old if name in new and old[name].shape == new[name].shape]
        tensors = {name: (norm(new[name].astype(np.float64) - old[name]), norm(old[name])) for name in both}
        return Diff(changed, "\n".join(code), tensors, sorted({*old, *new} - {*both}))

    # ------------------------------------------------------------------------------------------------------------------- decisions

    def sign(self, version: Version, decision: Decision, signer: Signer, *, why: str = "") -> Statement:
        """Approve (the vendor), accept or refuse (a client) a version, and record it. The same decision again changes nothing.

        Raises IdentityError if the signer is of another organisation than the party, and ConfigError for an approval that the gate's
        evidence does not carry: after a rejection there is none; if it is inconclusive, or there is none, `why` must be said; also for an
        acceptance after a refusal, which is final.
        """
        self._check_files(version)
        outcome = _outcome(_evidence(version, self.path(version)))
        if decision == "approve" and outcome == "rejected":
            raise ConfigError(f"the gate has rejected version {_short(version)}: it cannot be approved")
        if decision == "approve" and outcome != "accepted" and not why.strip():
            found = "there is no gate evidence" if outcome is None else "the gate's outcome is inconclusive"
            raise ConfigError(f"version {_short(version)}: {found}, so an approval must say why.", hint="Say --why.")
        data = decide(self.project, version.digest, decision, signer, client=self.client, why=why)
        statement = self._keep_signature(version, data)
        if statement.decision != decision:
            raise ConfigError(f"{statement.site} has refused version {_short(version)}: a refusal is final")
        self._record(statement)
        return statement

    def add_decision(self, version: Version, data: bytes, roots: bytes) -> Statement:
        """Take over what another party decided: the bytes of its `.signature` file. Returns the decision of that party that counts.

        Raises IdentityError if the signature is not accepted, is of no party, or on another version.
        """
        signed = read_decision(data, roots, self.project)
        if signed.statement.version != version.digest:
            raise IdentityError(f"a decision on {signed.statement.version}, not on {version.digest}")
        statement = self._keep_signature(version, data)
        self._record(statement)
        return statement

    def decisions(self, version: Version) -> dict[str, Statement]:
        """What was decided about a version, by the party's site, as it stands there: unchecked, see `verify`."""
        return {path.stem: statement_in(path.read_bytes()) for path in sorted(self.path(version).glob("*.signature"))}

    def missing(self, version: Version, roots: bytes) -> Sequence[str]:
        """What keeps a version from being deployed, in words; empty: nothing. Raises as `verify` does."""
        client = self.project.client(self.client).site
        decisions = {each.statement.site: each for each in self.verify(version, roots)}
        approval, acceptance = decisions.get(self.project.vendor.site), decisions.get(client)
        outcome, wanted = _outcome(_evidence(version, self.path(version))), []
        if outcome == "rejected":
            wanted.append("the gate has rejected it")
        if approval is None:
            wanted.append("the vendor has not approved it")
        elif outcome != "accepted" and not approval.statement.why.strip():
            wanted.append("there is no gate evidence that accepts it, and the vendor's approval does not say why")
        if acceptance is None:
            wanted.append(f"the client {client} has not accepted it")
        elif acceptance.statement.decision == "refuse":
            wanted.append(f"the client {client} has refused it: {acceptance.statement.why or 'no reason given'}")
        if approval and acceptance and approval.signer == acceptance.signer:
            wanted.append(f"{approval.signer} signed for both parties: two people must")
        return wanted

    # ------------------------------------------------------------------------------------------------------------------ deployment

    @property
    def current(self) -> Version | None:
        """The version that is deployed here, by the history; without one, by the file `current`."""
        if self.history.path.exists() and (deployed := self.history.deployed):
            return _read(self.path(deployed[-1]))
        path = self.folder / CURRENT
        return _read(self.path(path.read_text().strip())) if path.exists() else None

    def deploy(self, version: Version, roots: bytes, *, who: str, why: str = "") -> None:
        """Make it the current version.

        Raises Refused that says what is missing, and ConfigError if the project's state does not allow it.
        """
        if wanted := self.missing(version, roots):
            raise Refused(f"version {_short(version)} cannot be deployed: {'; '.join(wanted)}.")
        if not (self.history.state == "deployed" and self.history.deployed[-1:] == [version.digest]):
            self.history.move("deployed", who=who, why=why, version=version.digest, deployed=version.digest)
        write_current(self.folder, version)

    def rollback(self, to: Version | None = None, *, who: str, why: str = "") -> Version:
        """Go back to the version deployed before, or to an earlier one. In whatever state the project is.

        Raises ConfigError if there is none before, and WireError if it was altered since.
        """
        before = self.history.deployed[:-1]
        digest = to.digest if to else before[-1] if before else None
        if digest not in before:
            names = ", ".join(each.removeprefix("blake3:")[:12] for each in before)
            raise ConfigError(
                f"{self.folder}: {f'version {_short(to)} was not deployed before' if to else 'no version was deployed before this one'}; "
                + (f"there were: {names}" if names else "there is nothing to go back to")
            )
        version = _read(self.path(digest))
        self._check_files(version)
        facts = {"version": version.digest, "deployed": version.digest, "back": True}
        if self.history.state in ("deployed", "monitored"):
            self.history.move("rolled back", who=who, why=why, **facts)
        else:
            self.history.note("rollback", who=who, why=why, **facts)
        write_current(self.folder, version)
        return version

    # -------------------------------------------------------------------------------------------------------------------- carrying

    def export(self, version: Version, path: Path) -> None:
        """Write a version, with the decisions on it, to one file. Raises ConfigError if the vendor has not approved it."""
        self._check_files(version)
        if not (self.path(version) / f"{self.project.vendor.site}.signature").exists():
            raise ConfigError(f"version {_short(version)} has no approval of the vendor, without which nobody can import it")
        pack(self.path(version), path)

    def import_(self, path: Path, roots: bytes) -> Version:
        """Take over a version that another party exported; of one that is here, the new decisions.

        Only what the vendor has approved is taken, as a version holds code. A new one goes to "client acceptance" in the history.
        Raises WireError for a file that is no version as `export` writes it, IdentityError for one without good signatures, ConfigError
        if it was made under another project.yaml.
        """
        with self._unfinished() as part:
            unpack(path, part)
            version = _parse(part / VERSION)
            signed = _verify(part, version, roots, self.project)
            if not any(each.statement.role == "vendor" for each in signed):
                raise IdentityError(f"{path}: version {_short(version)} has no approval of the vendor, and without one it is not taken")
            new = not self.path(version).exists()
            if new and version.project != self.project.digest:
                raise ConfigError(
                    f"{path}: version {_short(version)} was made under another project.yaml.",
                    hint="Both parties need the same project.yaml.",
                )
            if new:
                _check_gate(_evidence(version, part), self.project)
                self._keep(part, version)
            else:
                for each in signed:
                    self._keep_signature(version, (part / f"{each.statement.site}.signature").read_bytes())
        if not any(line.get("version") == version.digest for line in self.history.lines):
            vendor = next(each.statement for each in signed if each.statement.role == "vendor")
            self.history.arrive(who=vendor.who, why=vendor.why, version=version.digest)
        for each in signed:
            self._record(each.statement)
        return version

    # --------------------------------------------------------------------------------------------------------------------- private

    def _folders(self) -> Sequence[Path]:
        return sorted(path for path in (self.folder / "versions").glob("*") if re.fullmatch("[0-9a-f]{64}", path.name))

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        part = self.folder / "versions" / f".{os.urandom(8).hex()}.part"
        part.mkdir(parents=True)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _keep(self, part: Path, version: Version) -> None:
        if not self.path(version).exists():
            for name in (VERSION, WEIGHTS, CODE, EVIDENCE):
                if (part / name).exists():
                    (part / name).chmod(0o444)
            part.replace(self.path(version))

    def _keep_signature(self, version: Version, data: bytes) -> Statement:
        """A party's decision that counts from now on: of two the first, unless the second is a refusal."""
        statement = statement_in(data)
        path = self.path(version) / f"{statement.site}.signature"
        if path.exists() and ((before := statement_in(path.read_bytes())).decision == "refuse" or statement.decision != "refuse"):
            return before
        write_whole(path, data)
        return statement

    def _record(self, statement: Statement) -> None:
        """Write a decision into the history, once; it is a step if it was waited for."""
        lines, at = self.history.lines, statement.when.isoformat()
        if any(line.get("signed_at") == at and line["version"] == statement.version and line["who"] == statement.who for line in lines):
            return
        waiting, to = _FOLLOWS[statement.decision]
        facts = {"version": statement.version, "decision": statement.decision, "signed_at": at}
        about = next((line.get("version") for line in reversed(lines) if line["kind"] in waiting), None)
        if self.history.state in waiting and about in (None, statement.version):
            self.history.move(to, who=statement.who, why=statement.why, **facts)
        else:
            self.history.note(statement.decision, who=statement.who, why=statement.why, **facts)

    def _check_file(self, version: Version, name: str, digest: str) -> None:
        _check_file(self.path(version) / name, digest)

    def _check_files(self, version: Version) -> None:
        _check_files(self.path(version), version)


def write_current(folder: Path, version: Version) -> None:
    """Write the file `current`, which names the deployed version for other programs."""
    write_whole(folder / CURRENT, f"{version.digest}\n".encode())


def _version(says: dict[str, Any]) -> Version:
    try:
        return msgspec.convert(says, Version)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the new version: {error}") from error


def _verify(folder: Path, version: Version, roots: bytes, project: Project) -> list[Signed]:
    _check_files(folder, version)
    if (evidence := _evidence(version, folder)) and evidence.human:
        person = signed_by(evidence, roots, now=datetime.fromisoformat(evidence.human.when))
        if person.organisation != project.vendor.organisation:
            raise IdentityError(f"{folder / EVIDENCE}: {person} decided where the gate could not, and is not of the vendor")
    signed = []
    for path in sorted(folder.iterdir()):
        if path.name in (VERSION, WEIGHTS, CODE) or path.name.startswith(".") or (path.name == EVIDENCE and version.evidence):
            continue
        if not is_signature(path.name):
            raise WireError(f"{path} does not belong to the version: somebody put it there", offset=0)
        try:
            each = read_decision(path.read_bytes(), roots, project)
            if (each.statement.version, f"{each.statement.site}.signature") != (version.digest, path.name):
                raise IdentityError(f"it is {each.statement.site}'s decision on {each.statement.version}")
        except IdentityError as error:
            raise IdentityError(f"{path}: {error.message}", hint=error.hint) from error
        signed.append(each)
    return signed


def _read(folder: Path) -> Version:
    """The version in the folder, whose name must be its digest."""
    version = _parse(folder / VERSION)
    if version.digest != f"blake3:{folder.name}":
        raise WireError(f"{folder / VERSION} was altered: its digest is {version.digest}", offset=0)
    return version


def _parse(path: Path) -> Version:
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=Version)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"{path} is no version: {error}", offset=0) from error
    if version.encoded != data:
        raise WireError(f"{path} was altered: it is not in the one form that a version has", offset=0)
    return version


def _check_files(folder: Path, version: Version) -> None:
    if _digest(_parse(folder / VERSION).encoded) != version.digest:
        raise WireError(f"{folder / VERSION} was altered", offset=0)
    _check_file(folder / WEIGHTS, version.model)
    _check_file(folder / CODE, version.code)
    if version.evidence:
        _check_file(folder / EVIDENCE, version.evidence)


def _check_file(path: Path, digest: str) -> None:
    try:
        found = _digest_of(path)
    except OSError as error:
        raise WireError(f"{path} is gone: {error.strerror}", offset=0) from error
    if found != digest:
        raise WireError(f"{path} was altered: its digest is {found}, and version.json says {digest}", offset=0)


def _evidence(version: Version, folder: Path) -> Evidence | None:
    """The gate's evidence, None if the gate was not asked. Raises ConfigError for evidence about other weights or another threshold."""
    if version.evidence is None:
        return None
    evidence = read_evidence(folder / EVIDENCE)
    if version.model not in evidence.about.values() or evidence.new.threshold != version.threshold:
        raise ConfigError(f"{folder / EVIDENCE} is about another model than {version.model} at the threshold {version.threshold}")
    return evidence


def _check_gate(evidence: Evidence | None, project: Project) -> None:
    if evidence and evidence.gate != project.gate:
        raise ConfigError("the gate's evidence was made with other settings than the gate in project.yaml has")


def _outcome(evidence: Evidence | None) -> Outcome | None:
    """What the gate found, or in its place the person to whom it left the decision."""
    if evidence is None:
        return None
    if evidence.passes:
        return "accepted"
    return "rejected" if evidence.human else evidence.outcome


def _digest(data: bytes) -> str:
    return f"blake3:{blake3.blake3(data).hexdigest()}"


def _digest_of(path: Path) -> str:
    hasher = blake3.blake3()  # with one thread: its others would not be there in a process that is forked later
    return f"blake3:{hasher.update_mmap(path).hexdigest()}"


def _short(version: Version) -> str:
    return version.digest.removeprefix("blake3:")[:12]
