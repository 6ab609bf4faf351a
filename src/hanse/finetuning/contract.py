"""What vendor and client have agreed on: `project.yaml`. Both have the same file; its digest is in every version that comes of it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import blake3
import msgspec
import yaml

from hanse.errors import ConfigError
from hanse.finetuning.files import write_whole

PROJECT = "project.yaml"
WRITTEN = ("exchange", "scores", "reports", "evidence", "inbox")
"""The folders of a project folder that training code writes to; all else there, the versions above all, is for it to read only."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Party(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Vendor or client. site: its name in the federation. organisation: in whose name its people sign."""

    site: str
    organisation: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.site):
            raise ValueError(f"{self.site!r} is no name for a site: use small letters, digits and -")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The vendor's code. code: a Python file beside project.yaml. build: the function in it that takes nothing and returns a
    torch.nn.Module with one output (a logit) or two (logits of the negative and the positive class) for each input.

    embedding: the name of the submodule whose output is an input's embedding; empty: the input of the last linear layer.
    head: name patterns of the last layer's parameters, for adapters that train norms and head.
    """

    code: str = "model.py"
    build: str = "build"
    embedding: str = ""
    head: list[str] = []


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What data looks like. Labels are 0 (negative) or 1 (positive, the anomaly); `classes` names the two, in this order.

    kind: "image" (shape: height, width, channels; bytes 0 to 255) or "table" (columns: names of numeric columns, in the model's order).
    mean, std: of inputs scaled to 0…1 (images) or as they are (tables); the model gets (x - mean) / std, float32, images as (n, channels,
    height, width). One number for all channels or columns, or one each.
    slices: columns of labels.csv or the table by which results are told apart, such as device. group: the column that says which
    rows belong together (patient, device, session), so that intervals resample them together. None: every row stands alone.
    """

    kind: Literal["image", "table"] = "image"
    shape: Annotated[list[Count], msgspec.Meta(min_length=2, max_length=3)] = msgspec.field(default_factory=lambda: [28, 28, 1])
    columns: list[str] = []
    classes: Annotated[list[str], msgspec.Meta(min_length=2, max_length=2)] = msgspec.field(default_factory=lambda: ["normal", "anomaly"])
    mean: list[float] = msgspec.field(default_factory=lambda: [0.0])
    std: list[Positive] = msgspec.field(default_factory=lambda: [1.0])
    slices: list[str] = []
    group: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "table" and not self.columns:
            raise ValueError("a table needs its columns")


