from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import ConfigError, HanseError, IdentityError, WireError
from hanse.identity.authority import Authority, new_signing_key, public_key
from hanse.identity.certificates import Identity, Role
from hanse.identity.signatures import Signer
from hanse.jobs.archive import MAX_MANIFEST_BYTES, Content, Manifest, code_digest, open_manifest, pack, trimmed, unpack
from hanse.jobs.bundle import JobFile, Sources, digests, read_folder, write_folder
from hanse.messages.flmodel import FLModel
from hanse.messages.wire import Resources


def signer_of(authority: Authority, name: str) -> Signer:
    key = new_signing_key()
    identity = Identity("north", Role.RESEARCHER, name, "University")
    return Signer(key, authority.issue(identity, public_key(key), days=30))


def write_job(folder: Path, values: float = 1.0, **fields: Any) -> Path:
    source = folder.with_name(f"{folder.name}-source")
    (source / "net").mkdir(parents=True)
    (source / "train.py").write_text("import net\n" * 100)
    (source / "net" / "__init__.py").write_text("SIZE = 3\n")
    (source / "net" / "leer é.txt").write_text("")
    sources = Sources()
    sources.add(source / "train.py")
    sources.add(source / "net")
    about = JobFile(**{"name": "digits", "recipe": "fedavg", "arguments": {"rounds": 7}, "script": "train.py", **fields})
    write_folder(folder, about, sources, FLModel({"w": np.full(20_000, values)}))
    return folder


