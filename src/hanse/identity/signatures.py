"""Signatures of people on what they submit: Ed25519, with the signer's certificate in the signature itself.

Only a certificate made for signing counts, and the authority at the server cannot make one: a site that verifies a signature need not
trust the server that brought it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import blake3
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519

from hanse.errors import IdentityError
from hanse.identity.certificates import (
    SIGNING,
    Identity,
    certificates_in,
    check_chain,
    check_pair,
    der_of,
    identity_of,
    load_pem,
    pem_of,
    private_key,
    save_pem,
)

SIGNING_KEY = "signing_key.pem"
SIGNING_CERTIFICATE = "signing_certificate.pem"
LARGEST_BYTES = 64 << 10
_CONTEXT = b"hanse signature 1\0"


class _Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
    chain: Annotated[list[bytes], msgspec.Meta(min_length=1, max_length=5)]


@dataclass(frozen=True, slots=True)
class Signer:
    """Somebody who signs. key: Ed25519, PEM. certificate: theirs, followed by those of the authorities between it and a root, PEM."""

    key: bytes
    certificate: bytes

    @property
    def identity(self) -> Identity:
        return identity_of(self.certificate)

    def sign(self, data: bytes) -> bytes:
        """A signature on the data, which holds the certificates too: opaque bytes, at most 64 KiB, for `verify`."""
        key = private_key(self.key)
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise IdentityError("the signing key is not an Ed25519 key.", hint="Signers are made by `hanse provision`.")
        chain = der_of(self.certificate)
        return msgspec.msgpack.encode(_Signature(key.sign(_signed(chain, data)), chain))

    def save(self, folder: Path) -> None:
        """Write signing_key.pem (for the owner's eyes only) and signing_certificate.pem, each whole or not at all."""
        save_pem(folder, {SIGNING_KEY: self.key, SIGNING_CERTIFICATE: self.certificate}, private=SIGNING_KEY)

    @classmethod
    def load(cls, folder: Path) -> Signer:
        """What `save` wrote. Raises IdentityError that names the file."""
        signer = cls(*load_pem(folder, SIGNING_KEY, SIGNING_CERTIFICATE))
        check_pair(signer.key, signer.certificate, folder)
        return signer


def verify(data: bytes, signature: bytes, roots: bytes, *, now: datetime | None = None) -> Identity:
    """Who signed the data.

    roots: PEM, the authorities that are believed. now: aware, default the present; the certificate has to be valid then.
    Raises: IdentityError if data or signature were altered, or the signer is of another authority, expired, or may not sign.
    """
    if len(signature) > LARGEST_BYTES:
        raise IdentityError(f"a signature of {len(signature)} bytes: {LARGEST_BYTES} are the most")
    try:
        read = msgspec.msgpack.decode(signature, type=_Signature)
    except (msgspec.MsgspecError, ValueError) as error:
        raise IdentityError(f"this is no signature: {error}") from error
    if msgspec.msgpack.encode(read) != signature:
        raise IdentityError("this is no signature as Hanse writes them: the same content has only one form")
    chain = pem_of(read.chain)
    signer = check_chain(chain, roots, purpose=SIGNING, now=now)
    key = certificates_in(chain)[0].public_key()
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise IdentityError(f"the certificate of {signer} is not for an Ed25519 key")
    try:
        key.verify(read.signature, _signed(read.chain, data))
    except InvalidSignature as error:
        raise IdentityError(f"the signature of {signer} does not fit: what it signs, or it itself, was altered.") from error
    return signer


def _signed(chain: list[bytes], data: bytes) -> bytes:
    """What the key signs: the certificates too, so that they have one spelling."""
    return _CONTEXT + blake3.blake3(msgspec.msgpack.encode(chain)).digest() + data
