from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import IdentityError
from hanse.identity.authority import Authority, new_key, new_signing_key, public_key, request
from hanse.identity.certificates import (
    SERVING,
    SIGNING,
    Credentials,
    Identity,
    Role,
    addresses_of,
    check_chain,
    identity_of,
    private_key,
)

ROOT = Authority.new_root("study")
ENROLMENT = ROOT.intermediate("enrolment", 100)
SITE = Identity("study", Role.SITE, "north", "North Clinic")
SERVER = Identity("study", Role.SERVER, "server", "Hospital")


def credentials(authority: Authority, identity: Identity, *, days: float = 1, addresses: tuple[str, ...] = ()) -> Credentials:
    key = new_key()
    return Credentials(key, authority.issue(identity, public_key(key), days=days, addresses=addresses), authority.roots)


@settings(max_examples=40, deadline=None)
@given(
    name=st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=100),
    federation=st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=20),
    role=st.sampled_from(Role),
)
def test_a_certificate_says_whom_it_was_issued_for(name: str, federation: str, role: Role) -> None:
    identity = Identity(federation, role, name, "Klinik Süd")
    assert identity_of(credentials(ROOT, identity).certificate) == identity


def test_a_name_cannot_pass_for_another_part_of_the_identity() -> None:
    trickster = Identity("study", Role.SITE, "../server/x", "North Clinic")
    assert identity_of(credentials(ROOT, trickster).certificate) == trickster
    assert trickster.uri.count("/") == 4