@dataclass(frozen=True)
class Bundle:
    """A job folder, and what was made of it."""

    job: Path
    authority: Authority
    signer: Signer
    archive: Path
    manifest: bytes
    signature: bytes

    def opened(self) -> Manifest:
        return open_manifest(self.manifest, self.signature, self.authority.roots)[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    authority = Authority.new_root("north")
    signer = signer_of(authority, "ada")
    job = write_job(folder / "job")
    (job / "code" / "__pycache__").mkdir()
    (job / "code" / "__pycache__" / "train.pyc").write_bytes(b"made on import")
    manifest, signature = pack(
        job,
        folder / "job.zip",
        signer=signer,
        sites=["site-2", "site-1"],
        site_config={"site-1": {"data": "north.csv"}},
        resources=Resources(cores=2, memory_bytes=1 << 30),
    )
    shutil.rmtree(job / "code" / "__pycache__")
    return Bundle(job, authority, signer, folder / "job.zip", manifest, signature)


# ------------------------------------------------------------------------------------------------------------------- what goes in comes out


def test_a_job_travels_whole(bundle: Bundle, tmp_path: Path) -> None:
    manifest, submitter = open_manifest(bundle.manifest, bundle.signature, bundle.authority.roots)
    assert submitter == Identity("north", Role.RESEARCHER, "ada", "University")
    unpack(bundle.archive, manifest, tmp_path / "jobs" / "job")
    assert digests(tmp_path / "jobs" / "job") == digests(bundle.job)
    assert read_folder(tmp_path / "jobs" / "job").name == "digits"
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["job"]


def test_the_manifest_says_what_the_job_is(bundle: Bundle) -> None:
    manifest = bundle.opened()
    assert (manifest.name, manifest.workflow, manifest.rounds, manifest.submitter) == ("digits", "fedavg", 7, "ada")
    assert (manifest.sites, manifest.min_sites) == (["site-1", "site-2"], 2)
    assert manifest.site_config == {"site-1": {"data": "north.csv"}}
    assert manifest.resources == Resources(cores=2, memory_bytes=1 << 30)
    assert timedelta(0) <= datetime.now(UTC) - manifest.created < timedelta(minutes=5)
    assert {name: f"blake3:{content.digest}" for name, content in manifest.digests.items()} == digests(bundle.job)
    assert manifest.digests["code/net/__init__.py"] == Content(blake3(b"SIZE = 3\n").hexdigest(), 9)
    assert manifest.size == sum(path.stat().st_size for path in bundle.job.rglob("*") if path.is_file())


def test_the_same_folder_gives_the_same_archive(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.job, tmp_path / "copy"))
    for path in copy.rglob("*"):
        os.utime(path, (1, 1) if path.is_dir() else (2_000_000_000, 2_000_000_000))
        path.chmod(0o700)
    pack(copy, tmp_path / "again.zip", signer=bundle.signer)
    assert (tmp_path / "again.zip").read_bytes() == bundle.archive.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "again.zip"}
    with zipfile.ZipFile(bundle.archive) as opened:
        assert opened.testzip() is None
        kinds = {entry.filename: entry.compress_type for entry in opened.infolist()}
    assert list(kinds) == sorted(kinds)
    assert (kinds["model.safetensors"], kinds["code/train.py"]) == (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def test_the_same_job_submitted_again_is_another_one(bundle: Bundle, tmp_path: Path) -> None:
    first, second = (pack(bundle.job, tmp_path / "job.zip", signer=bundle.signer)[0] for _ in range(2))
    assert first != second  # or a site would take the second, a moment later, for a replay of the first


def test_rounds_and_sites_by_default(bundle: Bundle, tmp_path: Path) -> None:
    own = write_job(tmp_path / "own", recipe="workflow", arguments={"arguments": {"rounds": 4}}, workflow={"file": "train.py", "name": "f"})
    without = write_job(tmp_path / "without", recipe="fedeval", arguments={})
    for job, rounds in ((own, 4), (without, 1)):
        signed = pack(job, tmp_path / "job.zip", signer=bundle.signer)
        manifest = open_manifest(*signed, bundle.authority.roots)[0]
        assert (manifest.rounds, manifest.sites, manifest.min_sites) == (rounds, [], 1)
    signed = pack(own, tmp_path / "job.zip", signer=bundle.signer, sites=["a", "b", "c"], min_sites=2)
    assert open_manifest(*signed, bundle.authority.roots)[0].min_sites == 2


def test_sites_get_it_without_the_first_model(bundle: Bundle, tmp_path: Path) -> None:
    manifest = bundle.opened()
    trimmed(bundle.archive, tmp_path / "small.zip", {"model.safetensors"})
    assert (tmp_path / "small.zip").stat().st_size < 5_000 < bundle.archive.stat().st_size
    unpack(tmp_path / "small.zip", manifest, tmp_path / "job", may_lack={"model.safetensors"})
    expected = digests(bundle.job)
    del expected["model.safetensors"]
    assert digests(tmp_path / "job") == expected
    with pytest.raises(WireError, match=r"'model\.safetensors' is in the manifest and not in the archive"):
        unpack(tmp_path / "small.zip", manifest, tmp_path / "other")
    trimmed(bundle.archive, tmp_path / "whole.zip", ())
    assert (tmp_path / "whole.zip").read_bytes() == bundle.archive.read_bytes()


def test_the_code_digest_is_of_all_but_the_model(bundle: Bundle, tmp_path: Path) -> None:
    def of(job: Path) -> str:
        return code_digest(open_manifest(*pack(job, tmp_path / "job.zip", signer=bundle.signer), bundle.authority.roots)[0])

    assert of(bundle.job) == code_digest(bundle.opened())
    assert code_digest(bundle.opened()).startswith("blake3:")
    job = write_job(tmp_path / "job", values=2.0)
    text = (job / "job.yaml").read_text()
    (job / "job.yaml").write_text("".join(line for line in text.splitlines(True) if "model.safetensors: blake3" not in line))
    free = of(job)
    (job / "model.safetensors").write_bytes((bundle.job / "model.safetensors").read_bytes())
    assert of(job) == free
    (job / "more.py").write_text("")
    assert of(job) != free


# ---------------------------------------------------------------------------------------------------------------------- what is not packed


def test_links_and_special_files_are_not_packed(bundle: Bundle, tmp_path: Path) -> None:
    for make in (
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: path.symlink_to(bundle.job / "code", target_is_directory=True),
        lambda path: path.symlink_to("nowhere"),
        os.mkfifo,
    ):
        job = Path(shutil.copytree(bundle.job, tmp_path / "job"))
        make(job / "code" / "extra")
        with pytest.raises(ConfigError, match="extra is a link or a special file"):
            pack(job, tmp_path / "job.zip", signer=bundle.signer)
        shutil.rmtree(job)
    assert list(tmp_path.iterdir()) == []


BAD_NAMES = [
    ["/etc/passwd"], ["../up"], ["code/../../up"], ["code/./x"], ["code//x"], ["code/"], [""], ["a\\b"], ["C:x"], ["c:/x"], ["a\nb"],
    ["a\x00b"], ["x" * 256], ["/".join(["x" * 100] * 6)], ["é" * 128], ["con "], ["dot."], [" x"], ["a\u202eb"], ["code/.."], ["."],
    ["a", "A"], ["straße", "STRASSE"], ["\u00e9", "e\u0301"], ["a", "a/b"], ["a/b", "A/c"],
]  # fmt: skip


@pytest.mark.parametrize("names", BAD_NAMES, ids=repr)
def test_names_that_not_every_system_can_hold(bundle: Bundle, names: list[str], tmp_path: Path) -> None:
    content = Content(blake3(b"").hexdigest(), 0)
    fields = msgspec.to_builtins(bundle.opened()) | {"digests": {name: content for name in names}}
    with pytest.raises(ConfigError, match=r"is no name for a file of a job|are one name on some systems"):
        Manifest(**{**msgspec.structs.asdict(bundle.opened()), "digests": fields["digests"]})
    data = msgspec.json.encode(fields)
    with pytest.raises(ConfigError, match=r"is no name for a file of a job|are one name on some systems"):
        open_manifest(data, bundle.signer.sign(data), bundle.authority.roots)


def test_a_name_that_cannot_travel_is_not_packed(bundle: Bundle, tmp_path: Path) -> None:
    job = Path(shutil.copytree(bundle.job, tmp_path / "job"))
    (job / "code" / "a:b.txt").touch()
    with pytest.raises(ConfigError, match=r"'code/a:b\.txt' is no name for a file of a job"):
        pack(job, tmp_path / "job.zip", signer=bundle.signer)


def test_what_pack_refuses(bundle: Bundle, tmp_path: Path) -> None:
    def refused(message: str, job: Path = bundle.job, **asked: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            pack(job, tmp_path / "out" / "job.zip", signer=bundle.signer, **asked)
        assert list((tmp_path / "out").iterdir()) == []

    (tmp_path / "out").mkdir()
    refused("is no job folder", tmp_path / "out")
    refused("has rounds='many'", write_job(tmp_path / "many", arguments={"rounds": "many"}))
    refused("cannot be submitted: .*min_sites", min_sites=0)
    refused("cannot be submitted: .*sites", sites=["a/b"])
    refused("cannot be submitted", site_config={"a": {"data": object()}})
    refused(f"at most {MAX_MANIFEST_BYTES:,} can travel", site_config={"a": {"data": "x" * MAX_MANIFEST_BYTES}})
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    refused("cannot be submitted", site_config={"a": {"data": deep}})


# --------------------------------------------------------------------------------------------------------------------- whom it is believed


def test_the_signature_comes_first(bundle: Bundle) -> None:
    roots = bundle.authority.roots
    with pytest.raises(IdentityError):
        open_manifest(bundle.manifest.replace(b"digits", b"cancer"), bundle.signature, roots)
    with pytest.raises(IdentityError):
        open_manifest(b"{", bundle.signature, roots)
    with pytest.raises(IdentityError):
        open_manifest(bundle.manifest, bundle.signature, Authority.new_root("north").roots)
    with pytest.raises(IdentityError):
        open_manifest(bundle.manifest, bundle.signature, roots, now=datetime.now(UTC) + timedelta(days=31))
    with pytest.raises(WireError, match="a manifest of 1,048,577 bytes"):
        open_manifest(b" " * (MAX_MANIFEST_BYTES + 1), bundle.signature, roots)


def test_the_submitter_is_who_signed(bundle: Bundle) -> None:
    other = signer_of(bundle.authority, "eve")
    with pytest.raises(IdentityError, match="says that 'ada' submits it, and 'eve' has signed it"):
        open_manifest(bundle.manifest, other.sign(bundle.manifest), bundle.authority.roots)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 2}, ConfigError, "of format 2; this version of Hanse reads 1"),
        ({"surprise": 1}, WireError, "unknown field `surprise`"),
        ({"min_sites": 0}, WireError, "min_sites"),
        ({"rounds": -1}, WireError, "rounds"),
        ({"digests": {"job.yaml": ["00", 1]}}, WireError, "digests"),
        ({"digests": {"job.yaml": ["0" * 64, -1]}}, WireError, "digests"),
        ({"digests": {"job.yaml": ["0" * 64, 1 << 62]}}, WireError, "digests"),
    ],
)
def test_a_signed_manifest_may_still_be_wrong(bundle: Bundle, change: dict[str, Any], error: type[HanseError], message: str) -> None:
    data = msgspec.json.encode(msgspec.to_builtins(bundle.opened()) | change)
    with pytest.raises(error, match=message):
        open_manifest(data, bundle.signer.sign(data), bundle.authority.roots)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"format":1}', b"\xff", b'{"format":"1"}'])
