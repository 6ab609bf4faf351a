from __future__ import annotations

import contextlib
import stat
import struct
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import blake3
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanse.errors import ConfigError, HanseError, IdentityError, Refused, WireError
from hanse.finetuning.contract import Gate, Project, write_project
from hanse.finetuning.decisions import decide
from hanse.finetuning.evidence import Evidence, override
from hanse.finetuning.gate import decide as put_to_gate
from hanse.finetuning.points import digest_of
from hanse.finetuning.versions import Version, Versions
from hanse.identity.authority import Authority, new_signing_key, public_key
from hanse.identity.certificates import Identity, Role
from hanse.identity.kit import Kit
from hanse.identity.signatures import Signer
from hanse.messages.codec import encode
from hanse.messages.flmodel import FLModel

Params = Callable[[float], dict[str, np.ndarray]]
DAY = datetime(2026, 11, 20, 12, tzinfo=UTC)
LABELS = np.arange(1200) % 2


def evidence(params: dict[str, np.ndarray], project: Project, *, worse: float = 0.0, rows: int = 1200, threshold: float = 0.5) -> bytes:
    """What the gate says of these weights on a holdout of `rows`, if the new model errs on `worse` of them and the old one on none."""
    labels = LABELS[:rows]
    new = np.where(np.arange(rows) < worse * rows, 1 - labels, labels).astype(float)
    about = {"old": "none", "new": digest_of(params)}
    gate = project.gate
    found = put_to_gate(
        labels.astype(float), new, labels, old_threshold=0.5, new_threshold=threshold, gate=gate, tries_before=0, seed=0, about=about
    )
    return found.json


@pytest.fixture
def vendor(folder: Path, params: Params) -> Versions:
    """The vendor's versions: a base, which is deployed."""
    versions = Versions(folder)
    base = versions.add(params(1.0), threshold=0.5, created=DAY, notes="base")
    versions.history.move("draft", who="vera", deployed=base.digest, version=base.digest)
    return versions


@pytest.fixture
def candidate(vendor: Versions, params: Params, project: Project) -> Version:
    """A candidate that the gate has accepted; the project waits for the vendor's approval."""
    weights = params(1.5)
    parent = vendor.list()[0].digest
    added = vendor.add(weights, threshold=0.5, parent=parent, evidence=evidence(weights, project), metrics={"eer": 0.02}, notes="better")
    for state in ("data check", "base evaluation", "training", "candidate", "vendor gate"):
        vendor.history.move(state, who="vera")  # type: ignore[arg-type]
    return added


@pytest.fixture
def client(vendor: Versions, tmp_path: Path, project: Project) -> Versions:
    """The client's folder, where the base is deployed."""
    folder = tmp_path / "client"
    write_project(folder, project)
    base = vendor.list()[0]
    versions = Versions(folder)
    versions.path(base).mkdir(parents=True)
    for path in vendor.path(base).iterdir():
        (versions.path(base) / path.name).write_bytes(path.read_bytes())
    versions.history.move("draft", who="vera", deployed=base.digest, version=base.digest)
    return versions


# ------------------------------------------------------------------------------------------------------------------------- what it is


def test_a_version_is_named_by_what_is_in_it(vendor: Versions, params: Params, project: Project) -> None:
    (base,) = vendor.list()
    frame = b"".join(encode(FLModel({name: params(1.0)[name] for name in sorted(params(1.0))})))
    assert base.model == f"blake3:{blake3.blake3(frame).hexdigest()}" == digest_of(params(1.0))
    folder = vendor.path(base)
    assert base.digest == f"blake3:{blake3.blake3((folder / 'version.json').read_bytes()).hexdigest()}" == f"blake3:{folder.name}"
    assert base.code == f"blake3:{blake3.blake3((vendor.folder / 'model.py').read_bytes()).hexdigest()}"
    assert (base.project, base.schema, base.parent, base.evidence, base.created) == (project.digest, project.schema, None, None, DAY)
    assert {path.name for path in folder.iterdir()} == {"version.json", "model.safetensors", "model.py"}
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o222 for path in folder.iterdir())
    read = vendor.params(base)
    assert read.keys() == params(1.0).keys()
    assert all(np.array_equal(read[name], array) and read[name].dtype == array.dtype for name, array in params(1.0).items())