class Learning(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train; see docs/finetuning.md for what each mode is good for.

    mode: "rehearsed" (default), "gradient-mix", "one-shot" or "average".
    vendor_weight: in gradient-mix and average the factor of the vendor's gradient or model (default 0.8); in rehearsed the vendor's share
        of all steps, k_v / (k_v + k_c) (default 0.5).
    round_trips: of rehearsed and average. client_steps: local steps of the client in each. iterations: of gradient-mix.
    adapter: what is trained: "full", "lora" (of `lora_rank`, with norms and head) or "norms-and-head"; default "norms-and-head" for
        one-shot, where nothing rehearses what was known, and else "full".
    bits: of each number that travels: 8 or 4 (quantised, with error feedback) or 32.
    vendor_learning_rate, client_learning_rate: at the start, falling to 0 along a cosine over all steps of the run. Gradients are clipped.
    augment_client: vary the client's batches (brightness, blur, noise, shift …), as the few images it has would else be learnt by heart.
    augmented_vendor_first: the vendor trains alone, with generic augmentation, for `vendor_alone_steps` before the exchange begins.
    controls: run "vendor alone with augmentation" and "client alone" too, and report them.
    patience: stop when the client's metric has not improved for so many round trips; 0: never.
    """

    mode: Literal["rehearsed", "gradient-mix", "one-shot", "average"] = "rehearsed"
    vendor_weight: Fraction | None = None
    round_trips: Count = 4
    client_steps: Count = 50
    iterations: Count = 600
    adapter: Literal["full", "lora", "norms-and-head"] | None = None
    lora_rank: Count = 4
    bits: Literal[4, 8, 32] = 8
    batch_size: Count = 32
    vendor_learning_rate: Positive = 0.01
    client_learning_rate: Positive = 0.01
    momentum: Fraction = 0.9
    augment_client: bool = True
    augmented_vendor_first: bool = False
    vendor_alone_steps: Count = 1000
    client_alone_steps: Count = 200
    controls: bool = True
    patience: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def weight(self) -> float:
        """The vendor's weight, with the mode's default."""
        return self.vendor_weight if self.vendor_weight is not None else 0.5 if self.mode == "rehearsed" else 0.8

    @property
    def trained(self) -> Literal["full", "lora", "norms-and-head"]:
        """The adapter, with the mode's default."""
        return self.adapter or ("norms-and-head" if self.mode == "one-shot" else "full")

    @property
    def vendor_steps(self) -> int:
        """Of rehearsed, in each round trip: so many that the vendor's share of all steps is its weight."""
        return round(self.client_steps * self.weight / (1 - self.weight))

    def __post_init__(self) -> None:
        if self.mode == "rehearsed" and self.weight > 0.99:
            raise ValueError("vendor_weight above 0.99 leaves the client no steps")


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When a candidate may pass, on the vendor's holdout. See docs/gate.md.

    The margin is δ = max(margin_abs, margin_rel · the old version's metric); alpha: one-sided level of the non-inferiority test, divided by
    max_tries. min_per_class: of the holdout; with fewer, the outcome is inconclusive. fpr_ceiling, fnr_ceiling: for their upper bounds.
    """

    metric: Literal["hter", "eer", "fpr", "fnr", "error"] = "hter"
    margin_abs: Fraction = 0.005
    margin_rel: Fraction = 0.25
    alpha: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.05
    max_tries: Count = 3
    min_per_class: Count = 300
    fpr_ceiling: Fraction | None = None
    fnr_ceiling: Fraction | None = None
    resamples: Annotated[int, msgspec.Meta(ge=200)] = 1000
    mcnemar_alpha: Positive = 0.01


class Project(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """project.yaml. name: of the project. seed: of all randomness in it. threshold_on: which rate the operating threshold balances."""

    name: str
    vendor: Party
    clients: Annotated[list[Party], msgspec.Meta(min_length=1)]
    model: Model = Model()
    schema: Schema = Schema()
    learning: Learning = Learning()
    gate: Gate = Gate()
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name for a project: use small letters, digits and -")
        sites = [self.vendor.site, *(client.site for client in self.clients)]
        if len(set(sites)) < len(sites):
            raise ValueError(f"two parties have the same site: {', '.join(sites)}")

    @property
    def digest(self) -> str:
        """BLAKE3 of all settings, as `blake3:` and 64 hexadecimal digits; it does not depend on how the file is laid out."""
        return f"blake3:{blake3.blake3(msgspec.json.encode(self, order='sorted')).hexdigest()}"

    def client(self, site: str | None = None) -> Party:
        """The client of that site; without one, the only client. Raises ConfigError."""
        found = [client for client in self.clients if site in (None, client.site)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(client.site for client in self.clients)
        raise ConfigError(f"project {self.name} has the clients {names}: say which one" if found else f"{site!r} is none of {names}")


def read_project(folder: Path) -> Project:
    """The project in a party's folder. Raises ConfigError that names the file and the place in it."""
    path = folder / PROJECT
    try:
        read: Any = yaml.safe_load(path.read_text())
        project = msgspec.convert(read, Project)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is no project folder: it has no {PROJECT}", hint="`hanse finetune init` makes one.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not all(math.isfinite(value) for value in (*project.schema.mean, *project.schema.std)):
        raise ConfigError(f"{path}: mean and std must be finite")
    return project


def write_project(folder: Path, project: Project) -> Path:
    """Write project.yaml, whole or not at all."""
    path = folder / PROJECT
    write_whole(path, yaml.safe_dump(msgspec.to_builtins(project), sort_keys=False, allow_unicode=True).encode())
    return path
