"""What a certificate says, and whether to believe it. A participant is named by a URI in its certificate: hanse://FEDERATION/ROLE/NAME."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote, unquote

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from hanse.errors import IdentityError

KEY = "key.pem"
CERTIFICATE = "certificate.pem"
ROOTS = "roots.pem"
CONNECTING = ExtendedKeyUsageOID.CLIENT_AUTH
SERVING = ExtendedKeyUsageOID.SERVER_AUTH
SIGNING = ExtendedKeyUsageOID.CODE_SIGNING
_DEPTH = 4
_OF_ANOTHER = "Ask the federation's project admin for a kit or a token of this federation."


class Role(StrEnum):
    """What a participant may do. JOINING: a site that holds a token and no certificate of its own yet."""

    SERVER = "server"
    SITE = "site"
    PROJECT_ADMIN = "project-admin"
    ORG_ADMIN = "org-admin"
    RESEARCHER = "researcher"
    AUDITOR = "auditor"
    JOINING = "joining"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate is for."""

    federation: str
    role: Role
    name: str
    organisation: str

    @property
    def uri(self) -> str:
        return "hanse://" + "/".join(quote(part, safe="") for part in (self.federation, self.role, self.name))

    def __str__(self) -> str:
        return f"{self.role} {self.name!r} of {self.organisation!r}"


def certificates_in(pem: bytes) -> list[x509.Certificate]:
    """The certificates of a PEM text, at least one. Raises IdentityError."""
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise IdentityError(f"this is no certificate in PEM: {error}") from error
    for certificate in certificates:
        _read_in_full(certificate)
    return certificates


def _read_in_full(certificate: x509.Certificate) -> None:
    """Raises IdentityError if a part is malformed. The library reads parts when they are asked for; after this, none of them fails."""
    try:
        for part in ("subject", "issuer", "extensions", "serial_number", "not_valid_before_utc", "not_valid_after_utc"):
            getattr(certificate, part)
        certificate.public_key()
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm) as error:
        raise IdentityError(f"this is no certificate that Hanse reads: {error}") from error


def identity_of(certificate: bytes) -> Identity:
    """Who the first certificate in this PEM text is for. It believes what it reads: checking the chain is TLS's work, or `check_chain`'s.

    Raises: IdentityError if it is no certificate, or one that names no participant of a federation.
    """
    return _identity(certificates_in(certificate)[0])


def addresses_of(certificate: bytes) -> tuple[str, ...]:
    """The host names and IP addresses that the first certificate in this PEM text is good for, in its order."""
    names = _alternative_names(certificates_in(certificate)[0])
    return tuple(str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress))


def check_chain(certificate: bytes, roots: bytes, *, purpose: ObjectIdentifier = CONNECTING, now: datetime | None = None) -> Identity:
    """Whom the first certificate is for, after checking that the ones after it lead to one of `roots`.

    Every certificate on the way has to be valid at `now` (aware, default the present), be allowed to issue, and be good for `purpose`:
    CONNECTING, SERVING or SIGNING. An authority that lists purposes cannot hand on others.
    Raises: IdentityError.
    """
    leaf, *between = certificates_in(certificate)
    now = now or datetime.now(UTC)
    identity = _identity(leaf)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise IdentityError(
            f"the certificate of {identity} is valid from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} to"
            f" {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC.",
            hint="If the clock is right, a new certificate or token is needed.",
        )
    if len(between) > _DEPTH:
        raise IdentityError(f"the certificate of {identity} comes with {len(between)} others; {_DEPTH} are the most")
    try:
        builder = verification.PolicyBuilder().store(verification.Store(certificates_in(roots))).time(now)
        builder = builder.extension_policies(ca_policy=_authority_policy(purpose), ee_policy=_participant_policy(purpose))
        builder.build_client_verifier().verify(leaf, between)
    except (verification.VerificationError, ValueError) as error:
        raise IdentityError(
            f"the certificate of {identity} does not lead to this federation's authority: {error}.", hint=_OF_ANOTHER
        ) from error
    return identity


def _authority_policy(purpose: ObjectIdentifier) -> verification.ExtensionPolicy:
    def check(_: verification.Policy, __: x509.Certificate, usage: x509.ExtendedKeyUsage | None) -> None:
        if usage is not None and purpose not in usage:
            raise ValueError(f"an authority on the way may not issue for {purpose._name}")

    policy = verification.ExtensionPolicy.webpki_defaults_ca()
    return policy.may_be_present(x509.ExtendedKeyUsage, verification.Criticality.AGNOSTIC, check)


def _participant_policy(purpose: ObjectIdentifier) -> verification.ExtensionPolicy:
    def check(_: verification.Policy, __: x509.Certificate, usage: x509.ExtendedKeyUsage) -> None:
        if purpose not in usage:
            raise ValueError(f"it is not for {purpose._name}")

    policy = verification.ExtensionPolicy.webpki_defaults_ee()
    return policy.require_present(x509.ExtendedKeyUsage, verification.Criticality.AGNOSTIC, check)


