"""What a site allows, as its `policy.yaml` says: who may submit, what runs, what leaves, and how much of everything.

Whatever a job says, the agent asks here: `check_offer` before it takes a job, `check_update` for everything that leaves, a `Meter` as it
goes on. What is not allowed raises PolicyRefused, which names the clause.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import yaml

from hanse.errors import ConfigError, Failure, NotInstalled, PolicyRefused
from hanse.filters import Filter, apply
from hanse.identity.certificates import Identity
from hanse.jobs.archive import Manifest, code_digest
from hanse.jobs.bundle import read_mapping
from hanse.jobs.parts import part_of
from hanse.messages.flmodel import FLModel
from hanse.messages.params import flatten, unflatten
from hanse.messages.task import Task
from hanse.messages.update import Record, Update
from hanse.sandbox import SandboxMode
from hanse.site.disclosure import check_recipe, disclosed
from hanse.statistics.disclosure import Disclosure

Patterns = tuple[Annotated[str, msgspec.Meta(min_length=1)], ...]
"""Names with `*`, `?` and `[…]`; case counts. A list that is empty matches nothing."""

Whole = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]

DEFAULT_POLICY = """\
# What this site allows. Whatever a job says, this file decides; the agent reads it when it starts.
#
# Names are patterns: * stands for anything, ? for one character; case counts. An empty list, [], allows nothing.
# A clause that is left out has the value that stands here. A refusal names its clause, such as [caps.rounds].

# Whose jobs are taken: all three must fit. Every job is signed, and the signature is checked against this federation's authority first.
submitters:
  names: ["*"]
  organisations: ["*"]
  roles: [project-admin, org-admin, researcher]

# The kinds of recipes, such as fedavg, scaffold, personal, fedbuff, statistics and fedeval; and workflow for one of the job's own, which
# runs at the server. The key `recipe` of job.yaml is the kind.
workflows: ["*"]

# Whose code runs here: any code that one of these has signed, and else the code that was reviewed, by its digest.
code:
  signers: ["*"]
  digests: []            # such as "blake3:5a1f…": a refusal names the digest of the job's code

# What may leave, by name; `deny` wins over `allow`. on_denied: refuse the whole update, or drop what is denied and send the rest.
tensors:
  allow: ["*"]
  deny: []
  on_denied: refuse
metrics:                 # of updates, and numbers that training code logs
  allow: ["*"]
  deny: []
  on_denied: refuse
meta:                    # what training code says about an update; these three are what the mean needs
  allow: [examples, steps, excluded]
  deny: []
  on_denied: refuse

# Whether texts may leave: printed lines, logged texts, the words of errors. They stay in the agent's own log if not.
logs: false

# Filters for every update that leaves, after the job's own, in this order; written as in a job file, such as
#   - {kind: exclude, patterns: ["head.*"]}
#   - {kind: clip_norm, max_norm: 1.0}
#   - {kind: gaussian_noise, stddev: 0.01}
filters: []

# Rules of this site for statistics, k-means and regression; of each rule the job's or the site's applies, whichever is stricter. null: the
# job's. With {} these are
#   {min_count: 10, max_bins_share: 0.1, extremes: false, count_noise: 0, range_noise: 0}
statistics: null

# The most that one job may take; null: no limit.
caps:
  rounds: null
  upload_bytes: null
  download_bytes: null
  cpu_seconds: null
  wall_seconds_per_task: null
  memory_bytes: null
  bytes_per_second: null # of all transfers of this site together, each way; at least 65536

# When training may run, every day, in local time, such as "22:00-06:00"; null: always. Outside of it tasks wait; one that runs may finish.
window: null

# Training code without network, keys and other people's files: required (a job is refused where that cannot be had), preferred (it runs
# without, and the agent warns), or off.
sandbox: required
"""


class Submitters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whose jobs are taken: name, organisation and role must all fit."""

    names: Patterns = ("*",)
    organisations: Patterns = ("*",)
    roles: tuple[Literal["project-admin", "org-admin", "researcher"], ...] = ("project-admin", "org-admin", "researcher")


