from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hanse.errors import ConfigError, IdentityError
from hanse.identity.authority import Authority
from hanse.identity.certificates import Credentials, Role
from hanse.identity.kit import read_kit, write_kit
from hanse.identity.tokens import new_token
from hanse.messages.wire import Hello
from hanse.site.joining import join
from hanse.site.policy import Policy, read_policy

OneSite = Any  # of conftest.py


def token(one_site: OneSite, authority: Authority | None = None, *, site: str = "clinic-7") -> str:
    address = f"localhost:{one_site.listening.port}"
    return new_token(authority or one_site.authority, site=site, organisation="clinic", federation="test", address=address, hours=1)


async def test_a_site_joins_with_a_key_of_its_own_and_connects(one_site: OneSite, tmp_path: Path) -> None:
    text = token(one_site)
    kit = await join(text, tmp_path / "new")
    assert kit == read_kit(tmp_path / "new")
    assert (kit.name, kit.organisation, kit.role, kit.federation) == ("clinic-7", "clinic", Role.SITE, "test")
    assert kit.server == f"localhost:{one_site.listening.port}"
    (call,) = one_site.server.calls
    credentials = kit.credentials()
    assert call.name == "enrol"
    assert "PRIVATE" not in call.arguments["csr"]
    assert credentials.identity.name == "clinic-7"
    assert credentials.key.decode().splitlines()[1] not in text
    assert (tmp_path / "new" / "credentials" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert read_policy(kit.policy_file) == Policy()
    one_site.kit = kit
    await one_site.start()
    assert (await one_site.server.expect(Hello)).accepted == []


async def test_a_kit_that_is_there_is_not_overwritten(one_site: OneSite) -> None:
    before = {path: path.read_bytes() for path in one_site.kit.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="has joined already"):
        await join(token(one_site), one_site.kit.folder)
    assert {path: path.read_bytes() for path in one_site.kit.folder.rglob("*") if path.is_file()} == before
    assert one_site.server.calls == []


async def test_a_site_that_joins_again_keeps_its_settings(one_site: OneSite) -> None:
    kit = one_site.kit
    kit.data, kit.config = ["pictures"], {"epochs": 3}
    write_kit(kit.folder, kit)
    kit.policy_file.write_text("logs: true\n")
    (kit.folder / "credentials").rename(kit.folder / "old")
    again = await join(token(one_site), kit.folder)
    assert (again.data, again.config, read_kit(kit.folder).data) == (["pictures"], {"epochs": 3}, ["pictures"])
    assert kit.policy_file.read_text() == "logs: true\n"
    assert again.credentials().serial != Credentials.load(kit.folder / "old").serial


async def test_a_certificate_of_another_site_is_not_taken(one_site: OneSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = one_site.credentials(days=1).certificate.decode()  # of site-1

    async def call(peer: object, request: object) -> dict[str, str]:
        return {"certificate": chain}

    monkeypatch.setattr(one_site.server, "call", call)
    with pytest.raises(IdentityError):
        await join(token(one_site), tmp_path / "new")
    assert not (tmp_path / "new").exists()
