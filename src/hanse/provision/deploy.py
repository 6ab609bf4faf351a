"""Files that start a participant: on a plain host, with docker compose, and on Kubernetes. Three renderings of one small description.

All three run the same `start.sh` in the participant's folder. The Kubernetes manifests are plain ones, for `kubectl apply`. The tests check
compose file and manifests against schemas of what they use, and run the shell commands in them. The containers themselves were never run:
there was no Docker engine where this was written.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hanse.provision.project import Project, Site

TOKEN = "join.token"
START = "start.sh"
COMPOSE = "compose.yaml"
KUBERNETES = "kubernetes.yaml"
IMAGE = "image"
"""The folder that the image is built from. It holds the Dockerfile and no keys."""

_INSIDE = "/data/kit"
_SECRET = "/start"
_USER = 1000
_GRACE_S = 30
_SANDBOX = (
    "Training code is sandboxed by bubblewrap where the container may make user namespaces. policy.yaml says what happens elsewhere.",
    "Data: add a volume to mount it, and name it under `data` in kit.yaml, which is there after the first start.",
)


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is started. name: a DNS label. commands: of a shell, run one after the other in the participant's folder; the last one stays.
    extras: of the package hanse. packages: of Debian. port: where others connect to. disk: room for the folder, as Kubernetes writes it.
    remarks: sentences for who runs it in a container."""

    name: str
    commands: tuple[str, ...]
    extras: tuple[str, ...]
    packages: tuple[str, ...] = ()
    port: int | None = None
    disk: str = "50Gi"
    remarks: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"hanse[{','.join(self.extras)}]=={_version()}"


def of_server(project: Project) -> Deployment:
    """How the server of a project is started."""
    database, blobs = project.server.database or "", project.server.blobs or ""
    extras = ["server"] + ["postgres"] * database.startswith("postgres") + ["s3"] * blobs.startswith("s3:")
    return Deployment(_label("hanse", project.server.name), ("exec hanse server start .",), tuple(extras), port=project.server.port)


def of_site(site: Site) -> Deployment:
    """How a site is started. The first time it joins: it makes its key and spends its token."""
    join = f"[ -e kit.yaml ] || hanse site join . --token {TOKEN}"
    return Deployment(
        _label("hanse-site", site.name),
        (join, "exec hanse site start ."),
        ("site", "torch"),
        packages=("bubblewrap",),
        remarks=_SANDBOX,
    )


def write_start_files(deployment: Deployment, folder: Path) -> None:
    """Add start.sh, image/Dockerfile, compose.yaml and kubernetes.yaml to a participant's folder.

    kubernetes.yaml holds the files that are in the folder by now as a Secret, and is as secret as they are.
    """
    held = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file()}
    held[START] = start_script(deployment)
    _write(folder / START, held[START], mode=0o700)
    _write(folder / IMAGE / "Dockerfile", dockerfile(deployment), mode=0o644)
    _write(folder / COMPOSE, compose(deployment), mode=0o644)
    _write(folder / KUBERNETES, kubernetes(deployment, held), mode=0o600)


def start_script(deployment: Deployment) -> str:
    """start.sh: for a host that has Python, and what the containers run."""
    head = ["#!/bin/sh", f"# Starts {deployment.name} from this folder. Needs: pip install '{deployment.requirement}'"]
    return "\n".join([*head, "set -eu", 'cd "$(dirname "$0")"', *deployment.commands, ""])


def dockerfile(deployment: Deployment) -> str:
    """image/Dockerfile: Hanse and what it needs of the system. It holds nothing of the participant's."""
    packages = " ".join(deployment.packages)
    install = f"RUN apt-get update && apt-get install -y --no-install-recommends {packages} && rm -rf /var/lib/apt/lists/*"
    lines = [
        "FROM python:3.11-slim",
        *([install] if packages else []),
        f'RUN pip install --no-cache-dir "{deployment.requirement}"',
        f"RUN useradd --uid {_USER} hanse",
        "ENV HOME=/tmp PYTHONUNBUFFERED=1",
        f"USER {_USER}:{_USER}",
        f"CMD {json.dumps(_command())}",
    ]
    return "\n".join(lines) + "\n"


