from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hanse.errors import ConfigError, IdentityError
from hanse.identity.authority import Authority, new_signing_key, public_key
from hanse.identity.certificates import SERVING, SIGNING, Identity, Role, addresses_of, check_chain, identity_of
from hanse.identity.kit import read_kit
from hanse.identity.signatures import verify
from hanse.identity.tokens import read_token
from hanse.provision.kits import provision
from hanse.provision.project import Admin, Project, Server, Site

SERVER = Server(organisation="Hospital", addresses=["fl.example.org", "10.0.0.5"], port=9000, database="postgresql+asyncpg://db/hanse")
ADA = Admin(name="ada", organisation="Hospital", role=Role.PROJECT_ADMIN)
DAN = Admin(name="dan", organisation="Ethics Board", role=Role.AUDITOR)
NORTH = Site(name="north", organisation="North Clinic")
PROJECT = Project(federation="study", server=SERVER, admins=[ADA, DAN], sites=[NORTH], token_hours=3, certificate_days=30, admin_days=200)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "study"
    assert provision(PROJECT, folder) == [folder / name for name in ("authority", "server", "admins/ada", "admins/dan", "sites/north")]
    return folder


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def days_left(moment: datetime) -> int:
    return round((moment - datetime.now(UTC)) / timedelta(days=1))


def test_the_server_gets_a_kit_to_start_from(made: Path) -> None:
    kit, roots = read_kit(made / "server"), (made / "authority" / "roots.pem").read_bytes()
    assert (kit.federation, kit.role, kit.name, kit.organisation) == ("study", Role.SERVER, "server", "Hospital")
    assert (kit.server, kit.listen, kit.database) == ("fl.example.org:9000", "[::]:9000", "postgresql+asyncpg://db/hanse")
    assert kit.certificate_days == 30
    credentials = kit.credentials()
    assert check_chain(credentials.certificate, roots, purpose=SERVING) == Identity("study", Role.SERVER, "server", "Hospital")
    assert addresses_of(credentials.certificate) == ("fl.example.org", "10.0.0.5")
    assert credentials.roots == roots
    assert days_left(credentials.expires) == 30


def test_the_server_can_enrol_sites_and_make_no_signers(made: Path) -> None:
    authority, root = read_kit(made / "server").authority(), Authority.load(made / "authority")
    identity = Identity("study", Role.SITE, "north", "North Clinic")
    key = new_signing_key()
    assert authority.key != root.key
    assert authority.roots == root.roots
    with pytest.raises(IdentityError, match="no certificates for signing"):
        authority.issue(identity, public_key(key), days=1)
    assert identity_of(root.issue(identity, public_key(key), days=1)) == identity


def test_the_root_key_lies_in_the_authority_folder_only(made: Path) -> None:
    key = (made / "authority" / "key.pem").read_bytes().splitlines()[1]
    assert [name for name, (_, data) in contents(made).items() if key in data] == ["authority/key.pem"]


def test_an_admin_gets_a_kit_to_connect_and_sign_with(made: Path) -> None:
    kit, roots = read_kit(made / "admins" / "ada"), (made / "authority" / "roots.pem").read_bytes()
    ada = Identity("study", Role.PROJECT_ADMIN, "ada", "Hospital")
    assert (kit.role, kit.name, kit.server) == (Role.PROJECT_ADMIN, "ada", "fl.example.org:9000")
    assert check_chain(kit.credentials().certificate, roots) == ada
    assert check_chain(kit.signer().certificate, roots, purpose=SIGNING) == ada
    assert verify(b"job", kit.signer().sign(b"job"), roots) == ada
    assert days_left(kit.credentials().expires) == 200


def test_an_auditor_cannot_sign(made: Path) -> None:
    kit = read_kit(made / "admins" / "dan")
    assert kit.credentials().identity == Identity("study", Role.AUDITOR, "dan", "Ethics Board")
    with pytest.raises(ConfigError, match="submits no jobs"):
        kit.signer()


def test_a_site_gets_a_token_and_no_key_of_its_own(made: Path) -> None:
    folder = made / "sites" / "north"
    token = read_token((folder / "join.token").read_text())
    assert (token.address, token.site, token.organisation) == ("fl.example.org:9000", "north", "North Clinic")
    assert timedelta(hours=2) < token.credentials.expires - datetime.now(UTC) < timedelta(hours=4)
    assert sorted(contents(folder)) == ["compose.yaml", "image/Dockerfile", "join.token", "kubernetes.yaml", "start.sh"]


def test_secrets_are_for_their_owner_alone(made: Path) -> None:
    secret = [path for path in made.rglob("*") if path.name in ("key.pem", "signing_key.pem", "join.token", "kubernetes.yaml", "kit.yaml")]
    assert len(secret) == 1 + 4 + 5 + 2
    assert {path.stat().st_mode & 0o777 for path in secret} == {0o600}
    folders = ("authority", "server", "server/credentials", "server/authority", "admins/ada", "admins/ada/credentials", "sites/north")
    assert {(made / name).stat().st_mode & 0o777 for name in folders} == {0o700}


def test_running_again_adds_what_is_new_and_changes_nothing_else(tmp_path: Path) -> None:
    provision(PROJECT, tmp_path)
    before = contents(tmp_path)
    assert provision(PROJECT, tmp_path) == []
    assert contents(tmp_path) == before
    eve, south = Admin(name="eve", organisation="Hospital", role=Role.RESEARCHER), Site(name="south", organisation="South Clinic")
    more = Project(federation="study", server=SERVER, admins=[eve, ADA], sites=[NORTH, south])
    assert provision(more, tmp_path) == [tmp_path / "admins" / "eve", tmp_path / "sites" / "south"]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    roots = (tmp_path / "authority" / "roots.pem").read_bytes()
    assert verify(b"job", read_kit(tmp_path / "admins" / "eve").signer().sign(b"job"), roots).name == "eve"


def test_a_folder_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    provision(PROJECT, tmp_path)
    site = tmp_path / "sites" / "north"
    first = (site / "join.token").read_text()
    for path in (site / "image" / "Dockerfile", *site.glob("*.*")):
        path.unlink()
    (site / "image").rmdir()
    site.rmdir()
    assert provision(PROJECT, tmp_path) == [site]
    assert (site / "join.token").read_text() != first


def test_what_an_interrupted_run_left_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / ".authority.unfinished").mkdir()
    (tmp_path / ".authority.unfinished" / "key.pem").write_text("half a")
    provision(PROJECT, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["admins", "authority", "server", "sites"]


def test_another_federation_does_not_get_into_the_folder(tmp_path: Path) -> None:
    provision(PROJECT, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="the federation 'study', not of 'other'"):
        provision(Project(federation="other", server=SERVER), tmp_path)
    assert contents(tmp_path) == before


def test_participants_without_their_authority_get_no_new_one(tmp_path: Path) -> None:
    provision(PROJECT, tmp_path)
    (tmp_path / "authority").rename(tmp_path / "offline")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"server, admins, sites and no authority.*Bring the authority's folder back"):
        provision(PROJECT, tmp_path)
    assert contents(tmp_path) == before
