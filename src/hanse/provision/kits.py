"""Writes the folders of a project: one for the authority, one for each participant.

FOLDER/authority/      the root key: keep it offline, it is needed only to add people
FOLDER/server/         the server's kit: kit.yaml, credentials/, and authority/, the intermediate that sites enrol with
FOLDER/admins/NAME/    an admin's kit: kit.yaml, credentials/
FOLDER/sites/NAME/     join.token, and files to start from; the site makes its own key
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.x509.oid import NameOID

from hanse.errors import ConfigError
from hanse.identity.authority import Authority, new_key, new_signing_key, public_key
from hanse.identity.certificates import Credentials, Identity, Role, certificates_in
from hanse.identity.kit import AUTHORITY, CREDENTIALS, Kit, write_kit
from hanse.identity.signatures import Signer
from hanse.identity.tokens import new_token
from hanse.provision.deploy import TOKEN, of_server, of_site, write_start_files
from hanse.provision.project import Admin, Project, Site

ENROLMENT_DAYS = 1825
"""How long the server's authority may issue certificates; not longer than the root."""


def provision(project: Project, folder: Path) -> list[Path]:
    """Make the folders that are not there yet, and return them; what is there stays as it is, to the byte.

    So a project with new admins or sites is provisioned into the same folder again. To make somebody's folder anew, remove it first.
    Raises: ConfigError, before anything is written, if the folder holds another federation, or participants without their authority.
    """
    root_folder = folder / "authority"
    made: list[Path] = []
    if root_folder.exists():
        root = _same_federation(project, root_folder)
    elif held := [name for name in ("server", "admins", "sites") if (folder / name).exists()]:
        raise ConfigError(
            f"{folder} holds {', '.join(held)} and no authority: a new authority would not fit them.",
            hint=f"Bring the authority's folder back to {root_folder}, or choose an empty folder.",
        )
    else:
        root = Authority.new_root(project.federation)
        with _whole(root_folder) as unfinished:
            root.save(unfinished)
        made.append(root_folder)

    if not (target := folder / "server").exists():
        with _whole(target) as unfinished:
            _write_server(project, root, unfinished)
        made.append(target)
    for admin in project.admins:
        if not (target := folder / "admins" / admin.name).exists():
            with _whole(target) as unfinished:
                _write_admin(project, admin, root, unfinished)
            made.append(target)
    for site in project.sites:
        if not (target := folder / "sites" / site.name).exists():
            with _whole(target) as unfinished:
                _write_site(project, site, root, unfinished)
            made.append(target)
    return made


def _same_federation(project: Project, folder: Path) -> Authority:
    root = Authority.load(folder)
    name = certificates_in(root.certificate)[0].subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
    if name != project.federation:
        raise ConfigError(
            f"{folder} is the authority of the federation {name!r}, not of {project.federation!r}.", hint="Choose another folder."
        )
    return root


def _write_server(project: Project, root: Authority, folder: Path) -> None:
    server = project.server
    identity = Identity(project.federation, Role.SERVER, server.name, server.organisation)
    key = new_key()
    chain = root.issue(identity, public_key(key), days=project.certificate_days, addresses=server.addresses)
    Credentials(key, chain, root.roots).save(folder / CREDENTIALS)
    root.intermediate("enrolment", ENROLMENT_DAYS).save(folder / AUTHORITY)
    listen = server.listen or f"[::]:{server.port}"
    kit = Kit(
        federation=project.federation,
        role=Role.SERVER,
        name=server.name,
        organisation=server.organisation,
        server=server.address,
        listen=listen,
        database=server.database,
        blobs=server.blobs,
        certificate_days=project.certificate_days,
    )
    write_kit(folder, kit)
    write_start_files(of_server(project), folder)


def _write_admin(project: Project, admin: Admin, root: Authority, folder: Path) -> None:
    identity = Identity(project.federation, admin.role, admin.name, admin.organisation)
    key = new_key()
    chain = root.issue(identity, public_key(key), days=project.admin_days)
    Credentials(key, chain, root.roots).save(folder / CREDENTIALS)
    if admin.role is not Role.AUDITOR:
        signing_key = new_signing_key()
        signing_chain = root.issue(identity, public_key(signing_key), days=project.admin_days)
        Signer(signing_key, signing_chain).save(folder / CREDENTIALS)
    kit = Kit(
        federation=project.federation, role=admin.role, name=admin.name, organisation=admin.organisation, server=project.server.address
    )
    write_kit(folder, kit)


def _write_site(project: Project, site: Site, root: Authority, folder: Path) -> None:
    token = new_token(
        root,
        site=site.name,
        organisation=site.organisation,
        federation=project.federation,
        address=project.server.address,
        hours=project.token_hours,
    )
    (folder / TOKEN).touch(0o600)
    (folder / TOKEN).write_text(token + "\n")
    write_start_files(of_site(site), folder)


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder (mode 0700) to write into, that gets the target's name when all is there. What an interrupted run left is thrown away."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True, mode=0o700)
    try:
        yield unfinished
        os.rename(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