class Code(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whose code runs: any of these signers', and else what has one of these digests."""

    signers: Patterns = ("*",)
    digests: tuple[Annotated[str, msgspec.Meta(pattern="^blake3:[0-9a-f]{64}$")], ...] = ()


class Leaving(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may leave, by name; `deny` wins. on_denied: refuse the whole update, or drop what is denied."""

    allow: Patterns = ("*",)
    deny: Patterns = ()
    on_denied: Literal["refuse", "drop"] = "refuse"

    def denied(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if _fits(name, self.deny) or not _fits(name, self.allow)]


class Statistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The site's own rules for statistics: see `hanse.Disclosure`. Noise is added by the agent. Raises ConfigError for one out of range."""

    min_count: int = Disclosure.min_count
    max_bins_share: float = Disclosure.max_bins_share
    extremes: bool = Disclosure.extremes
    count_noise: float = Disclosure.count_noise
    range_noise: float = Disclosure.range_noise

    def __post_init__(self) -> None:
        self.rules()

    def rules(self) -> Disclosure:
        """As the agent applies them."""
        return Disclosure(**msgspec.structs.asdict(self))


class Caps(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The most that one job may take; None: no limit. Bytes of frames, seconds of all processes of the training code.

    bytes_per_second: of all the site's transfers together, each way. One that is slower than 64 KiB a second would be taken for broken.
    """

    rounds: Whole | None = None
    upload_bytes: Whole | None = None
    download_bytes: Whole | None = None
    cpu_seconds: Seconds | None = None
    wall_seconds_per_task: Seconds | None = None
    memory_bytes: Annotated[int, msgspec.Meta(gt=0)] | None = None
    bytes_per_second: Annotated[int, msgspec.Meta(ge=64 << 10)] | None = None


class Window(NamedTuple):
    """A part of every day, in local time; it may go past midnight. `begin` is in it, `end` is not."""

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Window:
        """What "22:00-06:00" stands for. Raises ValueError."""
        begin, _, end = text.partition("-")
        window = cls(*(datetime.strptime(part.strip(), "%H:%M").time() for part in (begin, end)))
        if window.begin == window.end:
            raise ValueError("it begins when it ends")
        return window

    def holds(self, moment: time) -> bool:
        """Whether the time of day is in it."""
        if self.begin < self.end:
            return self.begin <= moment < self.end
        return moment >= self.begin or moment < self.end

    def __str__(self) -> str:
        return f"{self.begin:%H:%M} to {self.end:%H:%M}"


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a `policy.yaml` says. Made without arguments, it is the default one. Raises ConfigError for filters that cannot be made."""

    submitters: Submitters = Submitters()
    workflows: Patterns = ("*",)
    code: Code = Code()
    tensors: Leaving = Leaving()
    metrics: Leaving = Leaving()
    meta: Leaving = Leaving(allow=("examples", "steps", "excluded"))
    logs: bool = False
    filters: tuple[dict[str, Any], ...] = ()
    statistics: Statistics | None = None
    caps: Caps = Caps()
    window: str | None = None
    sandbox: SandboxMode = "required"

    def __post_init__(self) -> None:
        self.site_filters()
        self.hours()

    def hours(self) -> Window | None:
        """When training may run; None for always. Raises ConfigError if `window` does not say."""
        try:
            return None if self.window is None else Window.parse(self.window)
        except ValueError as error:
            raise ConfigError(f'window is {self.window!r}: write it as "22:00-06:00", in quotation marks ({error})') from error

    def site_filters(self) -> list[Filter]:
        """The filters for every update that leaves, in order."""
        return [part_of("filters", description) for description in self.filters]


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises ConfigError with the place of a clause that is unknown, malformed or there twice."""
    _check_no_doubles(path)
    try:
        written = read_mapping(path)
        if written.get("sandbox") is False:  # what YAML makes of a bare `off`
            written["sandbox"] = "off"
        return msgspec.convert(written, Policy)
    except (msgspec.ValidationError, ConfigError, NotInstalled) as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from error


# ------------------------------------------------------------------------------------------------------------------------ what comes in


def check_offer(policy: Policy, manifest: Manifest, submitter: Identity) -> None:
    """Raises PolicyRefused if the site does not take the job. `manifest` and `submitter` are what `open_manifest` gave."""
    who, job = policy.submitters, f"job {manifest.name!r} of {submitter}"
    if not _fits(submitter.name, who.names):
        raise PolicyRefused(f"{job}: this site takes no jobs from {submitter.name!r}", clause="submitters.names")
    if not _fits(submitter.organisation, who.organisations):
        raise PolicyRefused(f"{job}: this site takes no jobs from {submitter.organisation!r}", clause="submitters.organisations")
    if submitter.role not in who.roles:
        raise PolicyRefused(f"{job}: this site takes no jobs from a {submitter.role}", clause="submitters.roles")
    if not _fits(manifest.workflow, policy.workflows):
        raise PolicyRefused(f"{job}: this site takes no {manifest.workflow!r} jobs", clause="workflows")
    if not _fits(submitter.name, policy.code.signers) and (digest := code_digest(manifest)) not in policy.code.digests:
        raise PolicyRefused(
            f"{job}: its code is not among what this site has reviewed: {digest}",
            clause="code.digests",
            hint="Have the site review it and add that digest to its policy.",
        )
    if policy.statistics is not None:
        check_recipe(policy.statistics.rules(), manifest.workflow)
    _check_cap("rounds", manifest.rounds, policy.caps.rounds, f"{job} may take")
    _check_cap("memory_bytes", manifest.resources.memory_bytes, policy.caps.memory_bytes, f"{job} asks for")


class Spent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a job has taken of a site so far. It can be kept as JSON, so that a restart forgets nothing."""

    rounds: Whole = 0
    upload_bytes: Whole = 0
    download_bytes: Whole = 0
    cpu_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Meter:
    """Counts what one job takes, against the site's caps. `spent` is what it has taken so far."""

    def __init__(self, caps: Caps, spent: Spent = Spent()) -> None:  # noqa: B008 – it is frozen
        self._caps = caps
        self.spent = spent

    def charge(self, *, rounds: int = 0, upload_bytes: int = 0, download_bytes: int = 0, cpu_seconds: float = 0.0) -> None:
        """Count this, once for each thing, and before it is done where it is known before: a round, an upload, a download.

        Raises PolicyRefused, after counting, if it passes a cap: a job that has passed one gets no more of it.
        """
        more = {"rounds": rounds, "upload_bytes": upload_bytes, "download_bytes": download_bytes, "cpu_seconds": cpu_seconds}
        total = {name: getattr(self.spent, name) + value for name, value in more.items()}
        self.spent = Spent(**total)
        for name, value in total.items():
            if more[name]:
                _check_cap(name, value, getattr(self._caps, name), "the job takes")


def _check_cap(name: str, value: float, cap: float | None, who: str) -> None:
    if cap is not None and value > cap:
        raise PolicyRefused(f"{who} {value:,} {name.replace('_', ' ')}, and this site gives a job {cap:,}", clause=f"caps.{name}")


# ----------------------------------------------------------------------------------------------------------------------- what goes out


def check_update(policy: Policy, update: Update, *, task: Task) -> Update:
    """The update as it may leave: after the site's rules for statistics and its filters, without what the policy drops.

    task: its model is what filters that need the change compare with; meta that it brought may go back.
    Rules and filters draw from the operating system's randomness: neither the server nor the job can know the noise, and no run repeats it.
    Raises PolicyRefused if something is in it that may not leave, ConfigError if a filter cannot work on it. Arrays are copied only by
    filters that change them.
    """
    reference = task.model
    if policy.statistics is not None:
        update = disclosed(policy.statistics.rules(), task, update)
    if update.model.optimizer_params:
        update = replace(update, model=replace(update.model, optimizer_params={}))
    filters = policy.site_filters()
    model = apply(filters, update.model, reference=reference, rng=np.random.default_rng) if filters else update.model
    model = _with_allowed_tensors(policy.tensors, model)
    metrics = _allowed("metrics", policy.metrics, model.metrics)
    brought = {name: value for name, value in model.meta.items() if name in reference.meta and reference.meta[name] == value}
    meta = brought | _allowed("meta", policy.meta, {name: value for name, value in model.meta.items() if name not in brought})
    model = replace(model, metrics=metrics, meta=meta)
    failure, records = update.failure, update.records
    if not policy.logs:
        records = tuple(record for record in records if _is_number(record))
        failure = failure and (_too_few(policy, failure) or _WITHHELD)
    numbers = _allowed("metrics", policy.metrics, {record.key: None for record in records if _is_number(record)})
    records = tuple(record for record in records if not _is_number(record) or record.key in numbers)
    return replace(update, model=model, failure=failure, records=records)


_WITHHELD = Failure(
    "SiteFailed", "the work failed at the site, and its policy keeps the words of errors there [logs]", "Ask the site: its log has them."
)


def _too_few(policy: Policy, failure: Failure) -> Failure | None:
    """In the agent's own words, that the code kept the clause `statistics.min_count`; None if it failed of something else."""
    clause = "statistics.min_count"
    if policy.statistics is None or failure.code != PolicyRefused.__name__ or not failure.message.endswith(f" [{clause}]"):
        return None
    return Failure.of(PolicyRefused(f"there are fewer than {policy.statistics.min_count} rows to speak of", clause=clause))


def _is_number(record: Record) -> bool:
    return record.kind == "scalar" and isinstance(record.value, int | float)


def _allowed(clause: str, leaving: Leaving, named: Mapping[str, Any]) -> dict[str, Any]:
    denied = set(leaving.denied(named))
    if denied and leaving.on_denied == "refuse":
        raise _refused(clause, leaving, min(denied))
    return {name: value for name, value in named.items() if name not in denied}


def _with_allowed_tensors(leaving: Leaving, model: FLModel) -> FLModel:
    """The model without denied tensors; those are listed in its meta, as those of the filter Exclude are.

    What else can be in params, numbers and texts at some path, counts as a tensor of that path's name.
    """
    if model.params is None:
        return model
    arrays, structure = flatten(model.params)
    names = arrays if structure is None else _names(structure["tree"], ())
    denied = leaving.denied(names)
    if not denied:
        return model
    if leaving.on_denied == "refuse":
        raise _refused("tensors", leaving, min(denied))
    params = {name: array for name, array in arrays.items() if name not in denied}
    excluded = sorted({*denied, *model.meta.get("excluded", [])})
    return replace(model, params=unflatten(params, None), meta={**model.meta, "excluded": excluded})


def _names(node: Any, path: tuple[str, ...]) -> Iterator[str]:
    """The names of all leaves in a structure of `flatten`, and of containers without any."""
    match node:
        case {"dict": dict(items)} if items:
            for key, item in items.items():
                yield from _names(item, (*path, key))
        case {"tuple": list(items)} | list(items) if items:
            for index, item in enumerate(items):
                yield from _names(item, (*path, str(index)))
        case _:
            yield "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)


def _refused(clause: str, leaving: Leaving, name: str) -> PolicyRefused:
    part = "deny" if _fits(name, leaving.deny) else "allow"
    hint = "Leave it out, or have the site allow it in its policy."
    return PolicyRefused(f"{name!r:.200} may not leave this site", clause=f"{clause}.{part}", hint=hint)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_no_doubles(path: Path) -> None:
    """Raises ConfigError if a mapping in a YAML or JSON file has a key twice: the later one would silently win."""
    if path.suffix == ".toml":  # its parser refuses them
        return
    try:
        nodes = [yaml.compose(path.read_text(), Loader=yaml.SafeLoader)]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    visited: set[int] = set()
    while nodes:
        node = nodes.pop()
        if id(node) in visited:  # an alias may lead back
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if str(key.value) in seen:
                    raise ConfigError(f"{path}, line {key.start_mark.line + 1}: {key.value!r} is there twice")
                seen.add(str(key.value))
                nodes.append(value)