def test_the_same_again_is_the_same_version(vendor: Versions, params: Params) -> None:
    assert vendor.add(params(1.0), threshold=0.5, created=DAY, notes="base") == vendor.list()[0]
    reordered = dict(reversed(params(1.0).items()))
    assert vendor.add(reordered, threshold=0.5, created=DAY, notes="base") == vendor.list()[0]
    assert len(vendor.list()) == 1
    other = vendor.add(params(1.0), threshold=0.25, created=DAY, notes="base")
    assert (len(vendor.list()), other.model) == (2, vendor.list()[0].model)
    assert not [*(vendor.folder / "versions").glob(".*")]


def test_get_by_prefix(vendor: Versions, params: Params) -> None:
    (base,) = vendor.list()
    assert vendor.get("current") == vendor.get(base.digest) == vendor.get(base.digest[7:]) == vendor.get(base.digest[7:13]) == base
    others = [vendor.add(params(value), threshold=0.5) for value in range(17)]  # of 18, two begin alike
    firsts = [version.digest[7] for version in [base, *others]]
    twice = next(digit for digit in firsts if firsts.count(digit) > 1)
    with pytest.raises(ConfigError, match=f"versions begin with '{twice}'"):
        vendor.get(twice)
    for wrong in ("", "xyz", "blake3:", "../versions"):
        with pytest.raises(ConfigError, match="no version begins with"):
            vendor.get(wrong)


