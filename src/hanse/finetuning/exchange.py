"""The workflow of vendor–client fine-tuning: check, measure, train in one of four modes, measure again, ask the vendor's gate.

A run is a list of steps, each with one commit at its end, so that it goes on where it was after a crash, and in an air gap after each
bundle. Both parties know the point where training stands to the same bits; what travels is the difference to it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from hanse.cohort import Cohort
from hanse.errors import Refused
from hanse.finetuning.contract import Project
from hanse.finetuning.points import Arrays, checked, decode_change, digest_of, merged, moved, norm
from hanse.messages.codec import encode
from hanse.messages.flmodel import FLModel
from hanse.messages.params import flatten
from hanse.messages.task import Task

GRADIENT_STEPS_A_COMMIT = 50
"""So many iterations of gradient-mix are done between two commits, and between two measurements."""

ALONE = -1
"""The turn of a party that trains alone, as a control."""

NEEDED = {"prepare": ("has_base", "check_failed"), "evaluate": ("threshold", "eer", "hter")}
"""The metrics without which an answer to a task is none."""

EVIDENCE = "evidence"
"""The name of the params in the gate's answer that hold its evidence: a JSON text."""


@dataclass(frozen=True)
class State:
    """Where a run stands.

    base: the model it began with. arrays: what is trained, at this point. change: how the last party that trained moved it there, as it
    travels, for the other. velocity: of gradient-mix's momentum. facts: JSON values.
    """

    base: Arrays
    arrays: Arrays = field(default_factory=dict)
    change: Any = None
    velocity: Arrays = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_model(self) -> FLModel:
        params = {"base": self.base, "arrays": self.arrays, "change": self.change, "velocity": self.velocity}
        return FLModel({name: value for name, value in params.items() if value}, meta={"finetuning": dict(self.facts)})

    @classmethod
    def of(cls, model: FLModel) -> State:
        if "finetuning" not in model.meta:
            return cls(base=model.params)
        return cls(facts=model.meta["finetuning"], **model.params)

    def noting(self, **facts: Any) -> State:
        return replace(self, facts={**self.facts, **facts})


async def finetune(cohort: Cohort, model: FLModel, *, project: Mapping[str, Any], client: str, threshold: float | None = None) -> FLModel:
    """Fine-tune `model` with one client of the project. Returns the candidate, with what was found in `meta["finetuning"]`.

    model: the deployed version's parameters, the whole state_dict. project: the contract, as JSON values. client: its site's name.
    threshold: the deployed version's operating threshold; None: where the rates are equal on the vendor's holdout.
    Raises Refused if a party's data check failed, TooFewUpdates if a party cannot do its part.
    """
    run = Run(cohort, msgspec.convert(project, Project), client, threshold)
    plan = run.plan()
    async for number in cohort.rounds(model, len(plan)):
        title, step = plan[number]
        before = State.of(model)
        run.base, run.metrics = digest_of(before.base), {}
        cohort.log(title)
        state = await step(before)
        if number == len(plan) - 1:
            model = FLModel(merged(state.base, state.arrays), meta={"finetuning": dict(state.facts)})
        else:
            model = state.as_model()
        model = await cohort.commit(model, run.metrics)
    return model


