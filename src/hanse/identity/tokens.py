"""Join tokens: one line of text that a project admin hands to a site, good for one enrolment.

A token brings what a site needs for its first connection: the server's address, the roots to believe, and a key with a short-lived
certificate of the role JOINING. The site's own key is made at the site and never travels.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

import blake3
import msgspec

from hanse.errors import IdentityError
from hanse.identity.authority import Authority, new_key, public_key
from hanse.identity.certificates import Credentials, Identity, Role, check_chain, check_pair, der_of, pem_of

PREFIX = "hanse-join-1."
_LARGEST = 64 << 10
_CHECK_BYTES = 8
_NEW = "Copy the whole line again, or ask the project admin for a new token."


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    address: str
    key: bytes
    chain: list[bytes]
    roots: list[bytes]


@dataclass(frozen=True, slots=True)
class Token:
    """What a join token says: where the server is (host:port), which site of which organisation may join, and what to connect with."""

    address: str
    site: str
    organisation: str
    credentials: Credentials


def new_token(authority: Authority, *, site: str, organisation: str, federation: str, address: str, hours: float) -> str:
    """A token with which the site may enrol at the server at `address` (host:port) within so many hours. It is a secret."""
    key = new_key()
    identity = Identity(federation, Role.JOINING, site, organisation)
    chain = authority.issue(identity, public_key(key), days=hours / 24)
    content = msgspec.msgpack.encode(_Content(address, key, der_of(chain), der_of(authority.roots)))
    return PREFIX + base64.urlsafe_b64encode(content + _check(content)).decode().rstrip("=")


def read_token(text: str) -> Token:
    """What the token says. Raises IdentityError if it is not a whole token, was altered, or has expired."""
    text = text.strip()
    if not text.startswith(PREFIX):
        raise IdentityError(f"this is no join token: one begins with {PREFIX!r}.", hint=_NEW)
    if len(text) > _LARGEST:
        raise IdentityError(f"a join token of {len(text)} characters: {_LARGEST} are the most.", hint=_NEW)
    try:
        body = text.removeprefix(PREFIX)
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars="-_", validate=True)
        content, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
        if check != _check(content) or base64.urlsafe_b64encode(data).decode().rstrip("=") != body:
            raise ValueError("its checksum does not fit")
        read = msgspec.msgpack.decode(content, type=_Content)
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise IdentityError(f"the join token was cut off or altered: {error}.", hint=_NEW) from error
    try:
        credentials = Credentials(read.key, pem_of(read.chain), pem_of(read.roots))
        identity = check_chain(credentials.certificate, credentials.roots)
        check_pair(credentials.key, credentials.certificate, "its key")
    except IdentityError as error:
        raise IdentityError(f"the join token cannot be used: {error.message}", hint="Ask the project admin for a new token.") from error
    if identity.role is not Role.JOINING:
        raise IdentityError(f"the join token is for {identity}, and only a joining site uses one.", hint=_NEW)
    return Token(read.address, identity.name, identity.organisation, credentials)


def _check(content: bytes) -> bytes:
    """Catches what copying by hand does to a line. It is no signature: a token is believed because of who handed it over."""
    return blake3.blake3(content).digest(_CHECK_BYTES)
