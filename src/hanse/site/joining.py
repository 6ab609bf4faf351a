"""How a site joins a federation: with a token, and a key that it makes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from hanse.errors import ConfigError, IdentityError
from hanse.identity.authority import new_key, request
from hanse.identity.certificates import Credentials, Role
from hanse.identity.kit import CREDENTIALS, KIT, Kit, read_kit, write_kit
from hanse.identity.tokens import read_token
from hanse.site.policy import DEFAULT_POLICY
from hanse.transport.client import Client


async def join(token_text: str, folder: Path, *, server: str | None = None, proxy: str | None = None) -> Kit:
    """Enrol with a join token and write the site's kit to `folder`: kit.yaml, its credentials, and a policy to be edited.

    server: the host:port to connect to, if it is not the one in the token. proxy: the URL of an HTTP CONNECT proxy; the kit keeps both.
    What is there already stays: the policy, and the site's own settings in kit.yaml. The kit appears when all went well: kit.yaml is
    written last. To join again, move the old credentials away.
    Raises ConfigError if there are credentials already, IdentityError if the token is not accepted, LinkBroken if the server cannot be
    reached.
    """
    if (folder / CREDENTIALS).exists():
        raise ConfigError(f"{folder} has joined already: join to a folder of its own, or move its {CREDENTIALS} away")
    before = read_kit(folder) if (folder / KIT).exists() else None
    token = read_token(token_text)
    address = server or token.address
    key = new_key()
    client = Client(address, token.credentials, proxy=proxy)
    try:
        answer = await client.call("enrol", csr=request(key).decode())
    finally:
        await client.close()
    if not isinstance(answer, dict) or not isinstance(answer.get("certificate"), str):
        raise IdentityError(f"{address} sent no certificate")
    credentials = Credentials(key, answer["certificate"].encode(), token.credentials.roots)
    identity = credentials.identity
    if (identity.role, identity.name) != (Role.SITE, token.site):
        raise IdentityError(f"{address} sent a certificate of {identity}, and the token is for the site {token.site!r}")
    about: dict[str, Any] = {
        "federation": identity.federation,
        "role": Role.SITE,
        "name": identity.name,
        "organisation": identity.organisation,
    }
    about |= {"server": address, "proxy": proxy, "folder": folder}
    kit = Kit(**about) if before is None else msgspec.structs.replace(before, **about)
    folder.mkdir(parents=True, exist_ok=True)
    credentials.save(folder / CREDENTIALS)
    if not kit.policy_file.exists():
        kit.policy_file.write_text(DEFAULT_POLICY, encoding="utf-8")
    write_kit(folder, kit)
    return kit
