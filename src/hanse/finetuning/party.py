"""What runs at a party, on data that stays there: check, score, train, decide. The jobs of a project carry this file.

A party's project folder is named by `finetuning` in its site's config. Below `exchange/` in it this keeps the points of training that it
has seen, what rounding left over, and a ledger of all that left. Torch is imported where it is needed: to bring a version needs none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from hanse.app import App, Site
from hanse.errors import ConfigError, UpdateRejected
from hanse.finetuning import evidence as evidences
from hanse.finetuning import gate as gates
from hanse.finetuning.check import check_folder
from hanse.finetuning.contract import Schema, read_project
from hanse.finetuning.data import Dataset, load, prepared, read_data
from hanse.finetuning.exchange import EVIDENCE, left
from hanse.finetuning.files import write_whole
from hanse.finetuning.metrics import Scores, keep_scores, read_scores, write_scores
from hanse.finetuning.metrics import evaluate as evaluation_of
from hanse.finetuning.points import Arrays, decode_change, difference, digest_of, encode_change, merged, moved
from hanse.finetuning.versions import Versions
from hanse.messages.codec import read, write
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.seeds import generator
from hanse.site.ledger import Ledger, Place
from hanse.statistics.error_rates import eer

if TYPE_CHECKING:
    from hanse.finetuning.training import Trainable

FOLDER = "finetuning"
"""The key of a site's config that names the party's project folder."""

POINTS_KEPT = 4

app = App()
Handler = Callable[["Party", FLModel, Site], FLModel]


class Party:
    """One party's folder, its data and its model for runs with one client, kept in memory from task to task."""

    def __init__(self, folder: Path, site: str, contract: str, base: str, client: str) -> None:
        self.folder, self.site, self.base = folder, site, base
        self.project = read_project(folder)
        if self.project.digest != contract:
            raise ConfigError(
                f"{folder} has another contract, {self.project.digest}, than this run, {contract}.",
                hint="All parties must have the same project.yaml: have the vendor send it again.",
            )
        self._left = Place()
        self.is_vendor = site == self.project.vendor.site
        self.client = self.project.client(client).site
        # A vendor's runs with others may go on meanwhile.
        self._points, self._residuals = (folder / "exchange" / kind / self.client for kind in ("points", "residuals"))
        for path in (self._points, self._residuals):
            path.mkdir(parents=True, exist_ok=True)

    @cached_property
    def train(self) -> tuple[Dataset, np.ndarray[Any, Any]]:
        return self._data("train")

    @cached_property
    def measured(self) -> tuple[Dataset, np.ndarray[Any, Any]]:
        """The vendor's holdout, or the client's test set: with the inputs as the model takes them."""
        return self._data("holdout" if self.is_vendor else "test")

    def _data(self, section: str) -> tuple[Dataset, np.ndarray[Any, Any]]:
        spec = read_data(self.folder).sections.get(section)
        if spec is None:
            raise ConfigError(f"data.yaml in {self.folder} has no section {section!r}, which the {self._role} needs")
        dataset = load(spec, self.project.schema, self.folder, problems=[]).labelled  # the data check has told of them
        return dataset, prepared(dataset, self.project.schema)

    @property
    def _role(self) -> str:
        return "vendor" if self.is_vendor else "client"

    def augment(self, *, always: bool = False) -> Schema | None:
        """How batches are varied; None: not at all. A vendor that rehearses shows the model what it has seen before."""
        return self.project.schema if always or (not self.is_vendor and self.project.learning.augment_client) else None

    # the base, and the points of training

    def base_params(self) -> dict[str, Any] | None:
        """The deployed model's parameters, from a version or from what was installed; None if it is not here."""
        for version in Versions(self.folder).list():
            if version.model == self.base:
                return dict(Versions(self.folder).params(version))
        path = self._model_path(self.base)
        return dict(read(path)[0].params) if path.is_file() else None

    def install(self, params: Mapping[str, Any]) -> None:
        if digest_of(params) != self.base:
            raise UpdateRejected(f"the model that came is not {self.base}")
        self._model_path(self.base).parent.mkdir(parents=True, exist_ok=True)
        write(self._model_path(self.base), FLModel(dict(params)))

    def _model_path(self, digest: str) -> Path:
        return self.folder / "exchange" / "models" / f"{_hex(digest)}.safetensors"

    @cached_property
    def whole(self) -> dict[str, Any]:
        """The base's parameters."""
        params = self.base_params()
        if params is None:
            raise ConfigError(f"{self.folder} does not have the model {self.base}", hint="`hanse finetune versions import` brings it.")
        return params

    @cached_property
    def module(self) -> Any:
        """The vendor's code with the base's weights."""
        from hanse.finetuning.models import load_module, load_params

        module = load_module(self.folder, self.project.model)
        load_params(module, self.whole)
        if len(list(module.named_parameters())) < len(list(module.named_parameters(remove_duplicate=False))):
            raise ConfigError("the model has parameters with two names (tied weights)", hint="Give each parameter one name in model.py.")
        return module

    @cached_property
    def scoring_module(self) -> Any:
        from hanse.finetuning.models import load_module

        return load_module(self.folder, self.project.model)

    @cached_property
    def trainable(self) -> Trainable:
        from hanse.finetuning.training import Trainable

        learning, model = self.project.learning, self.project.model
        return Trainable(self.module, learning.trained, rank=learning.lora_rank, head=model.head, seed=self.project.seed)

    @cached_property
    def first(self) -> dict[str, Any]:
        """What is trained, as it is at the base."""
        return self.trainable.arrays()

    @cached_property
    def first_digest(self) -> str:
        return digest_of(self.first)

    def point(self, model: FLModel, at: str) -> dict[str, Any] | None:
        """The arrays of digest `at`: from here, or from what the task brought; None if that is a difference from a point unknown here."""
        if at == self.first_digest:
            return self.first
        if (path := self._points / f"{_hex(at)}.safetensors").is_file():
            path.touch()
            return dict(read(path)[0].params)
        if not isinstance(model.params, Mapping):
            return None
        if "bits" not in model.params:
            brought = [{name: np.array(array) for name, array in model.params.items()}]
        else:
            change = decode_change(model, self.first)
            brought = [moved(before, change) for before in (*self._kept(), self.first)]
        arrays = next((each for each in brought if digest_of(each) == at), None)
        if arrays is not None:
            self.keep(arrays)
        return arrays

    def keep(self, arrays: Arrays) -> None:
        """Remember a point; older ones are forgotten."""
        write(self._points / f"{_hex(digest_of(arrays))}.safetensors", FLModel(dict(arrays)))
        for old in self._paths()[POINTS_KEPT:]:
            old.unlink()

    def _kept(self) -> Iterator[dict[str, Any]]:
        return (dict(read(path)[0].params) for path in self._paths())

    def _paths(self) -> list[Path]:
        """Of the points kept, the newest first."""
        return sorted(self._points.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def residual(self, turn: int) -> Path:
        """Where what rounding left over after a turn is kept."""
        return self._residuals / f"{_hex(self.base)[:16]}-{turn}.safetensors"

    # scores

    def scores(self, params: Arrays, digest: str) -> Scores:
        """What a model gives each row that this party measures on; computed once for each model."""
        from hanse.finetuning.models import load_params, score

        path = self.scores_path(digest)
        dataset, inputs = self.measured
        schema = self.project.schema
        slices = {name: dataset.columns[name] for name in schema.slices if name in dataset.columns}
        rows = Scores(dataset.names, dataset.labels, np.zeros(len(dataset)), slices, dataset.columns.get(schema.group or ""))
        if path.is_file() and (kept := read_scores(path)).rows_digest == rows.rows_digest:
            return kept
        load_params(self.scoring_module, params)
        kept = replace(rows, scores=score(self.scoring_module, inputs))
        write_scores(path, kept)
        return kept

    def scores_path(self, digest: str) -> Path:
        """Where the scores of the model with that digest are kept."""
        return self.folder / "scores" / "by-model" / f"{_hex(digest)}.safetensors"

    def first_released(self, old: str) -> tuple[Scores, float] | None:
        """Scores and threshold of the version that the deployed one comes of in the end, if it is another."""
        versions = Versions(self.folder)
        by_digest = {version.digest: version for version in versions.list()}
        version = next((each for each in by_digest.values() if each.model == old), None)
        while version is not None and version.parent in by_digest:
            version = by_digest[version.parent]
        if version is None or version.model == old:
            return None
        return self.scores(versions.params(version), version.model), version.threshold

    def tries_before(self, path: Path, old: str) -> int:
        """How many other candidates were put to the gate against this version, for this client."""
        others = [evidences.read_evidence(each).about for each in (self.folder / "evidence").glob("*.json") if each != path]
        return sum(about.get("old") == old and about.get("client") == self.client for about in others)

    def left(self, site: Site, task: str, answer: FLModel) -> None:
        """Write down what leaves with an answer."""
        with Ledger(self.folder / "exchange" / "left.jsonl", wait=True, since=self._left) as ledger:
            ledger.append("left", job=site.job_id, task=task, tensors=left(answer), metrics=dict(answer.metrics))
            self._left = ledger.end


def _hex(digest: str) -> str:
    """The digits of a digest, for a file's name. Raises UpdateRejected for what is none: it may come from the other party."""
    if not re.fullmatch("blake3:[0-9a-f]{64}", digest):
        raise UpdateRejected(f"{digest[:100]!r} is no digest")
    return digest.removeprefix("blake3:")


@lru_cache(maxsize=4)
def _party(folder: str, site: str, contract: str, base: str, client: str) -> Party:
    return Party(Path(folder), site, contract, base, client)


def _task(name: str) -> Callable[[Handler], Handler]:
    """Register what a party does for tasks of that name; what leaves with its answer is written down."""

    def register(function: Handler) -> Handler:
        def handle(model: FLModel, site: Site) -> FLModel:
            if FOLDER not in site.config:
                raise ConfigError(
                    f"site {site.name!r} has no project folder.",
                    hint=f"Name it in kit.yaml: `config: {{{FOLDER}: /where/it/is}}`, and below `keep`.",
                )
            began_s = time.process_time()
            config = site.config
            party = _party(str(config[FOLDER]), site.name, config["contract"], config["base"], config["client"])
            answer = function(party, model, site)
            answer.metrics = {**answer.metrics, "cpu_seconds": time.process_time() - began_s}
            party.left(site, name, answer)
            return answer

        handle.__qualname__ = f"{name} of hanse.finetuning.party"
        app.task(name)(handle)
        return function

    return register


# ------------------------------------------------------------------------------------------------------------------------------- the tasks


@_task("prepare")
def _prepare(party: Party, model: FLModel, site: Site) -> FLModel:
    """Check this party's data, score the base, and say whether it is here. The vendor gives what is trained, as it is at the base."""
    if party.base_params() is None:
        return FLModel(metrics={"has_base": 0.0, "check_failed": 0.0})
    found = check_folder(party.folder)
    metrics = {"has_base": 1.0, "check_failed": float(found.outcome == "failed")}
    metrics |= {f"check_{name}": value for name, value in found.summary().items()}
    if found.outcome != "failed" and site.config["threshold"] is not None:
        metrics |= _figures(party, party.first, site.config["threshold"])
    return FLModel(dict(party.first) if site.config["give_arrays"] else None, metrics=metrics)


@_task("install")
def _install(party: Party, model: FLModel, site: Site) -> FLModel:
    """Keep the base, which this party did not have."""
    party.install(model.params)
    return FLModel()


@_task("evaluate")
def _evaluate(party: Party, model: FLModel, site: Site) -> FLModel:
    """Score a point on this party's own rows. Overall figures leave; those of slices stay in reports/."""
    arrays = party.point(model, site.config["at"])
    return _lacks() if arrays is None else FLModel(metrics=_figures(party, arrays, site.config["threshold"]))


def _figures(party: Party, arrays: Arrays, threshold: float | None) -> dict[str, float]:
    params = merged(party.whole, arrays)
    digest = digest_of(params)
    rows = party.scores(params, digest)
    if threshold is None:
        threshold = eer(rows.scores, rows.labels)[1]
    found = evaluation_of(rows.scores, rows.labels, threshold, slices=rows.slices, groups=rows.groups, seed=party.project.seed)
    path = party.folder / "reports" / f"evaluation-{_hex(digest)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2))
    metrics = {"threshold": float(threshold), "rows": float(len(rows.labels)), "positives": float(found.overall.positives)}
    for name in ("eer", "hter", "fpr", "fnr", "accuracy"):
        figure = getattr(found.overall, name)
        parts = {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        metrics |= {part: float(value) for part, value in parts.items() if value is not None}
    return metrics


@_task("train")
def _train(party: Party, model: FLModel, site: Site) -> FLModel:
    """Local steps from a point; the difference leaves. Before it, the client measures its own EER on the way."""
    from hanse.finetuning import training

    config, learning = site.config, party.project.learning
    arrays = party.point(model, config["at"])
    if arrays is None:
        return _lacks()
    data, inputs = party.train
    rate = learning.vendor_learning_rate if party.is_vendor else learning.client_learning_rate
    rates = [training.cosine(rate, config["first"] + step, config["of"]) for step in range(config["steps"])]
    party.trainable.load(arrays)
    loss = training.local_steps(
        party.trainable, inputs, data.labels, steps=config["steps"], batch_size=learning.batch_size, learning_rates=rates,
        momentum=learning.momentum, rng=_rng(site, "train"), balanced=not party.is_vendor or config["augment"],
        augment=party.augment(always=config["augment"]),
    )  # fmt: skip
    change = difference(party.trainable.arrays(), arrays)
    turn = config["turn"]
    before = party.residual(turn - 1)
    answer, residual = encode_change(change, config["bits"], dict(read(before)[0].params) if turn > 0 and before.is_file() else None)
    party.keep(moved(arrays, decode_change(answer, arrays)))
    write(party.residual(turn), FLModel(residual))
    party.residual(turn - 2).unlink(missing_ok=True)
    return replace(answer, metrics={"loss": loss} | _on_the_way(party, arrays))


def _rng(site: Site, task: str) -> np.random.Generator:
    """The random numbers of one turn: the same, however often and by whatever way it is asked for."""
    return generator(site.seed, "finetuning", site.name, task, site.config["turn"])


def _on_the_way(party: Party, arrays: Arrays) -> dict[str, float]:
    """The client's EER at the point where it begins."""
    if party.is_vendor:
        return {}
    params = merged(party.whole, arrays)
    rows = party.scores(params, digest_of(params))
    return {"eer": eer(rows.scores, rows.labels)[0]}


@_task("gradient")
def _gradient(party: Party, model: FLModel, site: Site) -> FLModel:
    """The gradient of one batch at the arrays that the task brings."""
    from hanse.finetuning import training

    arrays = {name: np.array(array) for name, array in model.params.items()}
    data, inputs = party.train
    party.trainable.load(arrays)
    found = training.gradient(
        party.trainable,
        inputs,
        data.labels,
        batch_size=party.project.learning.batch_size,
        rng=_rng(site, "gradient"),
        balanced=not party.is_vendor,
    )
    return FLModel(found, ParamsType.DIFF, metrics=_on_the_way(party, arrays) if site.config["measure"] else {})


@_task("gate")
def _gate(party: Party, model: FLModel, site: Site) -> FLModel:
    """Decide whether the candidate may follow the deployed version, on the scores kept of both; the evidence stays here too."""
    if not party.is_vendor:
        raise ConfigError("the gate is the vendor's: it has the holdout")
    config, project = site.config, party.project
    kept = {name: read_scores(party.scores_path(config[name])) for name in ("old", "new")}
    first = party.first_released(config["old"])
    if first is not None:
        kept["first"] = first[0]
    for scores in kept.values():
        keep_scores(party.folder / "scores", scores)
    if len({scores.rows_digest for scores in kept.values()}) > 1:
        raise ConfigError(f"the holdout in {party.folder} has changed during the run", hint="A gate compares on the same rows: run again.")
    old, new, path = kept["old"], kept["new"], party.folder / "evidence" / f"{_hex(config['new'])}.json"
    evidence = gates.decide(
        old.scores, new.scores, old.labels, old_threshold=config["old_threshold"], new_threshold=config["new_threshold"], gate=project.gate,
        tries_before=party.tries_before(path, config["old"]), seed=project.seed, slices=old.slices, groups=old.groups,
        first=(first[0].scores, first[1]) if first else None, names=old.names,
        about={"old": config["old"], "new": config["new"], "contract": project.digest, "client": party.client},
    )  # fmt: skip
    evidences.write_evidence(path, evidence)
    return FLModel({EVIDENCE: evidence.json}, metrics={evidence.outcome: 1.0, "attempt": float(evidence.attempt)})


@_task("deliver")
def _deliver(party: Party, model: FLModel, site: Site) -> FLModel:
    """Put a version into the inbox, where this party's people may take it from; the answer is their decision, once there is one."""
    name = _hex(site.config["base"])
    signature = party.folder / "versions" / name / f"{party.site}.signature"
    if signature.is_file():
        return FLModel({"decision": np.frombuffer(signature.read_bytes(), np.uint8)})
    write_whole(party.folder / "inbox" / f"{name}.version", model.params["version"].tobytes())
    return FLModel()


def _lacks() -> FLModel:
    """The answer where a difference cannot be followed, since the point it starts from is not here."""
    return FLModel(metrics={"lacks": 1.0})
