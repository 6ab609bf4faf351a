from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hanse.errors import ConfigError, IdentityError
from hanse.identity.authority import Authority, new_key, new_signing_key, public_key
from hanse.identity.certificates import Credentials, Identity, Role
from hanse.identity.kit import Kit, read_kit, write_kit
from hanse.identity.signatures import Signer
from hanse.messages.wire import Resources

SITE = {"federation": "study", "role": "site", "name": "north", "organisation": "North Clinic", "server": "fl.example.org:8443"}


def write(where: Path, **changes: Any) -> Path:
    (where / "kit.yaml").write_text(yaml.safe_dump({**SITE, **changes}))
    return where


def test_a_kit_is_read_as_it_was_written(tmp_path: Path) -> None:
    kit = Kit(
        federation="study",
        role=Role.SITE,
        name="north",
        organisation="Klinik Süd",
        server="[2001:db8::1]:8443",
        resources=Resources(cores=4, memory_bytes=8 << 30, gpus=1),
        config={"data": "/srv/scans", "classes": [1, 2]},
        proxy="http://proxy:3128",
        folder=tmp_path,
    )
    write_kit(tmp_path, kit)
    assert read_kit(tmp_path) == kit
    assert [path.name for path in tmp_path.iterdir()] == ["kit.yaml"]
    assert (tmp_path / "kit.yaml").stat().st_mode & 0o777 == 0o600


def test_a_kit_knows_its_folder_wherever_it_is_moved(tmp_path: Path) -> None:
    write_kit(tmp_path / "a", Kit(**SITE, state="kept"))
    (tmp_path / "a").rename(tmp_path / "b")
    kit = read_kit(tmp_path / "b")
    assert kit.folder == tmp_path / "b"
    assert kit.state_folder == tmp_path / "b" / "kept"
    assert kit.policy_file == tmp_path / "b" / "policy.yaml"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sever": "x:1"}, "unknown field `sever`"),
        ({"folder": "/"}, "unknown field `folder`"),
        ({"role": "king"}, r"'king'.*\$\.role"),
        ({"server": "fl.example.org"}, r"\$\.server"),
        ({"server": "2001:db8::1:8443"}, r"\$\.server"),
        ({"name": "a/b"}, r"\$\.name"),
        ({"certificate_days": 0}, r"\$\.certificate_days"),
        ({"resources": {"cores": -1}}, r"\$\.resources\.cores"),
        ({"role": "server"}, "where to listen"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    assert read_kit(write(tmp_path)).name == "north"
    with pytest.raises(ConfigError, match=says) as caught:
        read_kit(write(tmp_path, **changes))
    assert str(tmp_path / "kit.yaml") in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"- 1", b"{", b"\xff\xfe\xfd"])
def test_a_file_that_is_no_kit_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "kit.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=r"kit\.yaml"):
        read_kit(tmp_path)


def test_a_folder_without_a_kit_is_told_who_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`hanse provision` makes one"):
        read_kit(tmp_path / "nowhere")


def test_a_kit_gives_its_credentials(tmp_path: Path) -> None:
    root = Authority.new_root("study")
    ada = Identity("study", Role.PROJECT_ADMIN, "ada", "Hospital")
    key, signing = new_key(), new_signing_key()
    mine = Credentials(key, root.issue(ada, public_key(key), days=1), root.roots)
    signer = Signer(signing, root.issue(ada, public_key(signing), days=1))
    kit = read_kit(write(tmp_path))
    with pytest.raises(ConfigError, match="the role site, which submits no jobs"):
        kit.signer()
    kit.role = Role.RESEARCHER
    for ask in (kit.credentials, kit.signer, kit.authority):
        with pytest.raises(IdentityError, match="cannot be read"):
            ask()
    mine.save(tmp_path / "credentials")
    signer.save(tmp_path / "credentials")
    root.save(tmp_path / "authority")
    assert (kit.credentials(), kit.signer(), kit.authority()) == (mine, signer, root)


def test_folders_to_keep_are_relative_to_the_kit(tmp_path: Path) -> None:
    kit = Kit(**SITE, folder=tmp_path / "kit", keep=["../project", "mine", str(tmp_path / "third")], data=["/srv/images", "images"])
    assert kit.kept_folders() == [tmp_path / "project", tmp_path / "kit" / "mine", tmp_path / "third"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": ["."]}, "what the site decides by"),
        ({"keep": [".."]}, "what the site decides by"),
        ({"keep": ["/"]}, "what the site decides by"),
        ({"keep": ["state/project"]}, "what the site decides by"),
        ({"keep": ["credentials"]}, "what the site decides by"),
        ({"keep": ["mine"], "state": "mine/state"}, "what the site decides by"),
        ({"keep": ["mine"], "policy": "mine/policy.yaml"}, "what the site decides by"),
        ({"keep": ["link"]}, "what the site decides by"),
        ({"keep": ["../project"], "data": ["../project/images"]}, "leave it out"),
        ({"keep": ["../project", "../project/scores"]}, "leave it out"),
        ({"keep": ["mine", "mine"]}, "leave it out"),
    ],
)
def test_code_may_not_keep_what_the_site_decides_by(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    (tmp_path / "kit" / "credentials").mkdir(parents=True)
    (tmp_path / "kit" / "link").symlink_to("credentials")
    with pytest.raises(ConfigError, match=says):
        Kit(**SITE, folder=tmp_path / "kit", **settings).kept_folders()