@pytest.mark.parametrize("text", [b"", b"north", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_refused(text: bytes) -> None:
    with pytest.raises(IdentityError, match="no certificate"):
        identity_of(text)


def test_a_certificate_of_no_participant_is_refused() -> None:
    with pytest.raises(IdentityError, match="names no participant"):
        identity_of(ROOT.certificate)


def forged(authority: Authority, public: x509.Certificate, *names: x509.GeneralName) -> bytes:
    """A certificate with these names, signed by the authority without asking whether it may."""
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    builder = x509.CertificateBuilder(
        issuer.subject,
        public.subject,
        public.public_key(),  # type: ignore[arg-type]
        x509.random_serial_number(),
        public.not_valid_before_utc,
        public.not_valid_after_utc,
    )
    for extension in public.extensions:
        value = extension.value
        if names and isinstance(value, x509.SubjectAlternativeName):
            value = x509.SubjectAlternativeName(names)
        if isinstance(value, x509.AuthorityKeyIdentifier):
            value = x509.AuthorityKeyIdentifier.from_issuer_public_key(private_key(authority.key).public_key())
        builder = builder.add_extension(value, extension.critical)
    key = private_key(authority.key)
    digest = x509.load_pem_x509_certificate(ROOT.certificate).signature_hash_algorithm
    return builder.sign(key, digest).public_bytes(Encoding.PEM)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "uris",
    [
        ["https://study/site/north"],
        ["hanse://study/king/north"],
        ["hanse://study/site/"],
        ["hanse:///site/north"],
        ["hanse://study/site/north/server"],
        ["hanse://study/site/%6Eorth"],
        ["hanse://study/site/north", "hanse://study/project-admin/north"],
    ],
)
def test_only_one_identity_in_one_spelling_counts(uris: list[str]) -> None:
    plain = x509.load_pem_x509_certificate(credentials(ROOT, SITE).certificate)
    with pytest.raises(IdentityError, match="names no participant"):
        identity_of(forged(ROOT, plain, *map(x509.UniformResourceIdentifier, uris)))


def test_a_chain_leads_to_the_root() -> None:
    assert check_chain(credentials(ROOT, SITE).certificate, ROOT.roots) == SITE
    enrolled = credentials(ENROLMENT, SITE).certificate
    assert enrolled.count(b"BEGIN CERTIFICATE") == 2
    assert check_chain(enrolled, ROOT.roots) == SITE
    assert check_chain(enrolled, Authority.new_root("other").roots + ROOT.roots) == SITE


def test_a_chain_to_another_authority_of_the_same_name_is_refused() -> None:
    other = Authority.new_root("study")
    for authority in (other, other.intermediate("enrolment", 1)):
        with pytest.raises(IdentityError, match="does not lead to this federation's authority"):
            check_chain(credentials(authority, SITE).certificate, ROOT.roots)


def test_a_chain_with_a_link_missing_is_refused() -> None:
    whole = credentials(ENROLMENT, SITE).certificate
    leaf = x509.load_pem_x509_certificates(whole)[0].public_bytes(Encoding.PEM)
    with pytest.raises(IdentityError, match="does not lead"):
        check_chain(leaf, ROOT.roots)
    with pytest.raises(IdentityError):
        check_chain(whole, b"")


@pytest.mark.parametrize(("later", "then"), [(timedelta(days=2), "valid from"), (timedelta(hours=-1), "valid from")])
def test_a_certificate_counts_in_its_time_only(later: timedelta, then: str) -> None:
    certificate = credentials(ROOT, SITE, days=1).certificate
    assert check_chain(certificate, ROOT.roots, now=datetime.now(UTC) + timedelta(hours=23)) == SITE
    with pytest.raises(IdentityError, match=then):
        check_chain(certificate, ROOT.roots, now=datetime.now(UTC) + later)


def test_an_expired_authority_counts_no_more() -> None:
    short = ROOT.intermediate("enrolment", 1)
    leaf = x509.load_pem_x509_certificate(credentials(ROOT, SITE, days=9).certificate)
    outlives = forged(short, leaf) + short.certificate
    assert check_chain(outlives, ROOT.roots) == SITE
    with pytest.raises(IdentityError, match="does not lead"):
        check_chain(outlives, ROOT.roots, now=datetime.now(UTC) + timedelta(days=3))


def test_a_participant_is_no_authority() -> None:
    north = credentials(ROOT, SITE)
    leaf = x509.load_pem_x509_certificate(credentials(ROOT, Identity("study", Role.PROJECT_ADMIN, "north", "North Clinic")).certificate)
    chain = forged(Authority(north.key, north.certificate, ROOT.roots), leaf) + north.certificate
    with pytest.raises(IdentityError, match="CA"):
        check_chain(chain, ROOT.roots)


def test_the_enrolment_authority_makes_no_authorities() -> None:
    below = ENROLMENT.intermediate("below", 1)
    with pytest.raises(IdentityError, match="does not lead"):
        check_chain(credentials(below, SITE).certificate, ROOT.roots)


def test_the_enrolment_authority_makes_no_signers() -> None:
    key = new_signing_key()
    honest = ROOT.issue(SITE, public_key(key), days=1)
    assert check_chain(honest, ROOT.roots, purpose=SIGNING) == SITE
    chain = forged(ENROLMENT, x509.load_pem_x509_certificate(honest)) + ENROLMENT.certificate
    with pytest.raises(IdentityError, match="codeSigning"):
        check_chain(chain, ROOT.roots, purpose=SIGNING)


def test_a_certificate_counts_for_its_purpose_only() -> None:
    site = credentials(ROOT, SITE).certificate
    signing = ROOT.issue(SITE, public_key(new_signing_key()), days=1)
    server = credentials(ROOT, SERVER, addresses=("localhost",)).certificate
    assert check_chain(server, ROOT.roots, purpose=SERVING) == SERVER
    for chain, purpose in ((site, SERVING), (site, SIGNING), (server, SIGNING), (signing, SERVING)):
        with pytest.raises(IdentityError, match="it is not for"):
            check_chain(chain, ROOT.roots, purpose=purpose)
    with pytest.raises(IdentityError, match="it is not for clientAuth"):
        check_chain(signing, ROOT.roots)


def test_a_chain_without_end_is_refused() -> None:
    with pytest.raises(IdentityError, match="comes with 50 others"):
        check_chain(credentials(ROOT, SITE).certificate + ENROLMENT.certificate * 50, ROOT.roots)


def test_a_server_certificate_has_the_addresses_it_was_given_and_no_others() -> None:
    given_addresses = ("fl.example.org", "10.0.0.5", "2001:db8::1")
    assert addresses_of(credentials(ROOT, SERVER, addresses=given_addresses).certificate) == given_addresses
    assert addresses_of(credentials(ROOT, SERVER).certificate) == ()


def test_credentials_are_kept_for_their_owner_alone(tmp_path: Path) -> None:
    mine = credentials(ENROLMENT, SITE, days=2)
    mine.save(tmp_path / "kit" / "credentials")
    folder = tmp_path / "kit" / "credentials"
    assert Credentials.load(folder) == mine
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["certificate.pem", "key.pem", "roots.pem"]


def test_credentials_know_their_times_and_serial() -> None:
    mine, other = credentials(ENROLMENT, SITE, days=2), credentials(ENROLMENT, SITE, days=2)
    assert mine.identity == SITE
    assert mine.begins < datetime.now(UTC) < mine.expires
    assert timedelta(days=2) < mine.expires - mine.begins < timedelta(days=2, hours=1)
    assert mine.serial != other.serial
    assert mine.serial.bit_length() > 100


def test_a_renewed_certificate_leaves_the_key_file_alone(tmp_path: Path) -> None:
    mine = credentials(ENROLMENT, SITE)
    mine.save(tmp_path)
    before = (tmp_path / "key.pem").stat()
    renewed = Credentials(mine.key, ENROLMENT.issue(SITE, request(mine.key), days=2), mine.roots)
    renewed.save(tmp_path)
    assert Credentials.load(tmp_path) == renewed
    assert (tmp_path / "key.pem").stat().st_ino == before.st_ino


def test_credentials_that_do_not_fit_are_named(tmp_path: Path) -> None:
    credentials(ROOT, SITE).save(tmp_path)
    (tmp_path / "key.pem").write_bytes(new_key())
    with pytest.raises(IdentityError, match="the certificate is for another key") as caught:
        Credentials.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "roots.pem").unlink()
    with pytest.raises(IdentityError, match=r"roots\.pem cannot be read: No such file"):
        Credentials.load(tmp_path)