def _alternative_names(certificate: x509.Certificate) -> Sequence[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound as error:
        raise IdentityError(f"the certificate names no participant of a federation: {error}.", hint=_OF_ANOTHER) from error


def _identity(certificate: x509.Certificate) -> Identity:
    uris = [name.value for name in _alternative_names(certificate) if isinstance(name, x509.UniformResourceIdentifier)]
    organisations = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    try:
        (uri,), (organisation,) = uris, organisations
        scheme, nothing, federation, role, name = uri.split("/")
        identity = Identity(unquote(federation), Role(role), unquote(name), str(organisation.value))
        if scheme != "hanse:" or nothing or identity.uri != uri or not (federation and name):
            raise ValueError(f"{uri} is not hanse://FEDERATION/ROLE/NAME")
    except ValueError as error:
        raise IdentityError(f"the certificate names no participant of a federation: {error}.", hint=_OF_ANOTHER) from error
    return identity


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a participant proves itself with, in PEM: its key, its certificate followed by those of the authorities between it and a root,
    and the roots that it believes itself."""

    key: bytes
    certificate: bytes
    roots: bytes

    @property
    def identity(self) -> Identity:
        return identity_of(self.certificate)

    @property
    def serial(self) -> int:
        return certificates_in(self.certificate)[0].serial_number

    @property
    def begins(self) -> datetime:
        return certificates_in(self.certificate)[0].not_valid_before_utc

    @property
    def expires(self) -> datetime:
        return certificates_in(self.certificate)[0].not_valid_after_utc

    @property
    def renew_at(self) -> datetime:
        """When two thirds of the lifetime are over: the time to renew."""
        return self.begins + (self.expires - self.begins) * 2 / 3

    def save(self, folder: Path) -> None:
        """Write key.pem (for the owner's eyes only), certificate.pem and roots.pem, each whole or not at all. A file that has not changed
        is left alone: a certificate renewed for the same key is one rename."""
        save_pem(folder, {KEY: self.key, ROOTS: self.roots, CERTIFICATE: self.certificate}, private=KEY)

    @classmethod
    def load(cls, folder: Path) -> Credentials:
        """What `save` wrote. Raises IdentityError that names the file that is missing, malformed or belongs to another key."""
        credentials = cls(*load_pem(folder, KEY, CERTIFICATE, ROOTS))
        check_pair(credentials.key, credentials.certificate, folder)
        return credentials


def private_key(pem: bytes) -> ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey:
    """The key in a PEM text: P-256 for connections, Ed25519 for signatures. Raises IdentityError for anything else."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise IdentityError(f"this is no private key in PEM without a password: {error}") from error
    if isinstance(key, ed25519.Ed25519PrivateKey) or (isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)):
        return key
    raise IdentityError(f"a {type(key).__name__} is no key of Hanse's: P-256 serves for connections, Ed25519 for signatures")


def check_pair(key: bytes, certificate: bytes, where: object) -> None:
    """Raises IdentityError, naming where they are from, if the certificate is not for this key or either is malformed."""
    try:
        fits = private_key(key).public_key() == certificates_in(certificate)[0].public_key()
    except IdentityError as error:
        raise IdentityError(f"{where}: {error.message}", hint=error.hint) from error
    if not fits:
        raise IdentityError(f"{where}: the certificate is for another key.", hint="Take both from the same kit, or join again.")


def save_pem(folder: Path, files: dict[str, bytes], *, private: str) -> None:
    """Write files into the folder (mode 0700), each atomically; the one called `private` gets mode 0600."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name, data in files.items():
        path = folder / name
        if path.exists() and path.read_bytes() == data:
            continue
        handle, unfinished = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        with open(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o600 if name == private else 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


def load_pem(folder: Path, *names: str) -> list[bytes]:
    """The files' contents. Raises IdentityError that names a file that cannot be read."""
    try:
        return [(folder / name).read_bytes() for name in names]
    except OSError as error:
        raise IdentityError(
            f"{error.filename} cannot be read: {error.strerror}.",
            hint="A kit's credentials are made by `hanse provision` or `hanse site join`.",
        ) from error


def general_name(address: str) -> x509.GeneralName:
    """A host name or an IP address, as certificates write it. Raises IdentityError if it is neither."""
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        pass
    try:
        if not address:
            raise ValueError("it is empty")
        return x509.DNSName(address)
    except ValueError as error:
        raise IdentityError(f"{address!r} is neither an IP address nor a host name: {error}") from error


def der_of(pem: bytes) -> list[bytes]:
    """The certificates of a PEM text as DER."""
    return [certificate.public_bytes(Encoding.DER) for certificate in certificates_in(pem)]


def pem_of(der: Sequence[bytes]) -> bytes:
    """The certificates as one PEM text. Raises IdentityError."""
    try:
        return b"".join(x509.load_der_x509_certificate(one).public_bytes(Encoding.PEM) for one in der)
    except (ValueError, x509.InvalidVersion) as error:
        raise IdentityError(f"this is no certificate: {error}") from error