def test_what_is_no_manifest(bundle: Bundle, data: bytes) -> None:
    with pytest.raises(WireError, match="this is no manifest"):
        open_manifest(data, bundle.signer.sign(data), bundle.authority.roots)


# ---------------------------------------------------------------------------------------------------------------------- hostile archives


def entry(name: str, *, kind: int = stat.S_IFREG, attributes: int = 0, compress: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o644) << 16 | attributes
    info.compress_type = compress
    return info


def with_entries(bundle: Bundle, path: Path, *more: tuple[zipfile.ZipInfo, bytes], leave_out: str = "") -> Path:
    """The bundle's archive with other entries."""
    with zipfile.ZipFile(bundle.archive) as source, zipfile.ZipFile(path, "w") as sink:
        for each in source.infolist():
            if each.filename != leave_out:
                sink.writestr(each, source.read(each))
        for info, data in more:
            sink.writestr(info, data)
    return path


TRAIN = "code/train.py"
HOSTILE: dict[str, tuple[list[tuple[zipfile.ZipInfo, bytes]], str]] = {
    "another file": ([(entry("code/extra.py"), b"x")], "'code/extra.py' in the archive is not in the manifest"),
    "out of the folder": ([(entry("../evil"), b"x")], "is not in the manifest"),
    "absolute": ([(entry("/tmp/evil"), b"x")], "is not in the manifest"),
    "a folder": ([(entry("code/", kind=stat.S_IFDIR, attributes=0x10), b"")], "is not in the manifest"),
    "twice": ([(entry(TRAIN), b"import net\n" * 100)] * 2, "is there twice"),
    "a link": ([(entry(TRAIN, kind=stat.S_IFLNK), b"/etc/passwd")], "is a link, a folder or a special file"),
    "a device": ([(entry(TRAIN, kind=stat.S_IFBLK), b"")], "is a link, a folder or a special file"),
    "a folder by the name of a file": ([(entry(TRAIN, kind=0, attributes=0x10), b"")], "is a link, a folder or a special file"),
    "longer": ([(entry(TRAIN), b"import net\n" * 101)], "says it has 1,111 bytes, and the manifest 1,100"),
    "shorter": ([(entry(TRAIN), b"import net\n" * 99)], "says it has 1,089 bytes"),
    "other content": ([(entry(TRAIN), b"import met\n" * 100)], "is not what the manifest says: its digest differs"),
    "bzip2": ([(entry(TRAIN, compress=zipfile.ZIP_BZIP2), b"import net\n" * 100)], "compressed in a way other than deflate"),
    "missing": ([], "'code/train.py' is in the manifest and not in the archive"),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_archive_changes_nothing(bundle: Bundle, what: str, tmp_path: Path) -> None:
    more, message = HOSTILE[what]
    replaces = any(info.filename == TRAIN for info, _ in more) or not more
    archive = with_entries(bundle, tmp_path / "hostile.zip", *more, leave_out=TRAIN if replaces else "")
    with pytest.raises(WireError, match=message):
        unpack(archive, bundle.opened(), tmp_path / "jobs" / "job")
    assert not (tmp_path / "jobs").exists() or list((tmp_path / "jobs").iterdir()) == []
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [b"import net\n" * 100 + b"\0" * (64 << 20), b"import net\n" * 99], ids=["a bomb", "too short"])
def test_a_directory_that_lies_about_a_size(bundle: Bundle, content: bytes, tmp_path: Path) -> None:
    """The directory gives the manifest's size, and something else comes out."""
    archive = with_entries(bundle, tmp_path / "lie.zip", (entry(TRAIN), content), leave_out=TRAIN)
    data = archive.read_bytes().replace(len(content).to_bytes(4, "little"), (1100).to_bytes(4, "little"))
    archive.write_bytes(data)
    with pytest.raises(WireError, match=r"cannot be read|differs"):
        unpack(archive, bundle.opened(), tmp_path / "job")
    assert not (tmp_path / "job").exists()