def test_a_key_of_another_kind_is_refused() -> None:
    key = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(IdentityError, match="no key of Hanse's"):
        private_key(key)
    with pytest.raises(IdentityError, match="no private key"):
        private_key(b"north")


async def test_grpc_accepts_the_chains_and_shows_the_identity() -> None:
    """Over a real socket: the server's certificate from the root, the site's from the enrolment authority, and the other way round."""
    seen: list[Identity] = []

    async def who(data: bytes, context: grpc.aio.ServicerContext) -> bytes:  # type: ignore[type-arg]
        seen.append(identity_of(context.auth_context()["x509_pem_cert"][0]))
        return data

    for of_server, of_site in ((ROOT, ENROLMENT), (ENROLMENT, ROOT)):
        mine = credentials(of_server, SERVER, addresses=("127.0.0.1",))
        site = credentials(of_site, SITE)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t", {"Who": grpc.unary_unary_rpc_method_handler(who)})])
        port = server.add_secure_port(
            "127.0.0.1:0", grpc.ssl_server_credentials([(mine.key, mine.certificate)], mine.roots, require_client_auth=True)
        )
        await server.start()
        async with grpc.aio.secure_channel(
            f"127.0.0.1:{port}", grpc.ssl_channel_credentials(site.roots, site.key, site.certificate)
        ) as channel:
            assert await channel.unary_unary("/t/Who")(b"x", wait_for_ready=True, timeout=20) == b"x"
        await server.stop(None)
    assert seen == [SITE, SITE]
