"""`project.yaml`: who takes part in a federation. It holds no secrets and can lie in version control."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import yaml

from hanse.errors import ConfigError
from hanse.identity.certificates import Role
from hanse.identity.kit import Address

EXAMPLE = """\
# Who takes part. `hanse provision project.yaml` makes their folders.
# Run it again after adding admins or sites here: it makes the new ones and leaves the others as they are.
federation: lung-study

server:
  name: server
  organisation: University Hospital
  addresses: [fl.example.org]     # host names and IP addresses that it is reached at; the first is what the others connect to
  port: 8443
  # listen: "[::]:8443"           # where it listens
  # database: postgresql+asyncpg://hanse@db.example.org/hanse        # default: SQLite in its state folder
  # blobs: s3://bucket/prefix     # default: a folder in its state folder

admins:                           # each gets a kit with a key to connect and, except for an auditor, one to sign jobs
  - {name: ada@example.org, organisation: University Hospital, role: project-admin}   # may do everything
  - {name: ben@north.example, organisation: North Clinic, role: org-admin}            # may submit jobs, and has a say over its own sites
  - {name: cleo@example.org, organisation: University Hospital, role: researcher}     # may submit jobs
  - {name: dan@example.org, organisation: Ethics Board, role: auditor}                # may look

sites:                            # each gets a folder with a join token and start files
  - {name: north, organisation: North Clinic}
  - {name: south, organisation: South Clinic}

token_hours: 168                  # how long a join token is good
certificate_days: 90              # of the server and the sites: renewed by themselves while they are connected
admin_days: 365                   # of admins, for connecting and for signing: made anew with `hanse provision`
"""

Participant = Annotated[str, msgspec.Meta(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$")]
"""A name that is a folder's name too: letters, digits and . _ @ -, beginning with a letter or a digit."""

Organisation = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[^/\x00-\x1f\x7f]+$")]
Days = Annotated[float, msgspec.Meta(gt=0, le=3650)]
_ADMINS = (Role.PROJECT_ADMIN, Role.ORG_ADMIN, Role.RESEARCHER, Role.AUDITOR)


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The server. addresses: host names and IP addresses; others connect to the first of them."""

    name: Participant = "server"
    organisation: Organisation
    addresses: Annotated[list[str], msgspec.Meta(min_length=1, max_length=100)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8443
    listen: Address | None = None
    database: str | None = None
    blobs: str | None = None

    @property
    def address(self) -> str:
        """host:port that others connect to."""
        host = self.addresses[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class Admin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Somebody who gives the server orders. role: project-admin, org-admin, researcher or auditor."""

    name: Participant
    organisation: Organisation
    role: Role


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Somebody who has data."""

    name: Participant
    organisation: Organisation


class Project(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `project.yaml` says. EXAMPLE explains each setting. Raises ConfigError if it contradicts itself."""

    federation: Participant
    server: Server
    admins: list[Admin] = []
    sites: list[Site] = []
    token_hours: Annotated[float, msgspec.Meta(gt=0, le=8760)] = 168
    certificate_days: Days = 90
    admin_days: Days = 365

    def __post_init__(self) -> None:
        for i, address in enumerate(self.server.addresses):
            if not _is_address(address):
                raise ConfigError(f"`$.server.addresses[{i}]`: {address!r} is neither a host name nor an IP address (ports go to `port`)")
        for i, admin in enumerate(self.admins):
            if admin.role not in _ADMINS:
                raise ConfigError(f"`$.admins[{i}].role`: {admin.role} is no role of an admin; these are: {', '.join(_ADMINS)}")
        _check_names(
            [("$.server.name", self.server.name)]
            + [(f"$.admins[{i}].name", admin.name) for i, admin in enumerate(self.admins)]
            + [(f"$.sites[{i}].name", site.name) for i, site in enumerate(self.sites)]
        )


def read_project(path: Path) -> Project:
    """The project in a YAML file. Raises ConfigError that names the file, and the line or the setting."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Project)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}.", hint="`hanse provision --example` prints one to begin with."
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error
    except (yaml.YAMLError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_names(named: Iterable[tuple[str, str]]) -> None:
    """Names are unique among all: what is revoked by name is one participant. Case does not count: some file systems ignore it."""
    seen: dict[str, str] = {}
    for place, name in named:
        if name.endswith("."):
            raise ConfigError(f"`{place}`: {name!r} ends with a dot")
        if (first := seen.setdefault(name.casefold(), place)) != place:
            raise ConfigError(
                f"`{place}`: {name!r} is taken by `{first}`; names are unique among server, admins and sites, and not only in their case"
            )


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        labels = text.split(".")
        return (
            len(text) <= 253
            and all(
                0 < len(label) <= 63 and label.isascii() and label.replace("-", "").replace("_", "").isalnum() and label.strip("-") == label
                for label in labels
            )
            and not labels[-1].isdigit()
        )
    return True