MEASURE = """
import resource, sys
from pathlib import Path
import msgspec
from hanse.errors import WireError
from hanse.jobs.archive import Manifest, unpack

manifest = msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=Manifest)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    unpack(Path(sys.argv[1]), manifest, Path(sys.argv[3]))
except WireError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def test_a_directory_without_end_takes_no_memory(bundle: Bundle, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "long.zip", "w") as sink:
        for number in range(2_000):
            sink.writestr(zipfile.ZipInfo(f"{number:06d}" + "x" * 60_000), b"")
    (tmp_path / "manifest").write_bytes(bundle.manifest)
    command = [sys.executable, "-c", MEASURE, tmp_path / "long.zip", tmp_path / "manifest", tmp_path / "job"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    grown_kib, _, text = done.stdout.partition(" ")
    assert "would have to be read at once" in text
    assert int(grown_kib) < 32 << 10


def test_how_much_is_unpacked(bundle: Bundle, tmp_path: Path) -> None:
    size = bundle.opened().size
    with pytest.raises(WireError, match=f"take {size:,} bytes: at most {size - 1:,} are unpacked"):
        unpack(bundle.archive, bundle.opened(), tmp_path / "job", max_bytes=size - 1)
    unpack(bundle.archive, bundle.opened(), tmp_path / "job", max_bytes=size)


def test_only_into_a_folder_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    unpack(bundle.archive, bundle.opened(), tmp_path / "job")
    with pytest.raises(ConfigError, match="is not empty"):
        unpack(bundle.archive, bundle.opened(), tmp_path / "job")
    with pytest.raises(ConfigError, match="is not empty"):
        unpack(bundle.archive, bundle.opened(), bundle.archive)
    with pytest.raises(ConfigError, match="No such file"):
        unpack(tmp_path / "none.zip", bundle.opened(), tmp_path / "other")


@pytest.mark.parametrize("data", [b"", b"PK", b"\0" * 100, b"PK\x05\x06" + b"\xff" * 18])
def test_what_is_no_archive(bundle: Bundle, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(WireError, match="cannot be read"):
        unpack(tmp_path / "x.zip", bundle.opened(), tmp_path / "job")
    with pytest.raises(WireError, match="cannot be read"):
        trimmed(tmp_path / "x.zip", tmp_path / "y.zip", [])
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_an_archive_of_nothing(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    with pytest.raises(WireError, match="in the manifest and not in the archive"):
        unpack(tmp_path / "x.zip", bundle.opened(), tmp_path / "job")


FILL = """
import sys
from pathlib import Path
import msgspec
from hanse.errors import StorageFull
from hanse.jobs.archive import Manifest, unpack

