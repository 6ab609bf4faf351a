"""New project folders: a vendor's, and the one that the vendor hands to a client."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hanse.errors import ConfigError, WireError
from hanse.finetuning.contract import PROJECT, Project, read_project, write_project
from hanse.finetuning.history import History
from hanse.finetuning.version_file import CODE, is_signature
from hanse.finetuning.versions import Array, Version, Versions, write_current
from hanse.identity.signatures import Signer
from hanse.messages.codec import read

DATA = "data.yaml"


def project_of(answers: Mapping[str, str]) -> Project:
    """The project that the wizard's answers make: its flags by name, lists with commas between. Raises ConfigError for what is wrong."""
    said = {name: answer.strip() for name, answer in answers.items()}
    schema: dict[str, Any] = {
        "kind": said["kind"],
        "classes": _list(said["classes"]),
        "slices": _list(said["slices"]),
        "group": said["group"] or None,
    }
    try:
        schema |= {"mean": [float(each) for each in _list(said["mean"])], "std": [float(each) for each in _list(said["std"])]}
        schema |= {"columns": _list(said["columns"])} if said["kind"] == "table" else {"shape": [int(n) for n in said["shape"].split("x")]}
        project = {
            "name": said["name"],
            "vendor": _party(said["vendor"]),
            "clients": [_party(each) for each in _list(said["clients"])],
            "schema": schema,
            "learning": {"mode": said["mode"], "vendor_weight": float(said["vendor_weight"]) if said["vendor_weight"] else None},
        }
        return msgspec.convert(project, Project)
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"this is no project: {error}", hint="`hanse finetune init --help` says what each answer may be.") from error


