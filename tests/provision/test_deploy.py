"""The files that start a participant: compose file and manifests against schemas of what they use, and the shell commands by running them.

There is no Docker engine and no cluster here: that the containers run is not tested.
"""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
import yaml

from hanse.identity.certificates import Role
from hanse.provision.deploy import Deployment, compose, dockerfile, kubernetes, of_server, of_site, start_script
from hanse.provision.kits import provision
from hanse.provision.project import Admin, Project, Server, Site

PROJECT = Project(
    federation="study",
    server=Server(organisation="Hospital", addresses=["fl.example.org"], port=9000),
    admins=[Admin(name="ada", organisation="Hospital", role=Role.PROJECT_ADMIN)],
    sites=[Site(name="North_1@x", organisation="North Clinic")],
)
DEPLOYMENTS = {"server": of_server(PROJECT), "site": of_site(PROJECT.sites[0])}

Label = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Absolute = Annotated[str, msgspec.Meta(pattern=r"^/")]
Image = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._/-]*:[A-Za-z0-9_][A-Za-z0-9._-]*$")]
SecretKey = Annotated[str, msgspec.Meta(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]


class Strict(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    pass


# ------------------------------------------------------------------------------------------------------------------------------ compose


class Build(Strict):
    context: str


class Service(Strict, rename=None):
    build: Build
    image: Image
    command: list[str]
    user: Annotated[str, msgspec.Meta(pattern=r"^\d+:\d+$")]
    init: bool
    restart: Literal["no", "always", "on-failure", "unless-stopped"]
    stop_grace_period: Annotated[str, msgspec.Meta(pattern=r"^\d+s$")]
    volumes: list[Annotated[str, msgspec.Meta(pattern=r"^\.?[^:]*:/[^:]+$")]]
    read_only: bool
    tmpfs: list[Absolute]
    cap_drop: list[str]
    security_opt: list[Literal["no-new-privileges:true"]]
    ports: list[Annotated[str, msgspec.Meta(pattern=r"^\d+:\d+$")]] = []


class Compose(Strict):
    name: Label
    services: dict[Label, Service]


# --------------------------------------------------------------------------------------------------------------------------- Kubernetes


class Metadata(Strict):
    name: Label
    labels: dict[str, Label]


class TemplateMetadata(Strict):
    labels: dict[str, Label]


class Secret(Strict, tag_field="kind", tag="Secret"):
    api_version: Literal["v1"]
    metadata: Metadata
    type: Literal["Opaque"]
    string_data: dict[SecretKey, str]


class Requests(Strict):
    storage: Annotated[str, msgspec.Meta(pattern=r"^\d+[KMGT]i$")]


class VolumeResources(Strict):
    requests: Requests


class ClaimSpec(Strict):
    access_modes: list[Literal["ReadWriteOnce"]]
    resources: VolumeResources


class PersistentVolumeClaim(Strict, tag_field="kind", tag="PersistentVolumeClaim"):
    api_version: Literal["v1"]
    metadata: Metadata
    spec: ClaimSpec


class ServicePort(Strict):
    name: Label
    port: Port
    target_port: Port


class ServiceSpec(Strict):
    type: Literal["LoadBalancer"]
    selector: dict[str, Label]
    ports: list[ServicePort]


class KubernetesService(Strict, tag_field="kind", tag="Service"):
    api_version: Literal["v1"]
    metadata: Metadata
    spec: ServiceSpec


class Capabilities(Strict):
    drop: list[str]


class ContainerSecurity(Strict):
    allow_privilege_escalation: bool
    read_only_root_filesystem: bool
    capabilities: Capabilities


class VolumeMount(Strict):
    name: Label
    mount_path: Absolute
    read_only: bool = False


class ContainerPort(Strict):
    name: Label
    container_port: Port


class TcpSocket(Strict):
    port: Port


class Probe(Strict):
    tcp_socket: TcpSocket
    period_seconds: int


class Container(Strict):
    name: Label
    image: Image
    command: list[str]
    volume_mounts: list[VolumeMount]
    security_context: ContainerSecurity
    ports: list[ContainerPort] = []
    readiness_probe: Probe | None = None


class Item(Strict):
    key: SecretKey
    path: Annotated[str, msgspec.Meta(pattern=r"^[^/]")]


class SecretVolume(Strict):
    secret_name: Label
    default_mode: int
    items: list[Item]


class ClaimVolume(Strict):
    claim_name: Label


class EmptyVolume(Strict):
    pass


class Volume(Strict):
    name: Label
    secret: SecretVolume | None = None
    persistent_volume_claim: ClaimVolume | None = None
    empty_dir: EmptyVolume | None = None


class PodSecurity(Strict):
    run_as_non_root: bool
    run_as_user: int
    run_as_group: int
    fs_group: int


class PodSpec(Strict):
    automount_service_account_token: bool
    termination_grace_period_seconds: int
    security_context: PodSecurity
    init_containers: list[Container]
    containers: list[Container]
    volumes: list[Volume]


class Template(Strict):
    metadata: TemplateMetadata
    spec: PodSpec


class Selector(Strict):
    match_labels: dict[str, Label]


class Strategy(Strict):
    type: Literal["Recreate"]


class DeploymentSpec(Strict):
    replicas: Literal[1]
    selector: Selector
    strategy: Strategy
    template: Template


class StatefulSetSpec(Strict):
    replicas: Literal[1]
    selector: Selector
    service_name: Label
    template: Template


class KubernetesDeployment(Strict, tag_field="kind", tag="Deployment"):
    api_version: Literal["apps/v1"]
    metadata: Metadata
    spec: DeploymentSpec


class StatefulSet(Strict, tag_field="kind", tag="StatefulSet"):
    api_version: Literal["apps/v1"]
    metadata: Metadata
    spec: StatefulSetSpec


Object = Secret | PersistentVolumeClaim | KubernetesService | KubernetesDeployment | StatefulSet


def objects_of(text: str) -> list[Any]:
    return [msgspec.convert(data, Object) for data in yaml.safe_load_all(text)]


def workload_of(text: str) -> Any:
    return next(one for one in objects_of(text) if isinstance(one, KubernetesDeployment | StatefulSet))


FILES = {"join.token": "hanse-join-1.AAAA\n", "start.sh": "#!/bin/sh\n", "credentials/key.pem": "-----BEGIN\nx\n"}


@pytest.fixture(params=DEPLOYMENTS)
def deployment(request: pytest.FixtureRequest) -> Deployment:
    return DEPLOYMENTS[request.param]


def test_names_are_labels() -> None:
    assert DEPLOYMENTS["server"].name == "hanse-server"
    assert DEPLOYMENTS["site"].name == "hanse-site-north-1-x"
    long = of_site(Site(name="a" * 63, organisation="North Clinic"))
    assert len(long.name) == 63


def test_the_compose_file_fits_its_schema(deployment: Deployment) -> None:
    read = msgspec.convert(yaml.safe_load(compose(deployment)), Compose)
    service = read.services[deployment.name]
    assert service.ports == ([f"{deployment.port}:{deployment.port}"] if deployment.port else [])
    assert service.volumes == [".:/data/kit"]
    assert service.command == ["sh", "/data/kit/start.sh"]


def test_the_manifests_fit_their_schemas(deployment: Deployment) -> None:
    objects = objects_of(kubernetes(deployment, FILES))
    kinds = [type(one) for one in objects]
    assert kinds == (
        [Secret, PersistentVolumeClaim, KubernetesService, StatefulSet]
        if deployment.port
        else [Secret, PersistentVolumeClaim, KubernetesDeployment]
    )
    assert {one.metadata.name for one in objects} == {deployment.name}


def test_the_manifests_refer_to_each_other(deployment: Deployment) -> None:
    secret, claim, *service, workload = objects_of(kubernetes(deployment, FILES))
    pod = workload.spec.template.spec
    assert workload.spec.selector.match_labels == workload.spec.template.metadata.labels
    held = {volume.name: volume for volume in pod.volumes}
    assert held["data"].persistent_volume_claim.claim_name == claim.metadata.name
    assert held["start"].secret.secret_name == secret.metadata.name
    assert {item.path: secret.string_data[item.key] for item in held["start"].secret.items} == FILES
    for container in (*pod.init_containers, *pod.containers):
        assert {mount.name for mount in container.volume_mounts} <= held.keys()
    if service:
        assert service[0].spec.selector == workload.spec.template.metadata.labels
        assert service[0].spec.ports[0].target_port == pod.containers[0].ports[0].container_port == deployment.port
        assert workload.spec.service_name == service[0].metadata.name


def test_containers_have_no_rights_to_spare(deployment: Deployment) -> None:
    pod = workload_of(kubernetes(deployment, FILES)).spec.template.spec
    assert pod.security_context.run_as_non_root
    for container in (*pod.init_containers, *pod.containers):
        assert container.security_context == ContainerSecurity(False, True, Capabilities(["ALL"]))
    service = msgspec.convert(yaml.safe_load(compose(deployment)), Compose).services[deployment.name]
    assert service.read_only
    assert service.cap_drop == ["ALL"]
    assert not service.user.startswith("0:")


def test_the_schemas_refuse_what_they_do_not_know() -> None:
    """Else the tests above could not fail."""
    text = compose(DEPLOYMENTS["server"])
    with pytest.raises(msgspec.ValidationError, match="read_onyl"):
        msgspec.convert(yaml.safe_load(text.replace("read_only", "read_onyl")), Compose)
    manifests = kubernetes(DEPLOYMENTS["server"], FILES)
    for right, wrong in (("mountPath", "mountpath"), ("kind: StatefulSet", "kind: StatefulSets"), ("apps/v1", "apps/v1beta1")):
        with pytest.raises(msgspec.ValidationError):
            objects_of(manifests.replace(right, wrong))


def test_the_three_renderings_agree(deployment: Deployment) -> None:
    service = msgspec.convert(yaml.safe_load(compose(deployment)), Compose).services[deployment.name]
    (container,) = workload_of(kubernetes(deployment, FILES)).spec.template.spec.containers
    assert service.command == container.command
    assert service.image == container.image
    assert f"CMD {msgspec.json.encode(service.command).decode()}" in dockerfile(deployment).replace(", ", ",")


def test_the_image_holds_what_the_participant_needs() -> None:
    for name, extras, bubblewrap in (("server", "hanse[server]", False), ("site", "hanse[site,torch]", True)):
        text = dockerfile(DEPLOYMENTS[name])
        assert text.startswith("FROM python:3.11-slim\n")
        assert f'pip install --no-cache-dir "{extras}==' in text
        assert ("bubblewrap" in text) is bubblewrap
        assert {line.split()[0] for line in text.splitlines()} <= {"FROM", "RUN", "ENV", "USER", "CMD"}
    assert start_script(DEPLOYMENTS["site"]).count("hanse[site,torch]") == 1


@pytest.mark.parametrize(
    ("database", "blobs", "extras"),
    [
        (None, None, ("server",)),
        ("postgresql+asyncpg://db/hanse", None, ("server", "postgres")),
        ("sqlite+aiosqlite:///x", "s3://bucket", ("server", "s3")),
    ],
)
def test_a_server_installs_what_its_stores_need(database: str | None, blobs: str | None, extras: tuple[str, ...]) -> None:
    server = Server(organisation="Hospital", addresses=["localhost"], database=database, blobs=blobs)
    assert of_server(Project(federation="study", server=server)).extras == extras


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line for each call of a command `hanse` that stands in for the real one: where, and its arguments."""
    log, command = tmp_path / "calls", tmp_path / "bin" / "hanse"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$PWD $@" >> {log}\n[ "$2" != join ] || touch kit.yaml\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    return log


def test_the_start_scripts_start(tmp_path: Path, calls: Path) -> None:
    provision(PROJECT, tmp_path / "made")
    server, site = tmp_path / "made" / "server", tmp_path / "made" / "sites" / "North_1@x"
    for folder in (server, site, site):
        assert stat.S_IMODE((folder / "start.sh").stat().st_mode) == 0o700
        subprocess.run([folder / "start.sh"], check=True, cwd="/")
    assert calls.read_text().splitlines() == [
        f"{server} server start .",
        f"{site} site join . --token join.token",
        f"{site} site start .",
        f"{site} site start .",
    ]


def test_a_site_that_cannot_join_does_not_start(tmp_path: Path, calls: Path) -> None:
    (tmp_path / "bin" / "hanse").write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 3\n')
    (tmp_path / "start.sh").write_text(start_script(DEPLOYMENTS["site"]))
    assert subprocess.run(["sh", tmp_path / "start.sh"], check=False).returncode == 3
    assert calls.read_text() == "site join . --token join.token\n"


def mounted(folder: Path, secret: Secret, volume: SecretVolume) -> None:
    """Lay the Secret's files out as Kubernetes mounts them: links to a hidden folder, which it can exchange as a whole."""
    hidden = folder / "..2026_11_20"
    for item in volume.items:
        path = hidden / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secret.string_data[item.key])
        path.chmod(volume.default_mode)
    (folder / "..data").symlink_to(hidden.name)
    for path in hidden.iterdir():
        (folder / path.name).symlink_to(f"..data/{path.name}")


def test_the_pod_begins_with_the_files_of_the_secret_and_keeps_its_own(tmp_path: Path) -> None:
    provision(PROJECT, tmp_path / "made")
    server = tmp_path / "made" / "server"
    secret, *_, workload = objects_of((server / "kubernetes.yaml").read_text())
    pod = workload.spec.template.spec
    start, data = tmp_path / "start", tmp_path / "data"
    start.mkdir()
    data.mkdir()
    mounted(start, secret, next(volume.secret for volume in pod.volumes if volume.secret))
    command = [re.sub("/(start|data)(?=/)", rf"{tmp_path}/\1", part) for part in pod.init_containers[0].command]

    (data / "kit").mkdir()
    (data / "kit" / "kit.yaml").write_text("from a copy that was interrupted")
    (data / "kit" / "kit.yaml").chmod(0o400)
    subprocess.run(command, check=True)
    copied = {str(path.relative_to(data / "kit")): path for path in (data / "kit").rglob("*") if path.is_file()}
    own = {"kubernetes.yaml", "compose.yaml", "image/Dockerfile"}
    assert copied.keys() - {".copied"} == {str(path.relative_to(server)) for path in server.rglob("*") if path.is_file()} - own
    for name in copied.keys() - {".copied"}:
        assert copied[name].read_bytes() == (server / name).read_bytes()
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in copied.values()} == {0}

    copied["credentials/certificate.pem"].write_text("renewed")
    subprocess.run(command, check=True)
    assert copied["credentials/certificate.pem"].read_text() == "renewed"
