from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import IdentityError
from hanse.identity.authority import Authority, new_key, new_signing_key, public_key
from hanse.identity.certificates import Identity, Role
from hanse.identity.signatures import Signer, verify

ROOT = Authority.new_root("study")
ADA = Identity("study", Role.RESEARCHER, "ada@example.org", "Hospital")
DATA = b"what is to run"


def signer(authority: Authority, *, days: float = 1) -> Signer:
    key = new_signing_key()
    return Signer(key, authority.issue(ADA, public_key(key), days=days))


SIGNER = signer(ROOT)
SIGNATURE = SIGNER.sign(DATA)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=1000))
def test_a_signature_says_who_signed(data: bytes) -> None:
    assert verify(data, SIGNER.sign(data), ROOT.roots) == ADA


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the library, about what the altered certificates say
@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SIGNATURE) - 1), st.integers(1, 255))
def test_an_altered_byte_of_the_signature_is_noticed(place: int, change: int) -> None:
    altered = bytearray(SIGNATURE)
    altered[place] ^= change
    with pytest.raises(IdentityError):
        verify(DATA, bytes(altered), ROOT.roots)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=60), st.data())
def test_an_altered_byte_of_the_data_is_noticed(data: bytes, choose: st.DataObject) -> None:
    signature = SIGNER.sign(data)
    altered = bytearray(data)
    altered[choose.draw(st.integers(0, len(data) - 1))] ^= choose.draw(st.integers(1, 255))
    for other in (bytes(altered), data[:-1], data + b"\0"):
        with pytest.raises(IdentityError, match="altered"):
            verify(other, signature, ROOT.roots)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_no_signature(noise: bytes) -> None:
    with pytest.raises(IdentityError):
        verify(DATA, noise, ROOT.roots)


@pytest.mark.parametrize("cut", [0, 1, 66, 200, -1])
def test_a_signature_cut_off_or_prolonged_is_refused(cut: int) -> None:
    for other in (SIGNATURE[:cut], SIGNATURE + SIGNATURE[:cut] + b"\0"):
        with pytest.raises(IdentityError):
            verify(DATA, other, ROOT.roots)


def test_the_same_content_in_another_form_is_refused() -> None:
    signature, chain = msgspec.msgpack.decode(SIGNATURE)
    wider = b"\xdd\0\0\0\x02" + msgspec.msgpack.encode(signature) + msgspec.msgpack.encode(chain)
    assert msgspec.msgpack.decode(wider) == [signature, chain]
    with pytest.raises(IdentityError, match="only one form"):
        verify(DATA, wider, ROOT.roots)


def test_the_certificates_have_one_spelling() -> None:
    """A certificate's own signature is in whole bytes; that its last bit is padding, nobody signs."""
    signature = next(made for made in (signer(ROOT).sign(DATA) for _ in range(200)) if made[-1] % 2 == 0)
    assert verify(DATA, signature, ROOT.roots) == ADA
    chain = msgspec.msgpack.decode(signature)[1][0]
    padding = signature.index(chain) + chain.rindex(b"\x00\x30")
    with pytest.raises(IdentityError, match="altered"):
        verify(DATA, signature[:padding] + b"\x01" + signature[padding + 1 :], ROOT.roots)


def test_an_endless_signature_is_refused_unread() -> None:
    with pytest.raises(IdentityError, match="65536 are the most"):
        verify(DATA, SIGNATURE + bytes(65536), ROOT.roots)


def test_a_signer_of_another_authority_is_refused() -> None:
    with pytest.raises(IdentityError, match="does not lead to this federation's authority"):
        verify(DATA, signer(Authority.new_root("study")).sign(DATA), ROOT.roots)


def test_a_signature_of_another_with_my_certificate_is_refused() -> None:
    other = Signer(new_signing_key(), SIGNER.certificate)
    with pytest.raises(IdentityError, match="does not fit"):
        verify(DATA, other.sign(DATA), ROOT.roots)


def test_a_signature_counts_while_the_certificate_does() -> None:
    assert verify(DATA, SIGNATURE, ROOT.roots, now=datetime.now(UTC) + timedelta(hours=23)) == ADA
    with pytest.raises(IdentityError, match="is valid from"):
        verify(DATA, SIGNATURE, ROOT.roots, now=datetime.now(UTC) + timedelta(days=2))


def test_a_key_for_connections_signs_nothing() -> None:
    key = new_key()
    certificate = ROOT.issue(ADA, public_key(key), days=1)
    with pytest.raises(IdentityError, match="not an Ed25519 key"):
        Signer(key, certificate).sign(DATA)
    posing = Signer(SIGNER.key, certificate)
    with pytest.raises(IdentityError, match="not for codeSigning"):
        verify(DATA, posing.sign(DATA), ROOT.roots)


def test_a_signer_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    SIGNER.save(tmp_path)
    assert Signer.load(tmp_path) == SIGNER
    assert SIGNER.identity == ADA
    assert (tmp_path / "signing_key.pem").stat().st_mode & 0o777 == 0o600
    (tmp_path / "signing_key.pem").write_bytes(new_signing_key())
    with pytest.raises(IdentityError, match="for another key"):
        Signer.load(tmp_path)
