from __future__ import annotations

import base64

import blake3
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.errors import IdentityError
from hanse.identity.authority import Authority, new_key, public_key
from hanse.identity.certificates import Identity, Role, der_of
from hanse.identity.tokens import PREFIX, _Content, new_token, read_token

ROOT = Authority.new_root("study")
ENROLMENT = ROOT.intermediate("enrolment", 100)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def token(*, hours: float = 1, authority: Authority = ENROLMENT) -> str:
    return new_token(authority, site="north", organisation="North Clinic", federation="study", address="fl.example.org:8443", hours=hours)


TOKEN = token()


@pytest.mark.parametrize("authority", [ROOT, ENROLMENT])
def test_a_token_brings_what_the_first_connection_needs(authority: Authority) -> None:
    text = token(authority=authority)
    assert text.startswith(PREFIX)
    assert text.isprintable()
    assert " " not in text
    read = read_token(f"  {text}\n")
    assert (read.address, read.site, read.organisation) == ("fl.example.org:8443", "north", "North Clinic")
    assert read.credentials.identity == Identity("study", Role.JOINING, "north", "North Clinic")
    assert read.credentials.roots == ROOT.roots


def test_each_token_is_another() -> None:
    assert read_token(token()).credentials.serial != read_token(token()).credentials.serial


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(TOKEN) - 1), st.sampled_from(ALPHABET + ".= \né"))
def test_an_altered_character_is_noticed(place: int, character: str) -> None:
    altered = TOKEN[:place] + character + TOKEN[place + 1 :]
    if altered.strip() != TOKEN:
        with pytest.raises(IdentityError):
            read_token(altered)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(TOKEN) - 1))
def test_a_token_cut_off_is_noticed(length: int) -> None:
    with pytest.raises(IdentityError):
        read_token(TOKEN[:length])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_no_token(noise: bytes) -> None:
    """With a checksum that fits, too: that is made by anybody."""
    for data in (noise, noise + blake3.blake3(noise).digest(8)):
        with pytest.raises(IdentityError, match="join token"):
            read_token(PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("="))


def test_another_text_is_told_what_a_token_looks_like() -> None:
    for text in ("", "north", "hanse-join-2.AAAA"):
        with pytest.raises(IdentityError, match=r"one begins with 'hanse-join-1\.'"):
            read_token(text)


def test_an_endless_token_is_refused_unread() -> None:
    with pytest.raises(IdentityError, match="are the most"):
        read_token(PREFIX + "A" * 70_000)


def test_an_expired_token_says_so() -> None:
    with pytest.raises(IdentityError, match=r"cannot be used: .*valid from.*Ask the project admin for a new token"):
        read_token(token(hours=-0.01))


def written(key: bytes, chain: bytes, roots: bytes) -> str:
    content = msgspec.msgpack.encode(_Content("fl.example.org:8443", key, der_of(chain), der_of(roots)))
    return PREFIX + base64.urlsafe_b64encode(content + blake3.blake3(content).digest(8)).decode().rstrip("=")


def test_a_token_whose_parts_do_not_fit_is_refused() -> None:
    key = new_key()
    joining = ENROLMENT.issue(Identity("study", Role.JOINING, "north", "North Clinic"), public_key(key), days=1)
    assert read_token(written(key, joining, ROOT.roots)).site == "north"
    with pytest.raises(IdentityError, match="another key"):
        read_token(written(new_key(), joining, ROOT.roots))
    with pytest.raises(IdentityError, match="does not lead"):
        read_token(written(key, joining, Authority.new_root("study").roots))
    site = ENROLMENT.issue(Identity("study", Role.SITE, "north", "North Clinic"), public_key(key), days=1)
    with pytest.raises(IdentityError, match="only a joining site uses one"):
        read_token(written(key, site, ROOT.roots))