def planned_steps(project: Project) -> int:
    """How many steps, and so commits, a run has."""
    learning = project.learning
    rounds = {
        "rehearsed": 2 * learning.round_trips,
        "one-shot": 1,
        "average": learning.round_trips,
        "gradient-mix": -(-learning.iterations // GRADIENT_STEPS_A_COMMIT),
    }
    return rounds[learning.mode] + 4 + (learning.augmented_vendor_first or learning.controls) + learning.controls


Step = Callable[[State], Awaitable[State]]


class Run:
    """The steps of one run. base: the digest of the model it began with. metrics: what a step measured, for its commit."""

    def __init__(self, cohort: Cohort, project: Project, client: str, threshold: float | None) -> None:
        self._cohort, self._project, self._learning = cohort, project, project.learning
        self._vendor, self._client = project.vendor.site, project.client(client).site
        self._threshold = threshold
        self._contract = self._project.digest
        self.base = ""
        self.metrics: dict[str, float] = {}

    def plan(self) -> list[tuple[str, Step]]:
        """The steps, each with its title."""
        steps: list[tuple[str, Step]] = [("data check", self._prepare), ("base evaluation", self._measure_base)]
        if self._learning.augmented_vendor_first or self._learning.controls:
            steps.append(("control: vendor alone with augmentation", self._vendor_alone))
        if self._learning.controls:
            steps.append(("control: client alone", self._client_alone))
        training = {"rehearsed": self._rehearsed, "gradient-mix": self._gradient_mix, "one-shot": self._one_shot, "average": self._average}
        steps += training[self._learning.mode]()
        return [*steps, ("candidate", self._measure_candidate), ("vendor gate", self._gate)]

    # ------------------------------------------------------------------------------------------------------------ before and after training

    async def _prepare(self, state: State) -> State:
        """Both parties check their data, and that they have agreed on the same; the vendor says what is trained.

        Where the deployed version has a threshold they score it too, so that this takes one trip to the client.
        """
        arrays: Arrays = {}
        found = []
        for site in (self._vendor, self._client):
            config: dict[str, Any] = {"give_arrays": site == self._vendor, "threshold": self._threshold}
            answer = await self._ask(site, "prepare", **config)
            if not answer.metrics["has_base"]:
                await self._ask(site, "install", FLModel(dict(state.base)))
                answer = await self._ask(site, "prepare", **config)
            if answer.metrics["check_failed"]:
                raise Refused(
                    f"the data check failed at {site!r}: nothing was trained.",
                    hint="That party reads why in reports/data-check.html of its project folder, or by `hanse finetune check`.",
                )
            if site == self._vendor:
                arrays = answer.params
            found.append({name: value for name, value in answer.metrics.items() if not name.startswith(("check_", "has_", "cpu_"))})
        state = replace(state, arrays=arrays)
        return state if self._threshold is None else self._base(state, self._threshold, *found)

    def _base(self, state: State, threshold: float, vendor: dict[str, float], client: dict[str, float]) -> State:
        for site, figures in ((self._vendor, vendor), (self._client, client)):
            self._cohort.event("figures", what="base", party=site, **figures)
        self._note_metrics(vendor, client)
        return state.noting(threshold=threshold, base={"vendor": vendor, "client": client})

    async def _measure_base(self, state: State) -> State:
        """Score the deployed version at both parties, unless that is done; the vendor's holdout gives the threshold."""
        if "base" in state.facts:
            return state
        vendor, client = await self._figures("base", state, state.arrays)
        return state.noting(threshold=vendor["threshold"], base={"vendor": vendor, "client": client})

    async def _measure_candidate(self, state: State) -> State:
        """Score the model at this point at both parties; the vendor's holdout gives its threshold."""
        vendor, client = await self._figures("candidate", state, state.arrays)
        return state.noting(new_threshold=vendor["threshold"], candidate={"vendor": vendor, "client": client})

    async def _figures(self, what: str, state: State, arrays: Arrays) -> tuple[dict[str, float], dict[str, float]]:
        """The metrics of a model at both parties, at the threshold that the vendor's holdout gives. One that is not at this point travels
        whole."""
        threshold, found = None, []
        for site in (self._vendor, self._client):
            if arrays is state.arrays:
                answer = await self._at_point(site, "evaluate", state, threshold=threshold)
            else:
                answer = await self._ask(site, "evaluate", FLModel(dict(arrays)), at=digest_of(arrays), threshold=threshold)
            figures = {name: value for name, value in answer.metrics.items() if name != "cpu_seconds"}
            threshold = figures["threshold"]
            self._cohort.event("figures", what=what, party=site, **figures)
            found.append(figures)
        self._note_metrics(*found)
        return found[0], found[1]

    def _note_metrics(self, vendor: Mapping[str, float], client: Mapping[str, float]) -> None:
        self.metrics = {
            f"{party}_{name}": found[name] for party, found in (("vendor", vendor), ("client", client)) for name in ("eer", "hter")
        }

    async def _vendor_alone(self, state: State) -> State:
        """What the vendor reaches without the client: a control, and where the exchange begins if the contract says so."""
        arrays = await self._alone(self._vendor, state, self._learning.vendor_alone_steps, augment=True)
        vendor, client = await self._figures("vendor alone", state, arrays)
        if self._learning.augmented_vendor_first:
            state = replace(state, arrays=arrays, change=None)
        return state.noting(vendor_alone={"vendor": vendor, "client": client})

    async def _client_alone(self, state: State) -> State:
        """What the client reaches without the vendor, and forgets: a control."""
        arrays = await self._alone(self._client, state, self._learning.client_alone_steps, augment=False)
        vendor, client = await self._figures("client alone", state, arrays)
        return state.noting(client_alone={"vendor": vendor, "client": client})

    async def _alone(self, site: str, state: State, steps: int, *, augment: bool) -> Arrays:
        answer = await self._at_point(site, "train", state, **_local(ALONE, 1, steps, bits=self._learning.bits, augment=augment))
        return moved(state.arrays, decode_change(answer, state.arrays))

    async def _gate(self, state: State) -> State:
        """The vendor decides on its holdout, from the scores of both models that it has kept."""
        old, new = digest_of(state.base), digest_of(merged(state.base, state.arrays))
        thresholds = {"old_threshold": state.facts["threshold"], "new_threshold": state.facts["new_threshold"]}
        answer = await self._ask(self._vendor, "gate", old=old, new=new, client=self._client, **thresholds)
        outcome = next(name for name in ("accepted", "rejected", "inconclusive") if answer.metrics.get(name))
        text = bytes(answer.params[EVIDENCE]).decode()
        self._cohort.event("gate", outcome=outcome, evidence=text)
        return state.noting(candidate_digest=new, outcome=outcome)

    # ------------------------------------------------------------------------------------------------------------------------------- modes

    def _rehearsed(self) -> list[tuple[str, Step]]:
        """The client trains, then the vendor rehearses, and so on; each sends what it has changed, in few bits."""
        trips = self._learning.round_trips
        return [
            (f"round trip {trip + 1} of {trips}, {party}", self._turn(party, trip))
            for trip in range(trips)
            for party in ("client", "vendor")
        ]

    def _turn(self, party: str, trip: int) -> Step:
        learning = self._learning
        site, steps = (self._client, learning.client_steps) if party == "client" else (self._vendor, learning.vendor_steps)

        async def turn(state: State) -> State:
            if steps == 0 or state.facts.get("stopped"):
                return state
            answer = await self._at_point(site, "train", state, **_local(trip, learning.round_trips, steps, bits=learning.bits))
            if party == "client":
                state = self._on_the_way(state, trip, answer)
                if state.facts.get("stopped"):
                    return state
            return replace(state, arrays=moved(state.arrays, decode_change(answer, state.arrays)), change=answer.params)

        return turn

    def _on_the_way(self, state: State, trip: int, answer: FLModel) -> State:
        """Note what the client measured before it trained; with `patience`, stop when that has got no better for so long."""
        _must_have(answer, self._client, "eer")
        eer = answer.metrics["eer"]
        self._cohort.event("figures", what=f"before round trip {trip + 1}", party=self._client, eer=eer)
        self.metrics = {"client_eer": eer}
        seen = [*state.facts.get("client_eer", []), eer]
        patience = self._learning.patience
        stopped = patience > 0 and len(seen) > patience and min(seen[-patience:]) >= min(seen[:-patience])
        if stopped:
            self._cohort.log(f"stopped before round trip {trip + 1}: the client's EER has not improved for {patience} round trips")
        return state.noting(client_eer=seen, stopped=stopped)

    def _one_shot(self) -> list[tuple[str, Step]]:
        """The client trains once and sends the difference once. The contract's adapter says what it trains."""
        learning = self._learning

        async def shot(state: State) -> State:
            answer = await self._at_point(self._client, "train", state, **_local(0, 1, learning.client_alone_steps, bits=learning.bits))
            return replace(state, arrays=moved(state.arrays, decode_change(answer, state.arrays)), change=answer.params)

        return [("one shot, client", shot)]

    def _average(self) -> list[tuple[str, Step]]:
        """Both train from the same point, and the models are averaged with the vendor's weight."""
        learning = self._learning

        def round_(number: int) -> Step:
            async def both(state: State) -> State:
                config = _local(number, learning.round_trips, learning.client_steps, bits=learning.bits)
                answers = await self._both("train", FLModel(dict(state.arrays)), at=digest_of(state.arrays), **config)
                state = self._on_the_way(state, number, answers[self._client])
                changes = {site: decode_change(answer, state.arrays) for site, answer in answers.items()}
                return replace(state, arrays=moved(state.arrays, self._mixed(changes)), change=None)

            async def unless_stopped(state: State) -> State:
                return state if state.facts.get("stopped") else await both(state)

            return unless_stopped

        return [(f"round {number + 1} of {learning.round_trips}", round_(number)) for number in range(learning.round_trips)]

    def _gradient_mix(self) -> list[tuple[str, Step]]:
        """g = w · g_vendor + (1 - w) · g_client at each iteration, with momentum here and a rate that falls along a cosine."""
        learning = self._learning

        def block(first: int) -> Step:
            async def iterate(state: State) -> State:
                arrays, velocity = dict(state.arrays), dict(state.velocity) or {name: np.zeros_like(a) for name, a in state.arrays.items()}
                for iteration in range(first, min(first + GRADIENT_STEPS_A_COMMIT, learning.iterations)):
                    measure = iteration == first
                    answers = await self._both("gradient", FLModel(dict(arrays)), turn=iteration, measure=measure)
                    if measure:
                        state = self._on_the_way(state, iteration, answers[self._client])
                    gradients = self._mixed({site: checked(answer.params, arrays) for site, answer in answers.items()})
                    share = (1 + math.cos(math.pi * iteration / learning.iterations)) / 2
                    rates = learning.weight * learning.vendor_learning_rate + (1 - learning.weight) * learning.client_learning_rate
                    for name, gradient in gradients.items():
                        velocity[name] = np.float32(learning.momentum) * velocity[name] + gradient
                        arrays[name] = arrays[name] - np.float32(rates * share) * velocity[name]
                return replace(state, arrays=arrays, velocity=velocity, change=None)

            return iterate

        return [
            (f"iterations from {first + 1} of {learning.iterations}", block(first))
            for first in range(0, learning.iterations, GRADIENT_STEPS_A_COMMIT)
        ]

    def _mixed(self, by_site: Mapping[str, Arrays]) -> dict[str, Any]:
        vendor, client = by_site[self._vendor], by_site[self._client]
        weight = np.float32(self._learning.weight)
        return {name: weight * array + (np.float32(1) - weight) * client[name] for name, array in vendor.items()}

    # ------------------------------------------------------------------------------------------------------------------------- what travels

    async def _at_point(self, site: str, task: str, state: State, **config: Any) -> FLModel:
        """Have a party do a task at this point: it gets the last change, or, if it has lost the point before, all that is trained."""
        at = digest_of(state.arrays)
        answer = await self._ask(site, task, FLModel(state.change), at=at, **config)
        if answer.metrics.get("lacks"):
            answer = await self._ask(site, task, FLModel(dict(state.arrays)), at=at, **config)
        return answer

    async def _ask(self, site: str, task: str, model: FLModel | None = None, **config: Any) -> FLModel:
        answers = await self._ask_all([site], task, model or FLModel(), config)
        return answers[site]

    async def _both(self, task: str, model: FLModel, **config: Any) -> dict[str, FLModel]:
        return await self._ask_all([self._vendor, self._client], task, model, config)

    async def _ask_all(self, sites: list[str], task: str, model: FLModel, config: Mapping[str, Any]) -> dict[str, FLModel]:
        """Each site's answer; what crossed is noted, with each tensor that left."""
        down = _bytes(model)
        answers: dict[str, FLModel] = {}
        asked = Task(task, model, {"contract": self._contract, "base": self.base, "client": self._client, **config})
        async for update in self._cohort.ask(asked, of=sites):
            if update.failure is None:
                if not update.model.metrics.get("lacks"):
                    _must_have(update.model, update.site, *NEEDED.get(task, ()))
                answers[update.site] = update.model
                self._cohort.event(
                    "crossed", party=update.site, task=task, down_bytes=down, up_bytes=_bytes(update.model),
                    seconds=update.seconds, cpu_seconds=update.model.metrics.get("cpu_seconds"), tensors=left(update.model),
                )  # fmt: skip
        return answers


def _must_have(answer: FLModel, site: str, *names: str) -> None:
    """Raises Refused if a metric is missing."""
    if missing := [name for name in names if name not in answer.metrics]:
        raise Refused(
            f"the answer of site {site!r} lacks the metric {missing[0]!r}.",
            hint=f"Its policy may keep it there: `metrics` must let out {', '.join(names)} and what else docs/finetuning.md names.",
        )


def _local(turn: int, turns: int, steps: int, *, bits: int, augment: bool = False) -> dict[str, Any]:
    """How a party trains in one of so many turns of as many steps; its learning rate falls over all of them."""
    return {"turn": turn, "first": max(0, turn) * steps, "of": turns * steps, "steps": steps, "bits": bits, "augment": augment}


def _bytes(model: FLModel) -> int:
    return sum(memoryview(piece).nbytes for piece in encode(model))


def left(model: FLModel) -> list[dict[str, Any]]:
    """Each tensor of an answer: name, shape, dtype, L2 norm, BLAKE3. What both parties note of what left."""
    if model.params is None:
        return []
    return [
        {
            "name": name,
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "norm": norm(array) if array.dtype.kind in "fiu" else None,
            "digest": blake3(np.ascontiguousarray(array).tobytes()).hexdigest(),
        }
        for name, array in flatten(model.params)[0].items()
    ]
