"""Signed webhooks: a JSON body by POST, with who sent it, an id and a time, so that a receiver can tell forged and repeated ones.

The headers and the signed text are those of the Standard Webhooks specification, whose libraries verify the kind with a shared secret. The
default is a person's signature, for which nothing has to be shared.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import http.client
import ipaddress
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hanse.errors import ConfigError, IdentityError, LinkBroken, Refused
from hanse.identity.certificates import Identity
from hanse.identity.signatures import Signer, verify

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
BY_SIGNER, BY_SECRET = "hanse1", "v1"
WITHIN_S = 300.0
LARGEST_BYTES = 1 << 20
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
_SHORTEST_SECRET = 16  # bytes
_CONTEXT = b"hanse webhook 1\0"  # so that the signature fits nothing else that people sign


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """Where to post, and with whose signature: `signer` or `secret`, one of the two.

    within_s: for each try. tries: in all. backoff_s: the wait before the second try, doubled before each after it.
    plain_http: allow http:// to another machine, where everybody on the way reads along; to this machine it always is.
    Raises ConfigError if that does not fit.
    """

    url: str
    signer: Signer | None = field(default=None, repr=False)
    secret: bytes = field(default=b"", repr=False)
    within_s: float = 10.0
    tries: int = 4
    backoff_s: float = 1.0
    plain_http: bool = False
    wait: Callable[[float], object] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname or "", parts.port
        except ValueError as error:
            raise ConfigError(f"{self.url!r} is no address for a webhook: {error}") from error
        if parts.scheme not in ("https", "http") or not host or parts.username is not None or not self.url.isprintable() or " " in self.url:
            raise ConfigError(f"{self.url!r} is no address for a webhook: it must be https://host[:port]/path, without a user in it")
        if parts.scheme == "http" and not (self.plain_http or _loopback(host)):
            raise ConfigError(
                f"{self.url} is not encrypted.", hint="Use https://, or ask for plain http if the way there is safe by itself."
            )
        if (self.signer is None) == (not self.secret):
            raise ConfigError("a webhook is signed: by the signer of a kit, or with a shared secret; give one of the two")

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def post(self, body: bytes, *, id: str) -> int:
        """Post the body, again if need be, and return the status. Each try has the same id and its own time.

        Raises: Refused if the receiver does not want it (redirections are not followed); LinkBroken if no try got through.
        """
        problem = ""
        for attempt in range(self.tries):
            if attempt:
                self.wait(self.backoff_s * 2 ** (attempt - 1))
            try:
                return self._once(body, id)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _LATER:
                    raise Refused(
                        f"{self.host} refused webhook {id} with status {error.code}.", hint="Look there for the reason."
                    ) from error
                problem = f"status {error.code}"
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise LinkBroken(
            f"webhook {id} did not reach {self.host} in {self.tries} tries: {problem}.", hint="It is kept and tried again later."
        )

    def _once(self, body: bytes, id: str) -> int:
        headers = {"Content-Type": "application/json", "User-Agent": "hanse", **sign(body, id=id, signer=self.signer, secret=self.secret)}
        request = urllib.request.Request(self.url, body, headers, method="POST")
        handlers: list[Any] = [_NoRedirect()]
        if _loopback(urlsplit(self.url).hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))
        with urllib.request.build_opener(*handlers).open(request, timeout=self.within_s) as answer:
            return int(answer.status)


def sign(body: bytes, *, id: str, signer: Signer | None = None, secret: bytes = b"", now: float | None = None) -> dict[str, str]:
    """The three headers for the body. now: Unix time; default the present."""
    stamp = str(int(time.time() if now is None else now))
    data = _signed(id, stamp, body)
    kind, signature = (BY_SIGNER, signer.sign(_CONTEXT + data)) if signer else (BY_SECRET, _mac(secret, data))
    return {ID: id, TIMESTAMP: stamp, SIGNATURE: f"{kind},{base64.b64encode(signature).decode()}"}


def verify_webhook(
    headers: Mapping[str, str],
    body: bytes,
    roots: bytes = b"",
    *,
    secret: bytes = b"",
    seen: MutableMapping[str, float] | None = None,
    within_s: float = WITHIN_S,
    now: float | None = None,
) -> Identity | None:
    """Who signed the webhook; None where it was signed with the shared secret. For receivers.

    headers: of the request, in any case. body: its bytes as they came. roots: PEM, the authorities that are believed; empty: the secret.
    seen: ids that came before, by the time they did. It is kept up to date here; keep it as long as the process, or longer, and a repeated
        webhook is refused. A sender that got no answer repeats one with good intent: answer 200 to what you have already.
    within_s: how far its time may be from the present. now: Unix time; default the present.
    Raises: IdentityError if anything is wrong with it.
    """
    present = time.time() if now is None else now
    given = {name.lower(): value for name, value in headers.items()}
    if missing := [name for name in (ID, TIMESTAMP, SIGNATURE) if not given.get(name)]:
        raise IdentityError(f"this is no signed webhook: it has no header {missing[0]}")
    if len(body) > LARGEST_BYTES:
        raise IdentityError(f"a webhook of {len(body):,} bytes: {LARGEST_BYTES:,} are the most")
    id, stamp = given[ID], given[TIMESTAMP]
    if "." in id or not (stamp.isascii() and stamp.isdigit() and len(stamp) < 16):
        raise IdentityError(f"this is no signed webhook: {ID} or {TIMESTAMP} is malformed")
    sender = _sender(given[SIGNATURE], _signed(id, stamp, body), roots, secret)
    if abs(present - int(stamp)) > within_s:
        raise IdentityError(
            f"webhook {id} was signed {abs(present - int(stamp)):.0f} s from now, more than {within_s:g}: it is old, or a clock is wrong"
        )
    if seen is not None:
        for old in [each for each, when in seen.items() if when < present - 2 * within_s]:
            del seen[old]
        if id in seen:
            raise IdentityError(f"webhook {id} came before")
        seen[id] = present
    return sender


def read_secret(path: Path) -> bytes:
    """The shared secret in a file: `whsec_` and base64, or any text of at least 16 bytes. Raises ConfigError."""
    try:
        text = path.read_text().strip()
        secret = base64.b64decode(text[6:], validate=True) if text.startswith("whsec_") else text.encode()
    except (OSError, UnicodeDecodeError, binascii.Error) as error:
        raise ConfigError(f"{path} holds no secret for webhooks: {error}") from error
    if len(secret) < _SHORTEST_SECRET:
        raise ConfigError(f"the secret in {path} has {len(secret)} bytes: {_SHORTEST_SECRET} are the fewest")
    return secret


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _sender(header: str, data: bytes, roots: bytes, secret: bytes) -> Identity | None:
    """Of the signatures in the header, with spaces between, the first of a kind that can be checked here decides."""
    for each in header.split(" "):
        kind, _, text = each.partition(",")
        try:
            signature = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise IdentityError(f"this is no signed webhook: its signature is not base64: {error}") from error
        if kind == BY_SIGNER and roots:
            return verify(_CONTEXT + data, signature, roots)
        if kind == BY_SECRET and secret:
            if not hmac.compare_digest(signature, _mac(secret, data)):
                raise IdentityError("the webhook's signature does not fit: it was altered, or signed with another secret")
            return None
    raise IdentityError(
        "the webhook is signed in a way that cannot be checked here", hint="Give the roots of its signer, or the shared secret."
    )


def _signed(id: str, stamp: str, body: bytes) -> bytes:
    return f"{id}.{stamp}.".encode() + body


def _mac(secret: bytes, data: bytes) -> bytes:
    return hmac.new(secret, data, hashlib.sha256).digest()


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