manifest = msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=Manifest)
try:
    unpack(Path(sys.argv[1]), manifest, Path("/mnt/job"))
except StorageFull as error:
    print(list(Path("/mnt").iterdir()), error)
"""


def test_a_full_disk_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "manifest").write_bytes(bundle.manifest)
    if not shutil.which("bwrap"):
        pytest.skip("no bwrap to make a small disk with")
    small = ["bwrap", "--bind", "/", "/", "--size", "65536", "--tmpfs", "/mnt"]
    if subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no user namespaces")
    command = [*small, sys.executable, "-c", FILL, str(bundle.archive), str(tmp_path / "manifest")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] there is no room for /mnt/job")


# ---------------------------------------------------------------------------------------------------------------------------------- fuzzing


def survives(bundle: Bundle, archive: bytes, manifest: bytes, signature: bytes) -> None:
    """Whatever the bytes, the files come out as they were, or an error of the tree is raised and nothing comes out."""
    folder = bundle.archive.parent / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "x.zip").write_bytes(archive)
    try:
        opened, _ = open_manifest(manifest, signature, bundle.authority.roots)
        unpack(folder / "x.zip", opened, folder / "job")
    except (ConfigError, WireError, IdentityError):
        assert [path.name for path in folder.iterdir()] == ["x.zip"]
    else:
        assert digests(folder / "job") == digests(bundle.job)
        assert manifest == bundle.manifest


Change = Callable[[bytes], bytes]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """A few altered bytes, a cut, or something put in between; mostly near the end, where an archive's directory is."""

    def place(size: int) -> int:
        return max(0, size - 1 - near) if at_end else near * 7919 % max(size, 1)

    at_end, near = draw(st.booleans()), draw(st.integers(0, 1200))
    kind, data = draw(st.sampled_from(["alter", "cut", "insert", "remove"])), draw(st.binary(min_size=1, max_size=8))

    def change(whole: bytes) -> bytes:
        where = place(len(whole))
        match kind:
            case "alter":
                return whole[:where] + data + whole[where + len(data) :]
            case "cut":
                return whole[:where]
            case "insert":
                return whole[:where] + data + whole[where:]
        return whole[:where] + whole[where + len(data) :]

    return change


