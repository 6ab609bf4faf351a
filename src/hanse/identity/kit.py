"""A participant's kit: a folder with `kit.yaml`, its credentials, and for a site its policy. All that server, site or admin start from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from hanse.errors import ConfigError
from hanse.identity.authority import Authority
from hanse.identity.certificates import Credentials, Role
from hanse.identity.signatures import Signer
from hanse.messages.wire import Name, Resources
from hanse.sandbox import SandboxMode

KIT = "kit.yaml"
CREDENTIALS = "credentials"
AUTHORITY = "authority"

Address = Annotated[str, msgspec.Meta(max_length=300, pattern=r"^([^\s:/\[\]]+|\[[0-9A-Fa-f:.%]+\]):[0-9]{1,5}$")]
"""host:port, or [IPv6 address]:port."""


class Kit(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What `kit.yaml` says, and the folder that it lies in.

    server: the host:port that others connect to. state: where what has to last is kept, relative to the kit. metrics: of a server or
    site, the host:port where Prometheus may read its figures, without TLS.
    Of the server: listen, host:port to listen at; database, an SQLAlchemy URL (default SQLite in the state folder); blobs, a folder or
    an s3:// URL (default a folder in the state folder); certificate_days, how long the certificates that it issues are good; sandbox,
    whether workflows run in one: required, preferred or off; absence_s, after how many seconds away a site that is asked counts as failed;
    max_running, how many jobs run at once (default: as many as the sites have room for); track, where the values of each job go while it
    runs, a receiver's name, or NAME=WHERE.
    Of a site: policy, a file relative to the kit; resources, what jobs may take (default: all that the machine has);
    config, JSON values for training code; data, the files and folders that training code may read, relative to the kit;
    keep, folders that it may read and write, made if they are not there, whose files stay when the job ends, relative to the kit;
    python, the interpreter that runs training code (default: the agent's); proxy, the http:// URL of a CONNECT proxy.
    """

    federation: Name
    role: Role
    name: Name
    organisation: Name
    server: Address
    listen: Address | None = None
    database: str | None = None
    blobs: str | None = None
    certificate_days: Annotated[float, msgspec.Meta(gt=0)] = 90
    sandbox: SandboxMode = "required"
    absence_s: Annotated[float, msgspec.Meta(gt=0)] = 60
    max_running: Annotated[int, msgspec.Meta(gt=0)] | None = None
    track: str | None = None
    state: str = "state"
    metrics: Address | None = None
    policy: str = "policy.yaml"
    resources: Resources | None = None
    config: dict[str, Any] = {}
    data: list[str] = []
    keep: list[str] = []
    python: str | None = None
    proxy: str | None = None
    folder: Path = Path()

    @property
    def state_folder(self) -> Path:
        return self.folder / self.state

    @property
    def policy_file(self) -> Path:
        return self.folder / self.policy

    def kept_folders(self) -> list[Path]:
        """The folders to keep, absolute, without links.

        Raises ConfigError for one that holds the kit, its state or its policy, or lies in the state or the credentials. So does a folder of
        `data` or `keep` in another one that is kept: code could put a link to anything in its place.
        """
        folders = [(self.folder / path).resolve() for path in self.keep]
        own = [path.resolve() for path in (self.folder, self.state_folder, self.policy_file)]
        secret = [path.resolve() for path in (self.state_folder, self.folder / CREDENTIALS, self.folder / AUTHORITY)]
        for number, folder in enumerate(folders):
            others = [(self.folder / path).resolve() for path in self.data] + folders[:number] + folders[number + 1 :]
            if any(path.is_relative_to(folder) for path in own) or any(folder.is_relative_to(path) for path in secret):
                raise ConfigError(f"{self.folder / KIT}: keep names {folder}, and what the site decides by is there: name another folder")
            if inside := [path for path in others if path.is_relative_to(folder)]:
                raise ConfigError(f"{self.folder / KIT}: {inside[0]} lies in {folder}, which is kept: leave it out, it can be read there")
        return folders

    def credentials(self) -> Credentials:
        """What the participant proves itself with. Raises IdentityError."""
        return Credentials.load(self.folder / CREDENTIALS)

    def signer(self) -> Signer:
        """What an admin or researcher signs jobs with. Raises IdentityError, ConfigError for one whose role submits none."""
        if self.role in (Role.SERVER, Role.SITE, Role.AUDITOR):
            raise ConfigError(f"{self.folder} is the kit of {self.name}, in the role {self.role}, which submits no jobs.")
        return Signer.load(self.folder / CREDENTIALS)

    def authority(self) -> Authority:
        """The server's: what it issues sites' certificates with. Raises IdentityError."""
        return Authority.load(self.folder / AUTHORITY)


def read_kit(folder: Path) -> Kit:
    """The kit in the folder, which need not be a server's or a site's. Raises ConfigError that names the file and the place in it."""
    path = folder / KIT
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "folder" in data:
            raise ValueError("Object contains unknown field `folder`")
        kit = msgspec.convert(data, Kit)
        if kit.role is Role.SERVER and kit.listen is None:
            raise ValueError("a server's kit says where to listen, such as `listen: '[::]:8443'`")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", hint=f"{folder} is no kit; `hanse provision` makes one.") from error
    except (yaml.YAMLError, msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return msgspec.structs.replace(kit, folder=folder)


def write_kit(folder: Path, kit: Kit) -> None:
    """Write `kit.yaml`, whole or not at all, for the owner's eyes only: a database URL may hold a password."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / KIT
    data = msgspec.to_builtins(kit, enc_hook=str)
    data.pop("folder", None)
    unfinished = path.with_name(f".{KIT}.{os.getpid()}")
    unfinished.touch(0o600)
    unfinished.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(unfinished, path)