def compose(deployment: Deployment) -> str:
    """compose.yaml: one service, which keeps all it has to keep in the participant's folder."""
    service: dict[str, Any] = {
        "build": {"context": f"./{IMAGE}"},
        "image": _image(deployment),
        "command": _command(),
        "user": f"{_USER}:{_USER}",
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": f"{_GRACE_S}s",
        "volumes": [f".:{_INSIDE}"],
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }
    if deployment.port is not None:
        service["ports"] = [f"{deployment.port}:{deployment.port}"]
    head = (
        f"Start: docker compose up --build -d. The folder has to belong to the user that runs in the container: chown -R {_USER}:{_USER} .",
        *deployment.remarks,
    )
    return _comment(head) + _yaml({"name": deployment.name, "services": {deployment.name: service}})


def kubernetes(deployment: Deployment, files: dict[str, str]) -> str:
    """kubernetes.yaml: a Secret with the files to begin with, and one pod that copies them to its volume the first time it runs.

    The server is a StatefulSet behind a Service, so that there is never a second one; a site is a Deployment that nobody connects to.
    """
    name = deployment.name
    labels = {"app": name}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "labels": labels}, "type": "Opaque"}
    secret["stringData"] = {_secret_key(path): text for path, text in files.items()}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "labels": labels},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": deployment.disk}}},
    }
    objects: list[dict[str, Any]] = [secret, claim]
    workload: dict[str, Any] = {"replicas": 1, "selector": {"matchLabels": labels}}
    if deployment.port is None:
        kind, workload["strategy"] = "Deployment", {"type": "Recreate"}
    else:
        kind, workload["serviceName"] = "StatefulSet", name
        port = {"name": "hanse", "port": deployment.port, "targetPort": deployment.port}
        spec = {"type": "LoadBalancer", "selector": labels, "ports": [port]}
        objects.append({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "labels": labels}, "spec": spec})
    workload["template"] = {"metadata": {"labels": labels}, "spec": _pod(deployment, files)}
    objects.append({"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": workload})
    head = (
        f"Build: docker build -t {_image(deployment)} {IMAGE}; push it where the cluster finds it, and change `image` below.",
        "Start: kubectl apply -f kubernetes.yaml. This file holds secrets. Once the pod runs, the files live on its volume.",
        *deployment.remarks,
    )
    return _comment(head) + "---\n".join(_yaml(one) for one in objects)


def _pod(deployment: Deployment, files: dict[str, str]) -> dict[str, Any]:
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    mounts = [{"name": "data", "mountPath": "/data"}, {"name": "tmp", "mountPath": "/tmp"}]
    copy = f"[ -e {_INSIDE}/.copied ] || {{ umask 077; mkdir -p {_INSIDE}; cp -rfL {_SECRET}/* {_INSIDE}/; touch {_INSIDE}/.copied; }}"
    main: dict[str, Any] = {
        "name": "hanse",
        "image": _image(deployment),
        "command": _command(),
        "volumeMounts": mounts,
        "securityContext": confined,
    }
    if deployment.port is not None:
        main["ports"] = [{"name": "hanse", "containerPort": deployment.port}]
        main["readinessProbe"] = {"tcpSocket": {"port": deployment.port}, "periodSeconds": 10}
    first = {
        "name": "copy",
        "image": _image(deployment),
        "command": ["sh", "-euc", copy],
        "volumeMounts": [*mounts, {"name": "start", "mountPath": _SECRET, "readOnly": True}],
        "securityContext": confined,
    }
    secret = {"secretName": deployment.name, "defaultMode": 0o640, "items": [{"key": _secret_key(path), "path": path} for path in files]}
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": _GRACE_S,
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER},
        "initContainers": [first],
        "containers": [main],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": deployment.name}},
            {"name": "start", "secret": secret},
            {"name": "tmp", "emptyDir": {}},
        ],
    }


class _Dumper(yaml.SafeDumper):
    """Writes what it is given again instead of `&anchors`, which people rarely read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _comment(sentences: tuple[str, ...]) -> str:
    return "".join(f"# {sentence}\n" for sentence in sentences)


def _command() -> list[str]:
    return ["sh", f"{_INSIDE}/{START}"]


def _image(deployment: Deployment) -> str:
    return f"{deployment.name}:{_version()}"


def _version() -> str:
    return importlib.metadata.version("hanse")


def _secret_key(path: str) -> str:
    return path.replace("/", "_")


def _label(*parts: str) -> str:
    """A DNS label, which is what compose and Kubernetes take as a name."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower())[:63].strip("-")


def _write(path: Path, text: str, *, mode: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch(mode)
    path.chmod(mode)
    path.write_text(text, encoding="utf-8")
