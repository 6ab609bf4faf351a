from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import IdentityError
from hanse.identity.authority import Authority, new_key, new_signing_key, public_key, request
from hanse.identity.certificates import Credentials, Identity, Role, addresses_of, check_chain, identity_of

ROOT = Authority.new_root("study")
ENROLMENT = ROOT.intermediate("enrolment", 100)
SITE = Identity("study", Role.SITE, "north", "North Clinic")


def first(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificates(pem)[0]


def test_the_root_signs_itself_and_allows_one_level_of_authorities() -> None:
    root = first(ROOT.certificate)
    root.verify_directly_issued_by(root)
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=1)
    assert ROOT.roots == ROOT.certificate


def test_the_intermediate_comes_with_its_chain_but_without_the_root() -> None:
    assert len(x509.load_pem_x509_certificates(ENROLMENT.certificate)) == 1
    own = first(ENROLMENT.certificate)
    own.verify_directly_issued_by(first(ROOT.certificate))
    assert own.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(ca=True, path_length=0)
    assert ENROLMENT.roots == ROOT.roots


def test_a_certificate_is_issued_for_a_request_as_for_a_key() -> None:
    key = new_key()
    by_key, by_request = (ENROLMENT.issue(SITE, asked, days=1) for asked in (public_key(key), request(key)))
    assert first(by_key).public_key() == first(by_request).public_key()
    assert first(by_key).serial_number != first(by_request).serial_number
    assert check_chain(by_request, ROOT.roots) == SITE


def test_a_request_has_no_say_in_what_the_certificate_says() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("fl.example.org")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    certificate = ENROLMENT.issue(SITE, greedy, days=1)
    assert identity_of(certificate) == SITE
    assert addresses_of(certificate) == ()
    assert not first(certificate).extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_request_signed_by_another_key_is_refused() -> None:
    der = bytearray(x509.load_pem_x509_csr(request(new_key())).public_bytes(Encoding.DER))
    other = x509.load_pem_x509_csr(request(new_key()))
    mine = x509.load_der_x509_csr(bytes(der))
    stolen = bytes(der).replace(
        mine.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
        other.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
    )
    with pytest.raises(IdentityError, match="not signed by its own key"):
        ENROLMENT.issue(SITE, x509.load_der_x509_csr(stolen).public_bytes(Encoding.PEM), days=1)


@pytest.mark.parametrize("text", [b"", b"north", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"])
def test_what_is_no_key_is_refused(text: bytes) -> None:
    with pytest.raises(IdentityError, match="neither a public key nor"):
        ENROLMENT.issue(SITE, text, days=1)


REQUEST = x509.load_pem_x509_csr(request(new_key())).public_bytes(Encoding.DER)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(REQUEST) - 1), st.integers(1, 255))
def test_an_altered_request_gives_no_certificate_for_another_key(place: int, change: int) -> None:
    """Nearly all are refused. What is left are the padding bits after the request's own signature, which say nothing."""
    altered = bytearray(REQUEST)
    altered[place] ^= change
    pem = b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(altered) + b"-----END CERTIFICATE REQUEST-----\n"
    try:
        issued = ENROLMENT.issue(SITE, pem, days=1)
    except IdentityError:
        return
    assert first(issued).public_key() == x509.load_der_x509_csr(REQUEST).public_key()
    assert change < 8


def test_keys_of_other_kinds_get_no_certificate() -> None:
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        with pytest.raises(IdentityError, match="is not issued"):
            ENROLMENT.issue(SITE, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), days=1)


def test_signers_are_made_by_the_root_only() -> None:
    asked = public_key(new_signing_key())
    assert identity_of(ROOT.issue(SITE, asked, days=1)) == SITE
    with pytest.raises(IdentityError, match="no certificates for signing"):
        ENROLMENT.issue(SITE, asked, days=1)


def test_a_certificate_ends_with_its_authority() -> None:
    short = ROOT.intermediate("short", 2)
    end = first(short.issue(SITE, request(new_key()), days=30)).not_valid_after_utc
    assert end == first(short.certificate).not_valid_after_utc
    assert timedelta(days=1) < end - datetime.now(UTC) < timedelta(days=2)


def test_an_authority_that_has_ended_issues_nothing() -> None:
    ended = Authority.new_root("study", days=-0.001)
    with pytest.raises(IdentityError, match="own certificate ended"):
        ended.issue(SITE, request(new_key()), days=1)


@pytest.mark.parametrize(("name", "address"), [("", "localhost"), ("north", "grüße.example"), ("north", "")])
def test_what_a_certificate_cannot_say_is_refused(name: str, address: str) -> None:
    with pytest.raises(IdentityError):
        ROOT.issue(Identity("study", Role.SERVER, name, "Clinic"), request(new_key()), days=1, addresses=[address])


def test_an_authority_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    for name, authority in (("root", ROOT), ("enrolment", ENROLMENT)):
        authority.save(tmp_path / name)
        assert Authority.load(tmp_path / name) == authority
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
        assert (tmp_path / name / "key.pem").stat().st_mode & 0o777 == 0o600


def test_an_authority_that_is_not_whole_is_named(tmp_path: Path) -> None:
    ROOT.save(tmp_path)
    (tmp_path / "key.pem").write_bytes(new_key())
    with pytest.raises(IdentityError, match="for another key"):
        Authority.load(tmp_path)
    (tmp_path / "key.pem").unlink()
    with pytest.raises(IdentityError, match=r"key\.pem cannot be read"):
        Authority.load(tmp_path)


def test_a_loaded_authority_goes_on_issuing(tmp_path: Path) -> None:
    ENROLMENT.save(tmp_path)
    key = new_key()
    chain = Authority.load(tmp_path).issue(SITE, request(key), days=1)
    assert check_chain(Credentials(key, chain, ROOT.roots).certificate, ROOT.roots) == SITE