def init(
    folder: Path, project: Project, *, who: str, code: Path | None = None, weights: Path | None = None, threshold: float = 0.5
) -> Version | None:
    """Make the vendor's project folder: project.yaml, data.yaml and model.py to be filled in, and the model's first version.

    code: the vendor's own model file; without one, a small network of the project's shape. weights: a safetensors file; without one there
    is no version yet, see `add_weights`. The first version counts as deployed: it is what runs at the clients.
    Raises ConfigError if there is a project in the folder, or the weights do not fit the code.
    """
    if (folder / PROJECT).exists():
        raise ConfigError(f"{folder} holds a project already", hint="Choose an empty folder.")
    target = folder / project.model.code
    if code and target.exists() and not code.samefile(target):
        raise ConfigError(f"{target} is there already", hint="Choose an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if code is not None and not target.exists():
        shutil.copyfile(code, target)
    _write_new(target, _model(project))
    _write_new(folder / DATA, _data(project, "holdout"))
    if weights is not None:
        read_weights(folder, project, weights)
    write_project(folder, project)
    for client in project.clients:
        History(folder, client.site).move("draft", who=who, why="the project was made")
    return add_weights(folder, weights, who=who, threshold=threshold) if weights is not None else None


def add_weights(
    folder: Path, weights: Path | None = None, *, who: str, parent: Version | None = None, threshold: float | None = None, notes: str = ""
) -> Version:
    """A new version of weights from a safetensors file, or of the parent's with another threshold (default: the parent's, or 0.5).

    The first version of a project counts as deployed: it is what runs at the clients.
    Raises ConfigError if neither weights nor parent are given, or the weights do not fit model.py.
    """
    versions = Versions(folder)
    project, first = versions.project, not versions.list()
    if weights is not None:
        params = read_weights(folder, project, weights)
    elif parent is not None:
        params = versions.params(parent)
    else:
        raise ConfigError("a version needs weights, or a parent to have them from")
    kept = threshold if threshold is not None else parent.threshold if parent else 0.5
    version = versions.add(params, threshold=kept, parent=parent.digest if parent else None, notes=notes)
    if first:
        for client in project.clients:
            History(folder, client.site).note("first version", who=who, version=version.digest, deployed=version.digest)
        write_current(folder, version)
    return version


def read_weights(folder: Path, project: Project, path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file by name. Raises ConfigError if they are not those of the project's code."""
    from hanse.finetuning.models import load_module, load_params

    try:
        params = read(path)[0].params
    except (OSError, WireError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="Weights are a safetensors file.") from error
    if not isinstance(params, dict):
        raise ConfigError(f"{path} holds no named tensors")
    load_params(load_module(folder, project.model), params)
    return params


def invite(folder: Path, target: Path, signer: Signer, *, client: str | None = None, version: Version | None = None) -> Path:
    """Write a client's project folder, to be handed over: project.yaml, the model with the vendor's signature, a data.yaml to fill in.

    Nothing of the vendor's data is in it. version: default the one that is deployed; it counts as deployed at the client too.
    Raises ConfigError if there is no version, IdentityError if the signer is not of the vendor.
    """
    project = read_project(folder)
    party, vendors = project.client(client), Versions(folder, client)
    version = version or vendors.current
    if version is None:
        raise ConfigError(f"{folder} has no version to hand over", hint="`hanse finetune versions add` adds one.")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty", hint="Choose another folder.")
    signed = vendors.sign(version, "approve", signer, why=f"what {party.site} begins with")
    part = target.with_name(f".{target.name}.{os.urandom(8).hex()}.part")
    try:
        write_project(part, project)
        theirs = Versions(part, party.site)
        theirs.path(version).mkdir(parents=True)
        for path in vendors.path(version).iterdir():
            if not is_signature(path.name) or path.name == f"{signed.site}.signature":
                shutil.copy(path, theirs.path(version))
        shutil.copyfile(theirs.path(version) / CODE, part / project.model.code)
        (part / DATA).write_text(_data(project, "test"))
        theirs.history.move("draft", who=signed.who, why="the vendor's invitation", version=version.digest, deployed=version.digest)
        write_current(part, version)
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    vendors.history.note("invite", who=signed.who, version=version.digest)
    return target


def _list(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def _party(text: str) -> dict[str, str]:
    site, _, organisation = text.partition("=")
    return {"site": site.strip(), "organisation": organisation.strip() or site.strip()}


def _write_new(path: Path, text: str) -> None:
    if not path.exists():
        path.write_text(text)


def _data(project: Project, measured: str) -> str:
    """A data.yaml to be filled in. measured: "holdout" at the vendor, "test" at a client."""
    purpose = (
        "the frozen holdout that the gate measures on" if measured == "holdout" else "what your own metric is measured on; never trained on"
    )
    sections = "\n".join(
        f"{name}:                              # {why}\n{_section(project, name)}"
        for name, why in (("train", "what is trained on"), (measured, purpose))
    )
    columns = "".join(f", {name}" for name in [*project.schema.slices, *([project.schema.group] if project.schema.group else [])])
    return _DATA.format(negative=project.schema.classes[0], positive=project.schema.classes[1], columns=columns, sections=sections)


def _section(project: Project, name: str) -> str:
    if project.schema.kind == "table":
        return f"  kind: table\n  file: data/{name}.csv              # or .parquet\n  label: label\n"
    return f"  kind: images\n  folder: data/{name}\n  labels: labels.csv              # in that folder\n"


def _model(project: Project) -> str:
    schema = project.schema
    if schema.kind == "table":
        return _MLP.replace("INPUTS", str(len(schema.columns)))
    height, width, channels = (*schema.shape, 1)[:3]
    features = 32 * -(-height // 4) * -(-width // 4)
    return _CNN.replace("CHANNELS", str(channels)).replace("FEATURES", str(features)).replace("SIZE", f"{height} x {width} x {channels}")


_DATA = """\
# Where this party's own data is. It stays here: neither this file nor the data is ever sent.
# Labels are 0 or {negative} (negative) and 1 or {positive} (positive). Paths are relative to this file.
#
#   kind: images   a folder of PNG, JPEG or BMP files, and labels.csv in it with the columns file, label{columns}
#   kind: table    a CSV or Parquet file with the model's columns, the column that `label` names{columns}
#   kind: python   file: data.py, name: load -- a function of your own that returns inputs and labels
#
# `hanse finetune check` tells what is wrong with it.

{sections}"""

_MLP = '''"""The model: a small network for a table of INPUTS columns. Replace it by your own; `build` is all that Hanse calls."""

from torch import nn


def build() -> nn.Module:
    """One logit for each row, of float32 inputs of shape (n, INPUTS)."""
    return nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
'''

_CNN = '''"""The model: a small network for images of SIZE. Replace it by your own; `build` is all that Hanse calls."""

from torch import nn


def build() -> nn.Module:
    """One logit for each image, of float32 inputs of shape (n, channels, height, width)."""
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(FEATURES, 32),
        nn.ReLU(),
        nn.Linear(32, 1),
    )
'''
