"""What issues certificates: a federation's root, kept offline, and the intermediate authority at its server that serves enrolment.

The intermediate's certificate allows it to issue for connections only. Who signs jobs is therefore for the root alone to say, and a server
that was broken into cannot make a signer that a site would believe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_public_key
from cryptography.x509.oid import NameOID

from hanse.errors import IdentityError
from hanse.identity.certificates import (
    CERTIFICATE,
    CONNECTING,
    KEY,
    ROOTS,
    SERVING,
    SIGNING,
    Identity,
    Role,
    certificates_in,
    check_pair,
    general_name,
    load_pem,
    private_key,
    save_pem,
)

_CLOCKS = timedelta(minutes=10)
"""Certificates begin so long ago: the clocks of two organisations differ."""


def new_key() -> bytes:
    """A new P-256 key for connections, as PEM."""
    return _private_pem(ec.generate_private_key(ec.SECP256R1()))


def new_signing_key() -> bytes:
    """A new Ed25519 key for signatures, as PEM."""
    return _private_pem(ed25519.Ed25519PrivateKey.generate())


def public_key(key: bytes) -> bytes:
    """The public half of a private key, both as PEM."""
    return private_key(key).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def request(key: bytes) -> bytes:
    """A certificate signing request for the key, as PEM. It names nobody: what the certificate says is the authority's to decide."""
    loaded = private_key(key)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(loaded, _digest(loaded)).public_bytes(Encoding.PEM)


@dataclass(frozen=True, slots=True)
class Authority:
    """Something that may sign certificates. key: PEM. certificate: its own, and for an intermediate those between it and the root.
    roots: what the participants are to believe."""

    key: bytes
    certificate: bytes
    roots: bytes

    @classmethod
    def new_root(cls, federation: str, *, days: float = 3650) -> Authority:
        """The authority of a new federation."""
        key = new_key()
        name = _name("root", federation)
        extensions = _authority_extensions(below=1, purposes=None)
        pem = _sign(key, name, private_key(key).public_key(), name, extensions, days=days, until=None)
        return cls(key, pem, pem)

    def intermediate(self, name: str, days: float) -> Authority:
        """An authority below this one that may issue for connections, and neither signers nor further authorities."""
        own, key = self._own, new_key()
        organisation = str(own.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)
        extensions = _authority_extensions(below=0, purposes=x509.ExtendedKeyUsage([CONNECTING, SERVING]))
        public, subject = private_key(key).public_key(), _name(name, organisation)
        pem = _sign(self.key, own.subject, public, subject, extensions, days=days, until=own.not_valid_after_utc)
        return Authority(key, pem + self._chain, self.roots)

    def issue(self, identity: Identity, key: bytes, *, days: float, addresses: Sequence[str] = ()) -> bytes:
        """A certificate for a public key or a signing request (PEM), followed by those up to but without the root: a PEM text.

        A P-256 key gets one for connections, an Ed25519 key one for signing jobs. addresses: the host names and IP addresses of a server.
        It ends after `days`, or with the authority's own.
        Raises: IdentityError if the key is malformed or of another kind, or if this authority may not issue the like.
        """
        own, public = self._own, _requested(key)
        if own.not_valid_after_utc <= datetime.now(UTC):
            raise IdentityError(
                f"the authority's own certificate ended at {own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC.",
                hint="Make the server's kit anew where the root key is kept: see the operations page.",
            )
        if isinstance(public, ed25519.Ed25519PublicKey):
            purposes = [SIGNING]
        else:
            purposes = [SERVING, CONNECTING] if identity.role is Role.SERVER else [CONNECTING]
        allowed = _purposes(own)
        if allowed is not None and not set(purposes) <= set(allowed):
            raise IdentityError(
                f"this authority issues no certificates for signing, and {identity} asks for one.",
                hint="Signers are made by `hanse provision`.",
            )
        names = [x509.UniformResourceIdentifier(identity.uri), *map(general_name, addresses)]
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_key_usage(signs_certificates=False), True),
            (x509.ExtendedKeyUsage(purposes), False),
            (x509.SubjectAlternativeName(names), False),
        ]
        subject = _name(identity.name, identity.organisation)
        pem = _sign(self.key, own.subject, public, subject, extensions, days=days, until=own.not_valid_after_utc)
        return pem + self._chain

    def save(self, folder: Path) -> None:
        """Write key.pem (for the owner's eyes only), certificate.pem and roots.pem, each whole or not at all."""
        save_pem(folder, {KEY: self.key, ROOTS: self.roots, CERTIFICATE: self.certificate}, private=KEY)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """What `save` wrote. Raises IdentityError that names the file."""
        authority = cls(*load_pem(folder, KEY, CERTIFICATE, ROOTS))
        check_pair(authority.key, authority.certificate, folder)
        return authority

    @property
    def _own(self) -> x509.Certificate:
        return certificates_in(self.certificate)[0]

    @property
    def _chain(self) -> bytes:
        return b"" if self._own in certificates_in(self.roots) else self.certificate


def _private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _digest(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> hashes.SHA256 | None:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def _name(name: str, organisation: str) -> x509.Name:
    """A common name is for people to read and ends after 64 bytes; the URI has the whole name."""
    short = name.encode()[:64].decode(errors="ignore")
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, short), x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)])
    except ValueError as error:
        raise IdentityError(f"{name!r} of {organisation!r} cannot be in a certificate: {error}") from error


def _requested(pem: bytes) -> ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey:
    """The public key of a key or a signing request. Raises IdentityError if a request is not signed by its own key."""
    try:
        if b"CERTIFICATE REQUEST" in pem:
            asked = x509.load_pem_x509_csr(pem)
            if not asked.is_signature_valid:
                raise IdentityError("the certificate signing request is not signed by its own key")
            key: object = asked.public_key()
        else:
            key = load_pem_public_key(pem)
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise IdentityError(f"this is neither a public key nor a certificate signing request in PEM: {error}") from error
    if isinstance(key, ed25519.Ed25519PublicKey) or (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        return key
    raise IdentityError(f"a certificate for a {type(key).__name__} is not issued: P-256 serves for connections, Ed25519 for signatures")


def _purposes(certificate: x509.Certificate) -> list[x509.ObjectIdentifier] | None:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return None


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_extensions(*, below: int, purposes: x509.ExtendedKeyUsage | None) -> list[tuple[x509.ExtensionType, bool]]:
    constraints: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=True, path_length=below), True),
        (_key_usage(signs_certificates=True), True),
    ]
    return constraints if purposes is None else [*constraints, (purposes, False)]


def _sign(
    key: bytes,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
    subject: x509.Name,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
    *,
    days: float,
    until: datetime | None,
) -> bytes:
    """A certificate as PEM, signed with the issuer's key. It ends after `days` and not after `until`."""
    loaded = private_key(key)
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(end if until is None else min(end, until))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(loaded.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(loaded, _digest(loaded)).public_bytes(Encoding.PEM)
