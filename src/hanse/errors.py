"""Every error Hanse raises, in one tree.

    HanseError
    ├── ConfigError        an argument, a recipe or a job file is wrong; raised before any work starts
    ├── NotInstalled       an optional part is asked for and its package is not there
    ├── WireError          bytes that are not a valid frame; names the offset
    ├── UpdateRejected     an update that cannot be combined; names site, round and tensor
    ├── SiteFailed         training code at a site raised, or ended without an answer
    ├── TooFewUpdates      a round cannot go on; holds every site's reason
    ├── JobFailed          a job ended without doing what it was asked; holds its run folder
    │   └── JobStopped     … because somebody stopped it; says how to go on
    ├── IdentityError      a certificate, signature or token that is not accepted; says why
    ├── Refused            the server or a site does not do what it was asked: the caller may not, or it cannot be done now
    │   └── PolicyRefused  … because of a clause of a site's policy, which it names
    ├── StorageFull        there is no room to keep what was sent; nothing was lost
    └── LinkBroken         the other end of a link is gone

Over the wire an error is a value, `Failure`: a code (the class's name), a sentence and a hint, raised again on the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LISTED = 10
"""So many reasons an error's text lists; its attributes hold all."""


class HanseError(Exception):
    """The root. `hint` says what to do; it is part of the printed message."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class ConfigError(HanseError):
    """An argument, a recipe or a job file is wrong. Raised where it was written, before any work starts."""


class NotInstalled(HanseError):
    """An optional part is asked for and its package is not installed."""


class WireError(HanseError):
    """Bytes that are not a valid frame. `offset` is where in the frame, in bytes, reading had to stop."""

    def __init__(self, message: str, *, offset: int, hint: str = "") -> None:
        super().__init__(f"at byte {offset}: {message}", hint=hint)
        self.offset = offset


class UpdateRejected(HanseError):
    """An update that cannot be combined with the others. Nothing has changed by it."""


class SiteFailed(HanseError):
    """Training code at a site raised, or ended without an answer."""


class TooFewUpdates(HanseError):
    """A round cannot go on. `reasons` maps each site that gave no good update to why; the text lists the first ten."""

    def __init__(self, message: str, *, reasons: Mapping[str, str], hint: str = "") -> None:
        listed = "".join(f"\n  {site}: {reason}" for site, reason in list(reasons.items())[:LISTED])
        listed += f"\n  and {len(reasons) - LISTED} more sites" if len(reasons) > LISTED else ""
        super().__init__(message + listed + ("\n " if listed and hint else ""), hint=hint)
        self.reasons = dict(reasons)


class JobFailed(HanseError):
    """A job ended without doing what it was asked. `folder` is its run folder, with all that was reached."""

    def __init__(self, message: str, *, folder: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.folder = folder


class JobStopped(JobFailed):
    """A job was stopped before its end; its last commit is kept and the hint says how to go on."""


class IdentityError(HanseError):
    """A certificate, a signature or a token that is not accepted: of another authority, expired, revoked, used, or of the wrong role."""


class Refused(HanseError):
    """The server or a site does not do what it was asked."""


class PolicyRefused(Refused):
    """A site's policy does not allow it. `clause` is the setting in policy.yaml, such as `code.digests`."""

    def __init__(self, message: str, *, clause: str, hint: str = "") -> None:
        super().__init__(f"{message} [{clause}]", hint=hint)
        self.clause = clause


class StorageFull(HanseError):
    """There is no room to keep what was sent. What was kept before is whole."""


class LinkBroken(HanseError):
    """The other end of a link is gone."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a value, as it travels: `code` is the class's name, `message` one sentence, `hint` what to do."""

    code: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        if isinstance(error, HanseError):
            return cls(type(error).__name__, error.message, error.hint)
        return cls(type(error).__name__, str(error) or "no message")

    def __str__(self) -> str:
        return f"{self.code}: {self.message} {self.hint}".rstrip()
