"""The arguments of the calls that people and sites make, as `wire.arguments_of` checks them."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hanse.messages.wire import Blob, Name


class _Arguments(msgspec.Struct, forbid_unknown_fields=True):
    pass


class Nothing(_Arguments):
    pass


class Submission(_Arguments):
    """manifest, signature: in base64. archive: of the blob that was uploaded, the digest in hexadecimal digits, and the size in bytes."""

    manifest: str
    signature: str
    archive: tuple[Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")], Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]]

    @property
    def blob(self) -> Blob:
        return Blob(bytes.fromhex(self.archive[0]), self.archive[1])


class OfJob(_Arguments):
    job: str


class Logs(_Arguments):
    job: str
    follow: bool = False


class OfSite(_Arguments):
    site: str


class Named(_Arguments):
    name: Name


class ForToken(_Arguments):
    site: Name
    organisation: Name
    hours: Annotated[float, msgspec.Meta(gt=0, le=24 * 90)] = 24.0


class Signing(_Arguments):
    """csr: a certificate signing request, PEM."""

    csr: Annotated[str, msgspec.Meta(max_length=20_000)]