def test_what_cannot_be_kept(vendor: Versions, params: Params, project: Project) -> None:
    for facts, says in (
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": float("nan")}, "must be finite"),
        ({"threshold": 0.5, "metrics": {"eer": float("inf")}}, "eer of a version must be finite"),
        ({"threshold": 0.5, "parent": "nobody"}, "parent"),
        ({"threshold": 0.5, "evidence": b"{}"}, "holds no evidence"),
        ({"threshold": 0.5, "evidence": evidence(params(3.0), project)}, "about another model"),
        ({"threshold": 0.4, "evidence": evidence(params(2.0), project)}, "about another model"),
        (
            {"threshold": 0.5, "evidence": evidence(params(2.0), msgspec.structs.replace(project, gate=Gate(margin_abs=1)))},
            "other settings",
        ),
        ({"threshold": 0.5, "code": vendor.folder / "gone.py"}, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=says):
            vendor.add(params(2.0), **facts)  # type: ignore[arg-type]
    assert len(vendor.list()) == 1
    assert not [*(vendor.folder / "versions").glob(".*")]


def test_diff(vendor: Versions, candidate: Version) -> None:
    base = vendor.list()[0]
    found = vendor.diff(base, candidate)
    assert found.changed["notes"] == ("base", "better")
    assert found.changed["parent"] == (None, base.digest)
    assert found.changed["metrics"] == (None, {"eer": 0.02})
    assert "threshold" not in found.changed
    assert found.tensors == {  # every element moves from 1 to 1.5
        "head.weight": (0.5 * 6**0.5, 6**0.5), "body.bias": (1.0, 2.0), "n": (0.0, 7.0),
    }  # fmt: skip
    assert (found.code, found.only) == ("", [])
    (vendor.folder / "other.py").write_text("def build():\n    return None\n")
    other = vendor.add({"head.weight": np.zeros((3, 2), np.float32)}, threshold=0.5, code=vendor.folder / "other.py")
    found = vendor.diff(base, other)
    assert "+    return None" in found.code
    assert (found.tensors, found.only) == ({}, ["body.bias", "head.weight", "n"])


# -------------------------------------------------------------------------------------------------------------------------- altered


@pytest.mark.parametrize("name", ["version.json", "model.safetensors", "model.py", "evidence.json", "acme.signature"])
def test_an_altered_file_is_named(vendor: Versions, candidate: Version, kits: dict[str, Kit], roots: bytes, name: str) -> None:
    vendor.sign(candidate, "approve", kits["vera"].signer())
    assert [signed.signer.name for signed in vendor.verify(candidate, roots)] == ["vera"]
    path = vendor.path(candidate) / name
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    for place in (0, len(data) // 2, len(data) - 1) if name != "acme.signature" else (len(data) // 2,):
        altered = bytearray(data)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises((WireError, IdentityError), match=name):
            vendor.verify(candidate, roots)
        with pytest.raises(HanseError):
            vendor.deploy(candidate, roots, who="vera")
    path.unlink()
    if name != "acme.signature":
        with pytest.raises((WireError, ConfigError), match=name):
            vendor.verify(candidate, roots)


def test_weights_that_were_altered_are_not_loaded(vendor: Versions) -> None:
    base = vendor.list()[0]
    path = vendor.path(base) / "model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(WireError, match=r"model.safetensors was altered"):
        vendor.params(base)


def test_a_file_that_does_not_belong_is_named(vendor: Versions, roots: bytes) -> None:
    base = vendor.list()[0]
    (vendor.path(base) / "evidence.json").write_text("{}")
    with pytest.raises(WireError, match=r"evidence.json does not belong"):
        vendor.verify(base, roots)


def test_another_version_under_its_name_is_found(vendor: Versions, candidate: Version) -> None:
    base = vendor.list()[0]
    path = vendor.path(base) / "version.json"
    path.chmod(0o644)
    path.write_bytes(candidate.encoded)
    with pytest.raises(WireError, match="was altered: its digest"):
        vendor.get(base.digest)


# ------------------------------------------------------------------------------------------------------------------------ decisions


def test_from_the_gate_to_deployment_and_back(
    vendor: Versions, client: Versions, candidate: Version, kits: dict[str, Kit], roots: bytes, tmp_path: Path
) -> None:
    base = vendor.list()[0]
    vendor.sign(candidate, "approve", kits["vera"].signer())
    assert vendor.history.state == "client acceptance"
    assert vendor.missing(candidate, roots) == ["the client north has not accepted it"]
    vendor.export(candidate, tmp_path / "v.zip")

    assert client.import_(tmp_path / "v.zip", roots) == candidate
    assert (client.history.state, client.current) == ("client acceptance", base)
    client.sign(candidate, "accept", kits["clara"].signer(), why="better on our line")
    assert client.history.state == "approved"
    client.deploy(candidate, roots, who="clara")
    assert (client.history.state, client.current) == ("deployed", candidate)
    assert (client.folder / "current").read_text().strip() == candidate.digest
    client.deploy(candidate, roots, who="clara")  # again: nothing happens
    client.export(candidate, tmp_path / "back.zip")

    vendor.import_(tmp_path / "back.zip", roots)
    assert (vendor.history.state, vendor.missing(candidate, roots)) == ("approved", [])
    vendor.import_(tmp_path / "back.zip", roots)
    assert [signed.statement.decision for signed in vendor.verify(candidate, roots)] == ["approve", "accept"]
    assert [line["kind"] for line in vendor.history.lines][-2:] == ["client acceptance", "approved"]
    assert vendor.history.lines[-1]["who"] == "clara (north)"
    assert vendor.history.lines[-1]["why"] == "better on our line"

    assert client.rollback(who="clara", why="too many false alarms") == base
    assert (client.history.state, client.current) == ("rolled back", base)
    with pytest.raises(ConfigError, match="nothing to go back to"):
        client.rollback(who="clara")
    client.deploy(candidate, roots, who="clara")
    assert (client.current, client.history.verify()) == (candidate, 7)


def test_what_is_missing_is_said(vendor: Versions, candidate: Version, kits: dict[str, Kit], roots: bytes) -> None:
    with pytest.raises(Refused, match=r"the vendor has not approved it; the client north has not accepted it"):
        vendor.deploy(candidate, roots, who="vera")
    vendor.sign(candidate, "approve", kits["vera"].signer())
    vendor.sign(candidate, "refuse", kits["clara"].signer(), why="worse on device 7")
    assert vendor.history.state == "rejected"
    with pytest.raises(Refused, match="the client north has refused it: worse on device 7"):
        vendor.deploy(candidate, roots, who="vera")
    with pytest.raises(ConfigError, match="a refusal is final"):
        vendor.sign(candidate, "accept", kits["clara"].signer())
    assert vendor.current == vendor.list()[0]
    assert not (vendor.folder / "current").exists()


def test_both_signatures_do_not_help_in_the_wrong_state(vendor: Versions, params: Params, kits: dict[str, Kit], roots: bytes) -> None:
    version = vendor.add(params(3.0), threshold=0.5)
    vendor.sign(version, "approve", kits["vera"].signer(), why="by hand")
    vendor.sign(version, "accept", kits["clara"].signer())
    assert (vendor.missing(version, roots), vendor.history.state) == ([], "draft")
    with pytest.raises(ConfigError, match="'deployed' cannot follow 'draft'"):
        vendor.deploy(version, roots, who="vera")
    assert vendor.current != version


def test_only_a_partys_own_people_sign_for_it(vendor: Versions, candidate: Version, kits: dict[str, Kit], roots: bytes) -> None:
    for name, decision in (("clara", "approve"), ("vera", "accept"), ("mallory", "approve"), ("mallory", "refuse")):
        with pytest.raises(IdentityError, match=r"cannot sign for the (vendor|client)"):
            vendor.sign(candidate, decision, kits[name].signer())  # type: ignore[arg-type]
    assert vendor.decisions(candidate) == {}


def test_a_decision_of_another_federation_is_not_believed(vendor: Versions, candidate: Version, roots: bytes) -> None:
    key, other = new_signing_key(), Authority.new_root("study")
    vera = Identity("study", Role.RESEARCHER, "vera", "Acme Vision")
    vendor.sign(candidate, "approve", Signer(key, other.issue(vera, public_key(key), days=1)))
    with pytest.raises(IdentityError, match=r"acme.signature: "):
        vendor.verify(candidate, roots)
    with pytest.raises(IdentityError):
        vendor.deploy(candidate, roots, who="vera")


def test_a_decision_on_another_version_does_not_count(vendor: Versions, candidate: Version, kits: dict[str, Kit], roots: bytes) -> None:
    base = vendor.list()[0]
    (vendor.path(candidate) / "acme.signature").write_bytes(
        decide(vendor.project, base.digest, "approve", kits["vera"].signer(), why="base")
    )
    with pytest.raises(IdentityError, match=f"acme's decision on {base.digest}"):
        vendor.verify(candidate, roots)


def test_without_an_accepting_gate_a_person_must_say_why(
    vendor: Versions, params: Params, project: Project, kits: dict[str, Kit], roots: bytes
) -> None:
    vera = kits["vera"].signer()
    few = vendor.add(params(2.0), threshold=0.5, evidence=evidence(params(2.0), project, rows=100))
    with pytest.raises(ConfigError, match="the gate's outcome is inconclusive, so an approval must say why"):
        vendor.sign(few, "approve", vera)
    vendor.sign(few, "approve", vera, why="the holdout is small, the devices are new")
    vendor.sign(few, "accept", kits["clara"].signer())
    assert vendor.missing(few, roots) == []

    none = vendor.add(params(2.5), threshold=0.5)
    with pytest.raises(ConfigError, match="there is no gate evidence, so"):
        vendor.sign(none, "approve", vera)

    worse = vendor.add(params(3.0), threshold=0.5, evidence=evidence(params(3.0), project, worse=0.2))
    with pytest.raises(ConfigError, match="the gate has rejected"):
        vendor.sign(worse, "approve", vera, why="I want it")
    (vendor.path(worse) / "acme.signature").write_bytes(decide(vendor.project, worse.digest, "approve", vera, why="I want it"))
    assert vendor.missing(worse, roots)[0] == "the gate has rejected it"


def test_a_persons_decision_in_the_evidence_must_be_the_vendors(
    vendor: Versions, params: Params, project: Project, kits: dict[str, Kit], roots: bytes
) -> None:
    found = msgspec.json.decode(evidence(params(2.0), project, rows=100), type=Evidence)
    for name, good in (("victor", True), ("clara", False)):
        signed = override(found, kits[name].signer(), accepted=True, why="looked at by hand", when=datetime.now(UTC))
        version = vendor.add(params(2.0), threshold=0.5, evidence=signed.json, notes=name)
        vendor.sign(version, "approve", kits["vera"].signer())
        if good:
            assert vendor.missing(version, roots) == ["the client north has not accepted it"]
        else:
            with pytest.raises(IdentityError, match=r"is not of the vendor"):
                vendor.missing(version, roots)


def test_one_person_cannot_sign_for_both(tmp_path: Path, params: Params, project: Project, kits: dict[str, Kit], roots: bytes) -> None:
    own = msgspec.structs.replace(project, clients=[msgspec.structs.replace(project.clients[0], organisation="Acme Vision")])
    write_project(tmp_path, own)
    (tmp_path / "model.py").write_text("")
    versions = Versions(tmp_path)
    version = versions.add(params(1.0), threshold=0.5)
    versions.sign(version, "approve", kits["vera"].signer(), why="one house")
    versions.sign(version, "accept", kits["vera"].signer())
    assert "signed for both parties: two people must" in versions.missing(version, roots)[0]
    other = versions.add(params(2.0), threshold=0.5)
    versions.sign(other, "approve", kits["vera"].signer(), why="one house")
    versions.sign(other, "accept", kits["victor"].signer())
    assert versions.missing(other, roots) == []


# ------------------------------------------------------------------------------------------------------------------------- rollback


def test_rollback_to_an_earlier_version_and_never_to_an_altered_one(vendor: Versions, params: Params) -> None:
    base, history = vendor.list()[0], vendor.history
    b, c = (vendor.add(params(value), threshold=0.5) for value in (2.0, 3.0))
    for version in (b, c):
        history.note("deployed by hand", who="vera", deployed=version.digest)
    with pytest.raises(ConfigError, match=r"was not deployed before; there were: " + base.digest[7:19]):
        vendor.rollback(vendor.add(params(4.0), threshold=0.5), who="vera")
    assert vendor.rollback(base, who="vera", why="in the middle of a draft") == base == vendor.current
    assert (history.state, history.deployed) == ("draft", [base.digest])
    history.note("deployed by hand", who="vera", deployed=c.digest)
    path = vendor.path(base) / "model.py"
    path.chmod(0o644)
    path.write_text("import os")
    with pytest.raises(WireError, match=r"model.py was altered"):
        vendor.rollback(who="vera")
    assert vendor.current == c


def test_a_crash_after_the_record_changes_nothing(vendor: Versions, params: Params) -> None:
    """What is deployed stands in the history: `current` may be older, and is written again."""
    base = vendor.list()[0]
    b = vendor.add(params(2.0), threshold=0.5)
    (vendor.folder / "current").write_text(base.digest)
    vendor.history.note("deployed by hand", who="vera", deployed=b.digest)
    assert vendor.current == b
    assert vendor.rollback(who="vera") == base


# ------------------------------------------------------------------------------------------------------------------------- carrying


@pytest.fixture
def exported(vendor: Versions, candidate: Version, kits: dict[str, Kit], tmp_path: Path) -> Path:
    vendor.sign(candidate, "approve", kits["vera"].signer())
    vendor.export(candidate, tmp_path / "v.zip")
    return tmp_path / "v.zip"


def rewritten(source: Path, target: Path, *, replace: dict[str, bytes] | None = None, leave_out: str = "", **options: int) -> Path:
    """The file with some contents replaced, added or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        contents = {name: old.read(name) for name in old.namelist() if name != leave_out} | (replace or {})
        for name, data in contents.items():
            new.writestr(name, data)
    return target


def test_the_same_version_gives_the_same_file(vendor: Versions, candidate: Version, exported: Path, tmp_path: Path) -> None:
    vendor.export(candidate, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == exported.read_bytes()
    assert set(zipfile.ZipFile(exported).namelist()) == {"version.json", "model.safetensors", "model.py", "evidence.json", "acme.signature"}


def test_what_the_vendor_has_not_approved_is_neither_written_nor_taken(
    vendor: Versions, client: Versions, candidate: Version, exported: Path, roots: bytes, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no approval of the vendor"):
        vendor.export(vendor.list()[0], tmp_path / "base.zip")
    with pytest.raises(IdentityError, match="no approval of the vendor"):
        client.import_(rewritten(exported, tmp_path / "x.zip", leave_out="acme.signature"), roots)
    assert not client.path(candidate).exists()


@pytest.mark.parametrize("name", ["version.json", "model.safetensors", "model.py", "evidence.json", "acme.signature"])
def test_an_altered_export_is_not_taken(
    client: Versions, candidate: Version, exported: Path, roots: bytes, tmp_path: Path, name: str
) -> None:
    data = bytearray(zipfile.ZipFile(exported).read(name))
    data[len(data) // 2] ^= 1
    with pytest.raises((WireError, IdentityError)):
        client.import_(rewritten(exported, tmp_path / "x.zip", replace={name: bytes(data)}), roots)
    assert not client.path(candidate).exists()
    assert (client.history.state, [*(client.folder / "versions").glob(".*")]) == ("draft", [])


@pytest.mark.parametrize(
    "name", ["../model.py", "/etc/passwd", "sub/model.py", "..\\model.py", "sitecustomize.py", "A.signature", "a.signature/x", "x" * 300]
)
def test_names_that_a_version_does_not_have_are_refused(client: Versions, exported: Path, roots: bytes, tmp_path: Path, name: str) -> None:
    before = {path for path in tmp_path.rglob("*")}
    bad = rewritten(exported, tmp_path / "x.zip", replace={name: b"boo"})
    with pytest.raises(WireError, match="is no file of a version"):
        client.import_(bad, roots)
    assert {path for path in tmp_path.rglob("*")} - before == {bad}


def test_bombs_and_rubbish_are_refused(client: Versions, exported: Path, roots: bytes, tmp_path: Path) -> None:
    bomb = rewritten(exported, tmp_path / "bomb.zip", replace={"model.py": b"\0" * (3 << 20)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WireError, match="is compressed or encrypted"):
        client.import_(bomb, roots)
    with pytest.raises(WireError, match="says it has"):
        client.import_(rewritten(exported, tmp_path / "large.zip", replace={"model.py": b"\0" * (5 << 20)}), roots)
    data = exported.read_bytes()
    with zipfile.ZipFile(exported) as archive:
        size = archive.getinfo("model.safetensors").file_size
    declared = data.replace(struct.pack("<II", size, size), struct.pack("<II", 1 << 30, 1 << 30))
    for content in (b"", b"PK", data[:-10], data[:200], data[300:], declared, b"\0" * 1000):
        (tmp_path / "bad.zip").write_bytes(content)
        with pytest.raises(WireError):
            client.import_(tmp_path / "bad.zip", roots)
    with pytest.raises(ConfigError, match="No such file"):
        client.import_(tmp_path / "nowhere.zip", roots)
    assert len(client.list()) == 1


def test_a_version_of_another_contract_is_not_taken(client: Versions, exported: Path, roots: bytes, project: Project) -> None:
    write_project(client.folder, msgspec.structs.replace(project, gate=Gate(resamples=200, margin_abs=0.001)))
    with pytest.raises(ConfigError, match=r"under another project.yaml"):
        client.import_(exported, roots)


def test_an_old_acceptance_does_not_undo_a_refusal(
    vendor: Versions, candidate: Version, exported: Path, kits: dict[str, Kit], roots: bytes, tmp_path: Path
) -> None:
    accepted = decide(vendor.project, candidate.digest, "accept", kits["clara"].signer())
    vendor.sign(candidate, "refuse", kits["clara"].signer(), why="no")
    vendor.import_(rewritten(exported, tmp_path / "x.zip", replace={"north.signature": accepted}), roots)
    assert vendor.decisions(candidate)["north"].decision == "refuse"


def test_a_decision_alone_can_be_taken_over(
    vendor: Versions, candidate: Version, exported: Path, kits: dict[str, Kit], roots: bytes
) -> None:
    accepted = decide(vendor.project, candidate.digest, "accept", kits["clara"].signer())
    for data, version in ((accepted, vendor.list()[0]), (accepted.replace(b"accept", b"refuse"), candidate), (b"{}", candidate)):
        with pytest.raises(IdentityError):
            vendor.add_decision(version, data, roots)
    assert vendor.history.state == "client acceptance"
    assert vendor.add_decision(candidate, accepted, roots).decision == "accept"
    vendor.add_decision(candidate, accepted, roots)
    assert (vendor.history.state, vendor.missing(candidate, roots)) == ("approved", [])
    assert [line["kind"] for line in vendor.history.lines].count("approved") == 1


def test_an_import_that_was_cut_off_is_made_good_by_another(client: Versions, candidate: Version, exported: Path, roots: bytes) -> None:
    client.import_(exported, roots)
    client.history.path.unlink()
    client.history.path.with_suffix(".head").unlink()  # as if the process had ended before it wrote
    client.import_(exported, roots)
    client.import_(exported, roots)
    assert [(line["kind"], line["version"]) for line in client.history.lines] == [
        ("client acceptance", candidate.digest), ("approve", candidate.digest),
    ]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_altered_byte_is_refused_or_means_nothing(
    client: Versions, candidate: Version, exported: Path, roots: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(exported.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "altered.zip").write_bytes(content)
    with contextlib.suppress(WireError, IdentityError, ConfigError):
        assert client.import_(tmp_path / "altered.zip", roots) == candidate  # a date was altered, or other rights
    assert not [*(client.folder / "versions").glob(".*")]
    if candidate in client.list():
        client.verify(candidate, roots)