@settings(max_examples=600, deadline=None)
@given(change=changes())
def test_altered_archives(bundle: Bundle, change: Change) -> None:
    survives(bundle, change(bundle.archive.read_bytes()), bundle.manifest, bundle.signature)


@settings(max_examples=200, deadline=None)
@given(change=changes(), of_manifest=st.booleans())
def test_altered_manifests_and_signatures(bundle: Bundle, change: Change, of_manifest: bool) -> None:
    manifest = change(bundle.manifest) if of_manifest else bundle.manifest
    signature = bundle.signature if of_manifest else change(bundle.signature)
    if (manifest, signature) == (bundle.manifest, bundle.signature):
        return
    with pytest.raises((IdentityError, WireError)):
        open_manifest(manifest, signature, bundle.authority.roots)


def test_every_byte_of_the_directory(bundle: Bundle) -> None:
    whole = bundle.archive.read_bytes()
    start = whole.index(b"PK\x01\x02")
    for place in range(start, len(whole)):
        for value in (0x00, 0xFF, whole[place] ^ 0x01):
            survives(bundle, whole[:place] + bytes([value]) + whole[place + 1 :], bundle.manifest, bundle.signature)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(["format", "name", "digests", "sites", "site_config", "rounds", "created"]), JSON, min_size=1)
)
def test_signed_nonsense(bundle: Bundle, fields: dict[str, Any]) -> None:
    data = msgspec.json.encode(msgspec.to_builtins(bundle.opened()) | fields)
    with contextlib.suppress(ConfigError, WireError):
        manifest, _ = open_manifest(data, bundle.signer.sign(data), bundle.authority.roots)
        assert {name: getattr(manifest, name) for name in fields if name not in ("digests", "created")} == {
            name: value for name, value in fields.items() if name not in ("digests", "created")
        }
